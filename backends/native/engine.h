/* What the files of the runner share. Nothing here is visible to an application. */
#ifndef ARKINFER_ENGINE_H
#define ARKINFER_ENGINE_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "arkinfer.h"
#include "json.h"
#include "tvm.h"

#define ALIGNMENT 64      /* of every tensor: what the kernels were compiled for */
#define MAX_AXES 8
#define MAX_ARGUMENTS 32
#define MAX_THREADS 64
#define MAX_LEVELS 8
#define MAX_CACHES 16
#define MAX_PATH 4096
#define FORMAT 1          /* of payload/native.json */
#define NEVER ((int64_t)1 << 62) /* a dense_len that no position reaches */

/* error.c */
ark_status fail(ark_status status, const char *format, ...) __attribute__((format(printf, 2, 3)));
void forget_error(void);
ark_status no_memory(const char *what, uint64_t bytes);

/* sha256.c */
struct sha256 {
    uint32_t state[8];
    uint64_t size;
    uint8_t block[64];
};
void sha256_begin(struct sha256 *hash);
void sha256_add(struct sha256 *hash, const void *data, size_t size);
void sha256_end(struct sha256 *hash, char text[65]);

/* file.c */
struct file {
    const uint8_t *data; /* mapped, read only */
    size_t size;
};
ark_status file_map(const char *folder, const char *name, struct file *file);
void file_unmap(struct file *file);
bool join(char path[MAX_PATH], const char *folder, const char *name);

/* artifact.c */
struct artifact {
    char folder[MAX_PATH];
    struct file manifest_file;
    struct json manifest;
    uint32_t files;     /* its object of that name */
    int32_t attention;  /* ark_attention that it was built for */
    int32_t *stops;
    size_t stop_count;
};
ark_status artifact_open(struct artifact *artifact, const char *path);
ark_status artifact_map(const struct artifact *artifact, const char *name, bool digest, struct file *file);
void artifact_close(struct artifact *artifact);

/* program.c: a symbolic extent is negative */
enum { EXTENT_TOKENS = -1, EXTENT_ROWS = -2, EXTENT_GROWS = -3 };
enum { VALUE_TOKENS, VALUE_ROTATION, VALUE_ROWS, FIRST_CACHE };
enum { SCALAR_POSITION, SCALAR_DENSE_LENGTH, SCALARS };
struct value {
    DLTensor tensor;
    int64_t shape[MAX_AXES];   /* as it is now: tensor.shape points here */
    int64_t extents[MAX_AXES]; /* as declared */
    int32_t alias;             /* the value whose memory this one reads, or -1 */
    bool symbolic;             /* some extent depends on tokens or rows */
};
struct call {
    uint32_t kernel, first, count; /* arguments first..first+count-1 */
};
struct scalar_use {
    uint32_t argument, scalar;
};
struct cache {
    int32_t value, axis;
    int64_t stride, pack;
};
struct level {
    char name[64], library[128];
    uint32_t many, one; /* nodes of the lists of symbols in the description */
};
struct program {
    struct file file;
    struct json json;
    int64_t context, dense_length, block; /* dense_length NEVER: no sparse attention */
    int32_t vocabulary, head_dim, result;
    float *frequencies, magnitude;
    char weights[128];
    uint32_t value_count, call_count, argument_count, kernel_count, use_count, cache_count, level_count;
    struct value *values;
    struct call *calls;
    TVMFFIAny *arguments;
    struct scalar_use *uses;
    struct cache caches[MAX_CACHES];
    struct level levels[MAX_LEVELS];
    uint64_t *offsets; /* of each value in the weight file, or UINT64_MAX */
};
ark_status program_read(struct program *program, const struct artifact *artifact);
void program_free(struct program *program);
bool value_bytes(const struct value *value, int64_t tokens, int64_t rows, uint64_t *bytes);

/* arena.c */
ark_status arena_place(struct program *program, int64_t tokens, int64_t rows, uint64_t *places, uint64_t *size);

/* level.c */
bool level_runs(const char *name);
const char *level_names(void); /* those of this processor, for messages */
int32_t processors(void);

/* pool.c */
struct pool;
struct worker;
ark_status pool_open(int32_t threads, struct pool **pool);
void pool_close(struct pool *pool);
struct worker *pool_enter(struct pool *pool); /* the calling thread works for the pool from here */
void pool_leave(struct worker *before);
bool pool_starved(struct pool *pool); /* whether a kernel got no workspace since this was last asked */

/* library.c */
struct library {
    void *handle;
    TVMFFISafeCallType *many, *one; /* by kernel; NULL where a form does not need it */
};
ark_status library_open(struct library *library, const struct program *program, const struct level *level,
                        const struct artifact *artifact, const char *folder);
void library_close(struct library *library);

/* rotation.c */
void rotation_fill(const struct program *program, int64_t position, int64_t count, float *table);

/* memory.c */
void *pages_take(uint64_t bytes); /* zeroed, aligned, committed when touched; NULL if there is none */
void pages_give(void *pages, uint64_t bytes);

/* engine.c */
struct ark_engine {
    struct artifact artifact;
    struct program program;
    struct library library;
    struct pool *pool;
    struct file weights;
    const struct level *level;
    void *arena;
    uint64_t arena_size;
    int64_t chunk, rows, dense_length;
    int64_t shaped_tokens, shaped_rows; /* what the shapes of the values are set for */
    int32_t threads;
    pthread_mutex_t lock; /* one step at a time */
    atomic_int users;     /* the application and each session */
};
void engine_release(ark_engine *engine);

/* session.c */
enum { SESSION_IDLE, SESSION_AT_WORK, SESSION_CANCELLED };
struct ark_session {
    ark_engine *engine;
    int64_t length, capacity, room; /* room: the capacity in whole blocks, which the caches are made for */
    void *caches[MAX_CACHES];
    uint64_t bytes[MAX_CACHES];
    atomic_int work;
};
ark_status session_begin(ark_session *session);
void session_end(ark_session *session);
ark_status session_append(ark_session *session, const int32_t *tokens, size_t count, ark_rows rows, float *logits);
int64_t cache_extent(const struct cache *cache, int64_t capacity);

/* step.c */
ark_status engine_step(ark_engine *engine, ark_session *session, const int32_t *tokens, int64_t count, ark_rows rows,
                       float *logits);

#endif
