#include <stdlib.h>
#include <string.h>

#include "engine.h"

static int64_t over(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

int64_t cache_extent(const struct cache *cache, int64_t capacity) {
    int64_t extent = over(capacity / cache->stride, cache->pack);
    return extent > 1 ? extent : 1;
}

static bool cache_bytes(const struct program *program, const struct cache *cache, int64_t capacity, uint64_t *bytes) {
    return value_bytes(&program->values[cache->value], 1, 1, bytes) &&
           !__builtin_mul_overflow(*bytes, (uint64_t)cache_extent(cache, capacity), bytes);
}

ark_status ark_session_open(ark_engine *engine, int64_t capacity, ark_session **result) {
    if (!engine || !result || capacity < 0)
        return fail(ARK_ARGUMENT, "ark_session_open needs an engine, a capacity from 0 and a place for the session");
    *result = NULL;
    const struct program *program = &engine->program;
    if (!capacity || capacity > program->context) capacity = program->context;
    ark_session *session = calloc(1, sizeof *session);
    if (!session) return no_memory("a session", sizeof *session);
    session->engine = engine;
    session->room = over(capacity, program->block) * program->block;
    session->capacity = session->room < program->context ? session->room : program->context;
    atomic_init(&session->work, SESSION_IDLE);
    atomic_fetch_add(&engine->users, 1);
    for (uint32_t index = 0; index < program->cache_count; index++) {
        uint64_t bytes;
        if (!cache_bytes(program, &program->caches[index], session->room, &bytes) ||
            !(session->caches[index] = pages_take(bytes))) {
            ark_session_close(session);
            return no_memory("a session's caches", bytes);
        }
        session->bytes[index] = bytes;
    }
    *result = session;
    return ARK_OK;
}

void ark_session_close(ark_session *session) {
    if (!session) return;
    for (int index = 0; index < MAX_CACHES; index++) pages_give(session->caches[index], session->bytes[index]);
    engine_release(session->engine);
    free(session);
}

int64_t ark_length(const ark_session *session) { return session->length; }
int64_t ark_capacity(const ark_session *session) { return session->capacity; }

size_t ark_session_bytes(const ark_session *session) {
    uint64_t sum = 0;
    for (int index = 0; index < MAX_CACHES; index++) sum += session->bytes[index];
    return (size_t)sum;
}

ark_status session_begin(ark_session *session) {
    int expected = SESSION_IDLE;
    if (!session) return fail(ARK_ARGUMENT, "there is no session");
    if (!atomic_compare_exchange_strong(&session->work, &expected, SESSION_AT_WORK))
        return fail(ARK_BUSY, "another call is at work on this session; wait for it, or use one session per thread");
    return ARK_OK;
}

void session_end(ark_session *session) { atomic_store(&session->work, SESSION_IDLE); }

void ark_cancel(ark_session *session) {
    int expected = SESSION_AT_WORK;
    if (session) atomic_compare_exchange_strong(&session->work, &expected, SESSION_CANCELLED);
}

ark_status session_append(ark_session *session, const int32_t *tokens, size_t count, ark_rows rows, float *logits) {
    ark_engine *engine = session->engine;
    int32_t vocabulary = engine->program.vocabulary;
    if (!count || !tokens) return fail(ARK_TOKEN, "a step needs at least one token");
    if (rows != ARK_ROWS_NONE && !logits) return fail(ARK_ARGUMENT, "there is no room for the logits");
    for (size_t index = 0; index < count; index++)
        if (tokens[index] < 0 || tokens[index] >= vocabulary)
            return fail(ARK_TOKEN, "token %llu is %d, outside the vocabulary of %d", (unsigned long long)index,
                        tokens[index], vocabulary);
    if (count > (uint64_t)(session->capacity - session->length))
        return fail(ARK_FULL, "the context is full: it holds %lld tokens, %llu are new and %lld fit; truncate the session",
                    (long long)session->length, (unsigned long long)count, (long long)session->capacity);
    int64_t before = session->length, most = rows == ARK_ROWS_ALL ? engine->rows : engine->chunk;
    for (size_t start = 0; start < count;) {
        int64_t part = (int64_t)(count - start) < most ? (int64_t)(count - start) : most;
        bool last = start + (size_t)part == count;
        ark_rows wanted = rows == ARK_ROWS_LAST && !last ? ARK_ROWS_NONE : rows;
        float *place = rows == ARK_ROWS_ALL ? logits + start * (size_t)vocabulary : logits;
        ark_status status = engine_step(engine, session, tokens + start, part, wanted, place);
        if (status) {
            session->length = before; /* what the caches hold beyond is overwritten by later steps */
            return status;
        }
        session->length += part;
        start += (size_t)part;
    }
    return ARK_OK;
}

ark_status ark_step(ark_session *session, const int32_t *tokens, size_t count, ark_rows rows, float *logits) {
    if ((int)rows < ARK_ROWS_NONE || rows > ARK_ROWS_ALL) return fail(ARK_ARGUMENT, "rows is one of enum ark_rows");
    ark_status status = session_begin(session);
    if (status) return status;
    status = session_append(session, tokens, count, rows, logits);
    session_end(session);
    return status;
}

ark_status ark_truncate(ark_session *session, int64_t length) {
    ark_status status = session_begin(session);
    if (status) return status;
    if (length < 0 || length > session->length)
        status = fail(ARK_ARGUMENT, "cannot cut a context of %lld tokens to %lld", (long long)session->length,
                      (long long)length);
    else
        session->length = length;
    session_end(session);
    return status;
}

/* Copy what `length` tokens have filled; the rest would only take memory that is not in use. */
static void copy_cache(const struct program *program, uint32_t index, const ark_session *from, ark_session *to) {
    const struct cache *cache = &program->caches[index];
    const struct value *value = &program->values[cache->value];
    size_t outer = 1, inner = value->tensor.dtype.bits / 8;
    for (int axis = 0; axis < cache->axis; axis++) outer *= (size_t)value->extents[axis];
    for (int axis = cache->axis + 1; axis < value->tensor.ndim; axis++) inner *= (size_t)value->extents[axis];
    size_t row = inner * (size_t)cache_extent(cache, from->room);
    size_t used = inner * (size_t)over(from->length, cache->stride * cache->pack);
    for (size_t place = 0; place < outer; place++)
        memcpy((char *)to->caches[index] + place * row, (char *)from->caches[index] + place * row, used < row ? used : row);
}

ark_status ark_fork(ark_session *session, ark_session **twin) {
    if (!twin) return fail(ARK_ARGUMENT, "there is no place for the copy");
    ark_status status = session_begin(session);
    if (status) return status;
    status = ark_session_open(session->engine, session->capacity, twin);
    if (!status) {
        for (uint32_t index = 0; index < session->engine->program.cache_count; index++)
            copy_cache(&session->engine->program, index, session, *twin);
        (*twin)->length = session->length;
    }
    session_end(session);
    return status;
}
