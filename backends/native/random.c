/* numpy.random.default_rng(seed).random(dtype=float32): PCG64 (O'Neill's PCG XSL-RR 128/64) seeded by SeedSequence. */
#include "engine.h"

typedef unsigned __int128 wide;

static uint32_t stir(uint32_t value, uint32_t *constant) {
    value ^= *constant;
    *constant *= 0x931e8875u;
    value *= *constant;
    return value ^ value >> 16;
}

static uint32_t mix(uint32_t x, uint32_t y) {
    uint32_t value = 0xca01f9ddu * x - 0x4973f715u * y;
    return value ^ value >> 16;
}

static wide state_of(const ark_random *random) { return (wide)random->state[0] << 64 | random->state[1]; }

static void advance(ark_random *random) {
    wide multiplier = (wide)2549297995355413924u << 64 | 4865540595714422341u;
    wide next = state_of(random) * multiplier + ((wide)random->state[2] << 64 | random->state[3]);
    random->state[0] = (uint64_t)(next >> 64);
    random->state[1] = (uint64_t)next;
}

void ark_seed(ark_random *random, uint64_t seed) {
    uint32_t entropy[4] = {(uint32_t)seed, (uint32_t)(seed >> 32)}, pool[4], words[8];
    uint32_t constant = 0x43b0d7e5u;
    for (int index = 0; index < 4; index++) pool[index] = stir(entropy[index], &constant);
    for (int source = 0; source < 4; source++)
        for (int target = 0; target < 4; target++)
            if (source != target) pool[target] = mix(pool[target], stir(pool[source], &constant));
    constant = 0x8b51f9ddu;
    for (int index = 0; index < 8; index++) {
        uint32_t value = pool[index % 4] ^ constant;
        constant *= 0x58f38dedu;
        value *= constant;
        words[index] = value ^ value >> 16;
    }
    uint64_t halves[4];
    for (int index = 0; index < 4; index++) halves[index] = words[2 * index] | (uint64_t)words[2 * index + 1] << 32;
    wide start = (wide)halves[0] << 64 | halves[1], stream = ((wide)halves[2] << 64 | halves[3]) << 1 | 1;
    random->state[2] = (uint64_t)(stream >> 64);
    random->state[3] = (uint64_t)stream;
    random->state[0] = random->state[1] = 0;
    random->half = random->held = 0;
    advance(random);
    start += state_of(random);
    random->state[0] = (uint64_t)(start >> 64);
    random->state[1] = (uint64_t)start;
    advance(random);
}

float ark_random_next(ark_random *random) {
    uint32_t word = random->half;
    if (!random->held) {
        advance(random);
        uint64_t folded = random->state[0] ^ random->state[1];
        unsigned by = (unsigned)(random->state[0] >> 58);
        uint64_t turned = folded >> by | folded << (-by & 63);
        random->half = (uint32_t)(turned >> 32);
        word = (uint32_t)turned;
    }
    random->held = !random->held; /* each number of 64 bits makes two */
    return (float)(word >> 8) * 0x1p-24f;
}
