#include <string.h>

#include "engine.h"

static void set_shapes(ark_engine *engine, int64_t tokens, int64_t rows) {
    if (engine->shaped_tokens == tokens && engine->shaped_rows == rows) return;
    struct program *program = &engine->program;
    for (uint32_t index = 0; index < program->value_count; index++) {
        struct value *value = &program->values[index];
        for (int axis = 0; value->symbolic && axis < value->tensor.ndim; axis++) {
            if (value->extents[axis] == EXTENT_TOKENS) value->shape[axis] = tokens;
            if (value->extents[axis] == EXTENT_ROWS) value->shape[axis] = rows;
        }
    }
    engine->shaped_tokens = tokens;
    engine->shaped_rows = rows;
}

static void set_caches(struct program *program, const ark_session *session) {
    for (uint32_t index = 0; index < program->cache_count; index++) {
        const struct cache *cache = &program->caches[index];
        struct value *value = &program->values[cache->value];
        value->tensor.data = session->caches[index];
        value->shape[cache->axis] = cache_extent(cache, session->room);
    }
}

static ark_status call_all(ark_engine *engine, ark_session *session, const TVMFFISafeCallType *kernels) {
    const struct program *program = &engine->program;
    forget_error();
    for (uint32_t index = 0; index < program->call_count; index++) {
        const struct call *call = &program->calls[index];
        if (atomic_load_explicit(&session->work, memory_order_relaxed) == SESSION_CANCELLED)
            return fail(ARK_CANCELLED, "the call was cancelled");
        TVMFFIAny result = {.type_index = ANY_NONE};
        if (!kernels[call->kernel](NULL, program->arguments + call->first, (int32_t)call->count, &result)) continue;
        if (pool_starved(engine->pool))
            return fail(ARK_MEMORY, "a kernel got no memory for its workspace; take a smaller chunk");
        if (*ark_error()) return ARK_INTERNAL; /* the kernel has said what it refused */
        return fail(ARK_INTERNAL, "a kernel refused its arguments (why, TVM's runtime in this process was told)");
    }
    return ARK_OK;
}

/* One run of the program: `count` is at most engine->chunk, and at most engine->rows where all rows are wanted. */
ark_status engine_step(ark_engine *engine, ark_session *session, const int32_t *tokens, int64_t count, ark_rows rows,
                       float *logits) {
    struct program *program = &engine->program;
    int64_t wanted = rows == ARK_ROWS_ALL ? count : rows == ARK_ROWS_LAST;
    pthread_mutex_lock(&engine->lock);
    struct worker *before = pool_enter(engine->pool);
    set_shapes(engine, count, wanted);
    set_caches(program, session);
    int64_t scalars[SCALARS] = {[SCALAR_POSITION] = session->length, [SCALAR_DENSE_LENGTH] = engine->dense_length};
    for (uint32_t index = 0; index < program->use_count; index++)
        program->arguments[program->uses[index].argument].v_int64 = scalars[program->uses[index].scalar];
    memcpy(program->values[VALUE_TOKENS].tensor.data, tokens, (size_t)count * sizeof *tokens);
    rotation_fill(program, session->length, count, program->values[VALUE_ROTATION].tensor.data);
    int32_t *places = program->values[VALUE_ROWS].tensor.data;
    for (int64_t row = 0; row < wanted; row++) places[row] = (int32_t)(count - wanted + row);
    /* The kernels of the second form are made for one token and one row. */
    bool one = count == 1 && wanted == 1;
    ark_status status = call_all(engine, session, one ? engine->library.one : engine->library.many);
    if (!status && wanted)
        memcpy(logits, program->values[program->result].tensor.data,
               (size_t)wanted * (size_t)program->vocabulary * sizeof *logits);
    pool_leave(before);
    pthread_mutex_unlock(&engine->lock);
    return status;
}
