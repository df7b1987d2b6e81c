/* arkinfer.h: run an arkinfer artifact from C, without Python.
 *
 * An engine is an opened artifact: compiled code, mapped weights, threads and scratch memory. A session is one sequence
 * of tokens in its caches. Tokens are ids: bring your own tokenizer (the artifact holds tokenizer.json).
 *
 * Threads. Any number of sessions may be used from any number of threads; an engine computes one step at a time and the
 * others wait. One session serves one call at a time: a second one gets ARK_BUSY. ark_cancel may be called from any
 * thread at any time before ark_session_close. A process made by fork(2) has no threads of the pool: open anew there.
 *
 * Errors. Every function that can fail returns an ark_status; ark_error() then tells the calling thread what was wrong
 * and what to do. A failed call leaves its session as it was, unless stated otherwise.
 */
#ifndef ARKINFER_H
#define ARKINFER_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define ARK_API __attribute__((visibility("default")))
#else
#define ARK_API
#endif

#define ARK_INTERFACE 1 /* grows when a function or a field of this header changes its meaning */

/* Stable numbers; new ones are appended. */
typedef enum {
    ARK_OK = 0,
    ARK_ARGUMENT = 1,    /* an argument is outside its range */
    ARK_ABSENT = 2,      /* there is no artifact at that path */
    ARK_DAMAGED = 3,     /* a file of the artifact is missing, truncated or not what its manifest says */
    ARK_NEWER = 4,       /* made by a newer arkinfer than this library */
    ARK_UNSUPPORTED = 5, /* the artifact holds no code for this processor or system, or no such attention */
    ARK_MEMORY = 6,      /* the system gives no more memory or threads */
    ARK_TOKEN = 7,       /* a token id lies outside the vocabulary, or there is none */
    ARK_FULL = 8,        /* the session cannot hold that many tokens */
    ARK_BUSY = 9,        /* another call is at work on this session */
    ARK_CANCELLED = 10,  /* ark_cancel ended the call */
    ARK_INTERNAL = 11    /* a fault of arkinfer: a kernel refused its arguments, or logits are not numbers */
} ark_status;

typedef struct ark_engine ark_engine;
typedef struct ark_session ark_session;

typedef enum {
    ARK_ATTENTION_BUILT = 0, /* what the artifact was built for */
    ARK_ATTENTION_AUTO = 1,  /* sparse from the length on that the model states */
    ARK_ATTENTION_DENSE = 2,
    ARK_ATTENTION_SPARSE = 3 /* from the first token on */
} ark_attention;

/* Zeros are the defaults: `ark_options options = {0};` */
typedef struct {
    int32_t threads;         /* 0: one for each processor that this process may use; at most 64 */
    ark_attention attention;
    int32_t chunk;           /* most tokens computed at a time, 1..4096; 0: 128. Scratch memory grows with it */
    int32_t check;           /* 1: compare every file with its SHA-256 in the manifest, which reads all of them */
    const char *libraries;   /* NULL: compiled code is the artifact's. Else the folder that holds it as lib<level>.so
                                (.dylib), "" for the system's search path: where an app ships code with its package */
} ark_options;

/* The text of the calling thread's last error, or "". Valid until the thread's next failing call. */
ARK_API const char *ark_error(void);

/* Open the artifact in the folder `path`. `options` may be NULL. On success *engine is to be closed by ark_close. */
ARK_API ark_status ark_open(const char *path, const ark_options *options, ark_engine **engine);

/* Release the engine; what its open sessions need lives on until the last of them is closed. NULL is allowed. */
ARK_API void ark_close(ark_engine *engine);

ARK_API int32_t ark_vocabulary(const ark_engine *engine); /* number of token ids; the length of a row of logits */
ARK_API int64_t ark_context(const ark_engine *engine);    /* most tokens of a session */
ARK_API int32_t ark_threads(const ark_engine *engine);
ARK_API const char *ark_level(const ark_engine *engine);  /* the instruction set level in use, "aarch64-dotprod" */
ARK_API size_t ark_scratch(const ark_engine *engine);     /* bytes of scratch memory reserved when it was opened */

