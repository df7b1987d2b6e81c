/* The threads of an engine, and the three functions of TVM's runtime that kernels call. */
#include <sched.h>
#include <stdlib.h>

#include "engine.h"

#define SPINS 4000  /* of a thread that waits for the next kernel before it sleeps: some ten microseconds */
#define BLOCKS 32   /* pieces of workspace that a thread has in use at a time, at most */

struct block {
    void *memory;
    uint64_t bytes;
    bool used;
};

struct worker {
    struct pool *pool;
    int32_t index;
    pthread_t thread;
    struct block blocks[BLOCKS];
};

struct pool {
    int32_t threads, started;
    struct worker *workers; /* the first is whichever thread entered */
    pthread_mutex_t mutex;
    pthread_cond_t begin, end;
    atomic_uint epoch;      /* counts launches */
    atomic_int pending;     /* workers that have not finished the launch */
    atomic_int asleep;      /* workers that wait for `begin` */
    atomic_bool awaited;    /* the launching thread waits for `end` */
    atomic_bool closing;
    atomic_int failed;
    atomic_bool starved;    /* a kernel got no workspace */
    bool nested;
    FTVMParallelLambda lambda;
    void *data;
};

/* Keys and not _Thread_local: see error.c. */
static pthread_key_t key;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void make_key(void) { pthread_key_create(&key, NULL); }

static void rest(void) {
#if defined(__x86_64__)
    __asm__ volatile("pause");
#elif defined(__aarch64__)
    __asm__ volatile("isb");
#endif
}

static void work(struct pool *pool, int32_t index) {
    TVMParallelGroupEnv environment = {NULL, pool->threads};
    if (pool->lambda(index, &environment, pool->data)) atomic_store(&pool->failed, 1);
}

static void await_epoch(struct pool *pool, unsigned seen) {
    for (int spin = 0; spin < SPINS; spin++) {
        if (atomic_load_explicit(&pool->epoch, memory_order_acquire) != seen) return;
        rest();
    }
    pthread_mutex_lock(&pool->mutex);
    atomic_fetch_add(&pool->asleep, 1);
    while (atomic_load(&pool->epoch) == seen) pthread_cond_wait(&pool->begin, &pool->mutex);
    atomic_fetch_sub(&pool->asleep, 1);
    pthread_mutex_unlock(&pool->mutex);
}

static void *run(void *argument) {
    struct worker *worker = argument;
    struct pool *pool = worker->pool;
    pthread_setspecific(key, worker);
    for (unsigned seen = 0;; seen++) {
        await_epoch(pool, seen);
        if (atomic_load(&pool->closing)) return NULL;
        work(pool, worker->index);
        if (atomic_fetch_sub(&pool->pending, 1) == 1 && atomic_load(&pool->awaited)) {
            pthread_mutex_lock(&pool->mutex);
            pthread_cond_signal(&pool->end);
            pthread_mutex_unlock(&pool->mutex);
        }
    }
}

static void next_epoch(struct pool *pool) {
    atomic_fetch_add(&pool->epoch, 1);
    if (atomic_load(&pool->asleep)) {
        pthread_mutex_lock(&pool->mutex);
        pthread_cond_broadcast(&pool->begin);
        pthread_mutex_unlock(&pool->mutex);
    }
}

static void await_workers(struct pool *pool) {
    for (int spin = 0; spin < SPINS; spin++) {
        if (!atomic_load_explicit(&pool->pending, memory_order_acquire)) return;
        rest();
    }
    pthread_mutex_lock(&pool->mutex);
    atomic_store(&pool->awaited, true);
    while (atomic_load(&pool->pending)) pthread_cond_wait(&pool->end, &pool->mutex);
    atomic_store(&pool->awaited, false);
    pthread_mutex_unlock(&pool->mutex);
}

