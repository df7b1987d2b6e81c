/* Which instruction set levels this processor runs: targets/probe.py knows them by the same names. */
#define _GNU_SOURCE /* sched_getaffinity */
#include <string.h>
#include <unistd.h>

#include "engine.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#endif
#if defined(__linux__)
#include <sched.h>
#endif

enum { DOTPROD = 1, I8MM = 2, HALF = 4, AVX2 = 8, VNNI = 16 };

#if defined(__x86_64__)

static bool has(unsigned word, const int *bits, int count) {
    for (int index = 0; index < count; index++)
        if (!(word >> bits[index] & 1)) return false;
    return true;
}

static unsigned features(void) {
    static const int first[] = {12, 22, 27, 28, 29};         /* FMA, MOVBE, OSXSAVE, AVX, F16C in ECX of leaf 1 */
    static const int second[] = {3, 5, 8};                   /* BMI1, AVX2, BMI2 in EBX of leaf 7 */
    static const int third[] = {16, 17, 28, 30, 31};         /* AVX-512 F, DQ, CD, BW, VL in EBX of leaf 7 */
    unsigned a, b, c, d, low, high;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !has(c, first, 5)) return 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if ((low & 0x6) != 0x6 || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !has(b, second, 3)) return 0;
    bool vnni = (low & 0xe6) == 0xe6 && has(b, third, 5) && (c >> 11 & 1);
    return AVX2 | (vnni ? VNNI : 0);
}

#elif defined(__APPLE__)

static bool has(const char *name) {
    int value = 0;
    size_t size = sizeof value;
    return !sysctlbyname(name, &value, &size, NULL, 0) && value;
}

static unsigned features(void) {
    return (has("hw.optional.arm.FEAT_DotProd") ? DOTPROD : 0) | (has("hw.optional.arm.FEAT_I8MM") ? I8MM : 0) |
           (has("hw.optional.arm.FEAT_FP16") ? HALF : 0);
}

#elif defined(__aarch64__)

static unsigned features(void) {
    unsigned long first = getauxval(16), second = getauxval(26);                  /* AT_HWCAP, AT_HWCAP2 */
    return (first >> 20 & 1 ? DOTPROD : 0) | (second >> 13 & 1 ? I8MM : 0) |      /* HWCAP_ASIMDDP, HWCAP2_I8MM */
           (first >> 9 & first >> 10 & 1 ? HALF : 0);                             /* HWCAP_FPHP, HWCAP_ASIMDHP */
}

#else

static unsigned features(void) { return 0; }

#endif

static const struct {
    const char *name;
    unsigned needs;
} levels[] = {
    {"x86-64-v4-vnni", AVX2 | VNNI},
    {"x86-64-v3", AVX2},
    {"aarch64-i8mm", DOTPROD | HALF | I8MM},
    {"aarch64-dotprod", DOTPROD | HALF},
};

bool level_runs(const char *name) {
    unsigned here = features();
    for (size_t index = 0; index < sizeof levels / sizeof *levels; index++)
        if (!strcmp(levels[index].name, name)) return (here & levels[index].needs) == levels[index].needs;
    return false;
}

const char *level_names(void) {
    for (size_t index = 0; index < sizeof levels / sizeof *levels; index++)
        if (level_runs(levels[index].name)) return levels[index].name;
    return "none that arkinfer has kernels for";
}

int32_t processors(void) {
#if defined(__linux__)
    cpu_set_t set;
    CPU_ZERO(&set);
    if (!sched_getaffinity(0, sizeof set, &set)) {
        int32_t count = 0;
        for (size_t index = 0; index < sizeof set; index++) count += __builtin_popcount(((unsigned char *)&set)[index]);
        if (count > 0) return count;
    }
    return 1;
#else
    long count = sysconf(_SC_NPROCESSORS_ONLN);
    return count > 0 ? (int32_t)count : 1;
#endif
}
