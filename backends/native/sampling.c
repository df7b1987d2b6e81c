/* Logits to token, as runtime/sampling.py does it. */
#include <math.h>
#include <stdlib.h>

#include "engine.h"

#define COLDEST 1e-30 /* temperatures below it are 0: float32 holds no inverse of the smallest */

struct candidate {
    float weight;
    int32_t token;
};

static int by_weight(const void *left, const void *right) {
    const struct candidate *a = left, *b = right;
    if (a->weight != b->weight) return a->weight < b->weight ? 1 : -1;
    return a->token < b->token ? -1 : a->token > b->token;
}

static int by_token(const void *left, const void *right) {
    const struct candidate *a = left, *b = right;
    return a->token < b->token ? -1 : a->token > b->token;
}

#if defined(__x86_64__)
#define FUSED __attribute__((target("fma"))) /* which every level has */
#else
#define FUSED
#endif

/* exp(x) for x <= 0 by a rational minimax approximation: numpy's float32 function on x86-64. */
FUSED static float exponential(float x) {
    if (x < -103.972084f) return 0;
    float n = rintf(x * 1.442695041f);
    float r = __builtin_fmaf(n, -6.93145752e-1f, x);
    r = __builtin_fmaf(n, -1.42860677e-6f, r);
    float over = __builtin_fmaf(r, 5.082762527590693718096e-04f, 6.757896990527504603057e-03f);
    over = __builtin_fmaf(over, r, 5.114512081637298353406e-02f);
    over = __builtin_fmaf(over, r, 2.473615434895520810817e-01f);
    over = __builtin_fmaf(over, r, 7.257664613233124478488e-01f);
    over = __builtin_fmaf(over, r, 9.999999999980870924916e-01f);
    float under = __builtin_fmaf(r, 2.159509375685829852307e-02f, -2.742335390411667452936e-01f);
    under = __builtin_fmaf(under, r, 1.0f);
    return ldexpf(over / under, (int)n);
}

/* The k-th largest of the logits: the root of a heap that holds the k largest seen, the smallest on top. */
static float kth_largest(const float *logits, size_t count, float *heap, size_t k) {
    size_t held = 0;
    for (size_t index = 0; index < count; index++) {
        size_t at;
        if (held < k) {
            at = held++;
            for (; at && heap[(at - 1) / 2] > logits[index]; at = (at - 1) / 2) heap[at] = heap[(at - 1) / 2];
        } else {
            if (!(logits[index] > heap[0])) continue;
            at = 0;
            for (size_t child; (child = 2 * at + 1) < held; at = child) {
                if (child + 1 < held && heap[child + 1] < heap[child]) child++;
                if (heap[child] >= logits[index]) break;
                heap[at] = heap[child];
            }
        }
        heap[at] = logits[index];
    }
    return heap[0];
}

static size_t nucleus(struct candidate *candidates, size_t count, double total, double share) {
    qsort(candidates, count, sizeof *candidates, by_weight);
    double sum = 0;
    size_t kept = 0;
    while (kept < count && sum < share * total) sum += candidates[kept++].weight;
    qsort(candidates, kept, sizeof *candidates, by_token);
    return kept;
}

static size_t choose(const float *logits, size_t count, float best, const ark_sampling *sampling,
                     struct candidate *candidates) {
    float least = -INFINITY, scale = (float)(1 / sampling->temperature);
    if (sampling->top_k && (size_t)sampling->top_k < count)
        least = kth_largest(logits, count, (float *)candidates, (size_t)sampling->top_k);
    size_t found = 0;
    double total = 0;
    for (size_t index = 0; index < count; index++) {
        if (logits[index] < least) continue;
        candidates[found] = (struct candidate){exponential((logits[index] - best) * scale), (int32_t)index};
        total += candidates[found++].weight;
    }
    if (sampling->top_p > 0 && sampling->top_p < 1) {
        /* All tokens below this bound together weigh less than what top_p cuts off: they need not be sorted. */
        double bound = (1 - sampling->top_p) * total / (double)found;
        size_t likely = 0;
        for (size_t index = 0; index < found; index++)
            if (candidates[index].weight >= (float)bound) candidates[likely++] = candidates[index];
        found = nucleus(candidates, likely, total, sampling->top_p);
    }
    if (sampling->min_p > 0) {
        float largest = 0;
        for (size_t index = 0; index < found; index++)
            if (candidates[index].weight > largest) largest = candidates[index].weight;
        size_t likely = 0;
        for (size_t index = 0; index < found; index++)
            if (candidates[index].weight >= (float)sampling->min_p * largest) candidates[likely++] = candidates[index];
        found = likely;
    }
    return found;
}

static int32_t pick(const struct candidate *candidates, size_t count, double fraction) {
    double total = 0, sum = 0;
    for (size_t index = 0; index < count; index++) total += candidates[index].weight;
    int32_t last = candidates[0].token;
    for (size_t index = 0; index < count; index++) {
        if (candidates[index].weight > 0) last = candidates[index].token;
        sum += candidates[index].weight;
        if (sum > fraction * total) break;
    }
    return last;
}

static ark_status check(const ark_sampling *sampling) {
    if (!(sampling->temperature >= 0 && sampling->temperature <= 100))
        return fail(ARK_ARGUMENT, "temperature is a number from 0 to 100");
    if (sampling->top_k < 0) return fail(ARK_ARGUMENT, "top_k is a number from 0 up, not %d", sampling->top_k);
    if (!(sampling->top_p >= 0 && sampling->top_p <= 1)) return fail(ARK_ARGUMENT, "top_p is a number from 0 to 1");
    if (!(sampling->min_p >= 0 && sampling->min_p <= 1)) return fail(ARK_ARGUMENT, "min_p is a number from 0 to 1");
    return ARK_OK;
}

ark_status ark_sample(const float *logits, size_t count, const ark_sampling *sampling, ark_random *random,
                      int32_t *token) {
    if (!logits || !count || count > INT32_MAX || !sampling || !random || !token)
        return fail(ARK_ARGUMENT, "ark_sample needs logits, sampling, random numbers and a place for the token");
    ark_status status = check(sampling);
    if (status) return status;
    size_t best = 0;
    bool sound = true;
    for (size_t index = 0; index < count; index++) {
        sound &= logits[index] == logits[index];
        if (logits[index] > logits[best]) best = index;
    }
    if (!sound || !isfinite(logits[best])) return fail(ARK_INTERNAL, "the logits are not numbers");
    *token = (int32_t)best;
    if (sampling->temperature < COLDEST || sampling->top_k == 1) return ARK_OK;
    struct candidate *candidates = malloc(count * sizeof *candidates);
    if (!candidates) return no_memory("sampling", count * sizeof *candidates);
    size_t found = choose(logits, count, logits[best], sampling, candidates);
    *token = pick(candidates, found, ark_random_next(random));
    free(candidates);
    return ARK_OK;
}