int TVMBackendParallelLaunch(FTVMParallelLambda lambda, void *data, int tasks) {
    struct worker *worker = pthread_getspecific(key);
    (void)tasks; /* kernels ask for as many as there are threads */
    if (!worker || worker->index || worker->pool->nested || worker->pool->threads == 1) {
        TVMParallelGroupEnv alone = {NULL, 1};
        return lambda(0, &alone, data);
    }
    struct pool *pool = worker->pool;
    pool->lambda = lambda;
    pool->data = data;
    pool->nested = true;
    atomic_store(&pool->failed, 0);
    atomic_store(&pool->pending, pool->threads - 1);
    next_epoch(pool);
    work(pool, 0);
    await_workers(pool);
    pool->nested = false;
    return atomic_load(&pool->failed) ? -1 : 0;
}

static void *starve(struct pool *pool) {
    atomic_store(&pool->starved, true);
    return NULL;
}

bool pool_starved(struct pool *pool) { return atomic_exchange(&pool->starved, false); }

void *TVMBackendAllocWorkspace(int device_type, int device_id, uint64_t bytes, int code, int bits) {
    struct worker *worker = pthread_getspecific(key);
    (void)device_type, (void)device_id, (void)code, (void)bits;
    if (!worker) return NULL;
    struct block *free_block = NULL;
    for (struct block *block = worker->blocks; block < worker->blocks + BLOCKS; block++) {
        if (block->used) continue;
        if (block->memory && block->bytes >= bytes) {
            block->used = true;
            return block->memory;
        }
        if (!free_block || !block->memory) free_block = block;
    }
    if (!free_block || bytes > SIZE_MAX / 2) return starve(worker->pool);
    free(free_block->memory);
    *free_block = (struct block){0};
    /* Some more than asked for: a context that grows would ask for a little more at each step. */
    uint64_t size = (bytes + bytes / 4 + ALIGNMENT) / ALIGNMENT * ALIGNMENT;
    if (posix_memalign(&free_block->memory, ALIGNMENT, (size_t)size)) {
        free_block->memory = NULL;
        return starve(worker->pool);
    }
    free_block->bytes = size;
    free_block->used = true;
    return free_block->memory;
}

int TVMBackendFreeWorkspace(int device_type, int device_id, void *memory) {
    struct worker *worker = pthread_getspecific(key);
    (void)device_type, (void)device_id;
    for (int index = 0; worker && index < BLOCKS; index++)
        if (worker->blocks[index].memory == memory) {
            worker->blocks[index].used = false;
            return 0;
        }
    return -1;
}

struct worker *pool_enter(struct pool *pool) {
    struct worker *before = pthread_getspecific(key);
    pthread_setspecific(key, &pool->workers[0]);
    return before;
}

void pool_leave(struct worker *before) { pthread_setspecific(key, before); }

ark_status pool_open(int32_t threads, struct pool **result) {
    pthread_once(&once, make_key);
    struct pool *pool = calloc(1, sizeof *pool);
    struct worker *workers = calloc((size_t)threads, sizeof *workers);
    if (!pool || !workers) {
        free(pool);
        free(workers);
        return no_memory("its threads", (uint64_t)threads * sizeof *workers);
    }
    pool->threads = threads;
    pool->workers = workers;
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->begin, NULL);
    pthread_cond_init(&pool->end, NULL);
    workers[0] = (struct worker){.pool = pool};
    for (int32_t index = 1; index < threads; index++) {
        workers[index] = (struct worker){.pool = pool, .index = index};
        if (pthread_create(&workers[index].thread, NULL, run, &workers[index])) {
            pool_close(pool);
            return fail(ARK_MEMORY, "the system gives no %d threads; ask for fewer", threads);
        }
        pool->started++;
    }
    *result = pool;
    return ARK_OK;
}

void pool_close(struct pool *pool) {
    if (!pool) return;
    atomic_store(&pool->closing, true);
    next_epoch(pool);
    for (int32_t index = 1; index <= pool->started; index++) pthread_join(pool->workers[index].thread, NULL);
    for (int32_t index = 0; index < pool->threads; index++)
        for (int block = 0; block < BLOCKS; block++) free(pool->workers[index].blocks[block].memory);
    pthread_mutex_destroy(&pool->mutex);
    pthread_cond_destroy(&pool->begin);
    pthread_cond_destroy(&pool->end);
    free(pool->workers);
    free(pool);
}
