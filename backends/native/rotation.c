/* Cosines and sines of the positions, with the arithmetic of numpy's float32 functions, so that logits are the same. */
#include <math.h>
#include <string.h>

#include "engine.h"

#if defined(__x86_64__)
#define FUSED __attribute__((target("fma"))) /* which every level has */
#else
#define FUSED
#endif
/* Where the reduction loses too much, the C library's functions take over. */
#define LARGEST_COSINE 71476.0625f
#define LARGEST_SINE 117435.992f

/* Reduction by Cody and Waite in three parts of pi/2, then a minimax polynomial: numpy's simd_sincos_f32. */
FUSED static float circular(float x, bool cosine) {
    float turns = __builtin_fmaf(x, 0x1.45f306p-1f, 0x1.8p+23f) - 0x1.8p+23f; /* the nearest whole number */
    float r = __builtin_fmaf(turns, -0x1.921fb0p+00f, x);
    r = __builtin_fmaf(turns, -0x1.5110b4p-22f, r);
    r = __builtin_fmaf(turns, -0x1.846988p-48f, r);
    float square = r * r;
    float even = __builtin_fmaf(0x1.98e616p-16f, square, -0x1.6c06dcp-10f);
    even = __builtin_fmaf(even, square, 0x1.55553cp-05f);
    even = __builtin_fmaf(even, square, -0x1.000000p-01f);
    even = __builtin_fmaf(even, square, 0x1.000000p+00f);
    float odd = __builtin_fmaf(0x1.7d3bbcp-19f, square, -0x1.a06bbap-13f);
    odd = __builtin_fmaf(odd, square, 0x1.11119ap-07f);
    odd = __builtin_fmaf(odd, square, -0x1.555556p-03f);
    odd = odd * square;
    odd = __builtin_fmaf(odd, r, r);
    int quadrant = (int)turns + cosine;
    float result = quadrant & 1 ? even : odd;
    return quadrant & 2 ? -result : result;
}

void rotation_fill(const struct program *program, int64_t position, int64_t count, float *table) {
    int64_t half = program->head_dim / 2;
    for (int64_t token = 0; token < count; token++) {
        float *row = table + token * program->head_dim; /* cosines, then sines */
        for (int64_t index = 0; index < half; index++) {
            float angle = (float)(position + token) * program->frequencies[index];
            row[index] = angle > LARGEST_COSINE ? cosf(angle) : circular(angle, true);
            row[half + index] = angle > LARGEST_SINE ? sinf(angle) : circular(angle, false);
        }
        if (program->magnitude != 1)
            for (int64_t index = 0; index < program->head_dim; index++) row[index] *= program->magnitude;
    }
}
