/* Places for temporary values in one piece of memory: values that are never alive together may share bytes. */
#include <stdlib.h>

#include "engine.h"

struct life {
    uint64_t bytes, place;
    uint32_t value, first, last;
};

static int by_size(const void *left, const void *right) {
    const struct life *a = left, *b = right;
    if (a->bytes != b->bytes) return a->bytes < b->bytes ? 1 : -1;
    if (a->first != b->first) return a->first < b->first ? -1 : 1;
    return a->value < b->value ? -1 : a->value > b->value;
}

static int by_place(const void *left, const void *right) {
    const struct life *a = *(const struct life *const *)left, *b = *(const struct life *const *)right;
    return a->place < b->place ? -1 : a->place > b->place;
}

static uint32_t root(const struct program *program, uint32_t value) {
    while (program->values[value].alias >= 0) value = (uint32_t)program->values[value].alias;
    return value;
}

static bool temporary(const struct program *program, uint32_t value) {
    bool cache = value >= FIRST_CACHE && value < FIRST_CACHE + program->cache_count;
    return !cache && program->offsets[value] == UINT64_MAX && program->values[value].alias < 0;
}

/* The largest first, each at the lowest offset where it meets none of those that live when it does (greedy by size:
 * Pisarchyk and Lee, arXiv 2001.03288, section 5.2). */
static uint64_t place(struct life *lives, uint32_t count, const struct life **met) {
    uint64_t end = 0;
    for (uint32_t index = 0; index < count; index++) {
        struct life *life = &lives[index];
        uint32_t meeting = 0;
        for (uint32_t other = 0; other < index; other++)
            if (lives[other].first <= life->last && life->first <= lives[other].last) met[meeting++] = &lives[other];
        qsort(met, meeting, sizeof *met, by_place);
        for (uint32_t other = 0; other < meeting && life->place + life->bytes > met[other]->place; other++)
            if (met[other]->place + met[other]->bytes > life->place) life->place = met[other]->place + met[other]->bytes;
        if (life->place + life->bytes > end) end = life->place + life->bytes;
    }
    return end;
}

ark_status arena_place(struct program *program, int64_t tokens, int64_t rows, uint64_t *places, uint64_t *size) {
    uint32_t count = 0, room = program->value_count;
    struct life *lives = calloc(room, sizeof *lives);
    const struct life **met = calloc(room, sizeof *met);
    uint32_t *slots = calloc(room, sizeof *slots);
    ark_status status = ARK_OK;
    if (!lives || !met || !slots) status = no_memory("the plan of its scratch memory", room * sizeof *lives);
    for (uint32_t value = 0; value < room && !status; value++) {
        if (!temporary(program, value)) continue;
        struct life *life = &lives[slots[value] = count++];
        *life = (struct life){.value = value, .first = program->call_count};
        if (value < FIRST_CACHE) *life = (struct life){.value = value, .first = 0, .last = program->call_count};
        if (!value_bytes(&program->values[value], tokens, rows, &life->bytes))
            status = fail(ARK_ARGUMENT, "a step of %lld tokens takes too much memory; take a smaller chunk",
                          (long long)tokens);
        life->bytes = (life->bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    }
    for (uint32_t index = 0; index < program->call_count && !status; index++)
        for (uint32_t argument = 0; argument < program->calls[index].count; argument++) {
            const TVMFFIAny *any = &program->arguments[program->calls[index].first + argument];
            if (any->type_index != ANY_TENSOR) continue;
            uint32_t value = root(program, (uint32_t)((struct value *)any->v_ptr - program->values));
            if (!temporary(program, value)) continue;
            struct life *life = &lives[slots[value]];
            if (index < life->first) life->first = index;
            if (index > life->last) life->last = index;
        }
    if (!status) {
        lives[slots[root(program, (uint32_t)program->result)]].last = program->call_count;
        qsort(lives, count, sizeof *lives, by_size);
        *size = place(lives, count, met);
        for (uint32_t index = 0; index < count; index++) places[lives[index].value] = lives[index].place;
        for (uint32_t value = 0; value < room; value++)
            if (program->values[value].alias >= 0) places[value] = places[root(program, value)];
    }
    free(lives);
    free(met);
    free(slots);
    return status;
}