/* The ids that end an answer of this model: *count of them at the returned address, the engine's. */
ARK_API const int32_t *ark_stops(const ark_engine *engine, size_t *count);

/* Make an empty session for at least `capacity` tokens (0 or more than ark_context: that many). */
ARK_API ark_status ark_session_open(ark_engine *engine, int64_t capacity, ark_session **session);

/* Release a session. No call may be at work on it. NULL is allowed. */
ARK_API void ark_session_close(ark_session *session);

ARK_API int64_t ark_length(const ark_session *session);   /* tokens in the context */
ARK_API int64_t ark_capacity(const ark_session *session); /* most tokens that it can hold */
ARK_API size_t ark_session_bytes(const ark_session *session); /* address space of its caches; pages count once used */

typedef enum {
    ARK_ROWS_NONE = 0, /* no logits: the output layer is not computed */
    ARK_ROWS_LAST = 1, /* those after the last token */
    ARK_ROWS_ALL = 2   /* a row after each token */
} ark_rows;

/* Append `count` tokens. `logits` gets float32 rows of ark_vocabulary values: none, one or `count`; how tokens are cut
 * into calls does not change them. After ARK_CANCELLED the session is as it was. */
ARK_API ark_status ark_step(ark_session *session, const int32_t *tokens, size_t count, ark_rows rows, float *logits);

/* Forget every token from position `length` on. */
ARK_API ark_status ark_truncate(ark_session *session, int64_t length);

/* Make an independent copy; it takes time and memory in proportion to the session's length. */
ARK_API ark_status ark_fork(ark_session *session, ark_session **twin);

/* End the call on the session, if any: within one kernel once it computes; one that waits for another session's step
 * ends after that. From any thread. */
ARK_API void ark_cancel(ark_session *session);

/* How to choose a token from logits. temperature 0 (below 1e-30) or top_k 1 is greedy; top_k 0, top_p 0 and 1, min_p 0 change
 * nothing. Applied in this order: temperature, top_k, top_p, min_p. `ark_sampling greedy = {0};` */
typedef struct {
    double temperature; /* 0..100 */
    int32_t top_k;
    double top_p;       /* 0..1 */
    double min_p;       /* 0..1 */
    uint64_t seed;      /* the same seed and logits give the same tokens, here and in arkinfer's Python */
} ark_sampling;

/* Random numbers: those of numpy.random.default_rng(seed).random(dtype=float32). */
typedef struct {
    uint64_t state[4];
    uint32_t half, held;
} ark_random;

ARK_API void ark_seed(ark_random *random, uint64_t seed);
ARK_API float ark_random_next(ark_random *random); /* 0 <= x < 1 */

/* Choose a token from one row of `count` logits; `random` advances by one number unless the choice is greedy. */
ARK_API ark_status ark_sample(const float *logits, size_t count, const ark_sampling *sampling, ark_random *random,
                              int32_t *token);

/* Called with each new token, before the next is computed; anything but 0 ends the generation. */
typedef int32_t (*ark_sink)(void *context, int32_t token);

typedef struct {
    size_t limit;          /* most tokens to generate, at least 1 */
    ark_sampling sampling;
    const int32_t *stops;  /* ids that end the answer and are not part of it; NULL: ark_stops */
    size_t stop_count;
    ark_sink sink;         /* may be NULL */
    void *context;         /* passed to sink */
} ark_generation;

/* Append the `count` tokens of `prompt` and generate. `tokens` (NULL, or room for generation->limit) gets the answer,
 * *generated its length. The answer ends at a stop id, the limit, the sink's word, or a full session. The session then
 * holds the prompt and the answer but for its last token. After ARK_CANCELLED, *generated and the session say how far
 * it came. */
ARK_API ark_status ark_generate(ark_session *session, const int32_t *prompt, size_t count,
                                const ark_generation *generation, int32_t *tokens, size_t *generated);

#ifdef __cplusplus
}
#endif

#endif
