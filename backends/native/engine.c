#include <stdlib.h>

#include "engine.h"

#define CHUNK 128
#define MAX_CHUNK 4096
#define LOGITS ((int64_t)1 << 20) /* logits that a step computes at a time, at most, if it wants those of each token */

static ark_status check_options(const ark_options *options) {
    if (options->threads < 0 || options->threads > MAX_THREADS)
        return fail(ARK_ARGUMENT, "threads is 0 to %d, not %d", MAX_THREADS, options->threads);
    if (options->chunk < 0 || options->chunk > MAX_CHUNK)
        return fail(ARK_ARGUMENT, "chunk is 0 to %d, not %d", MAX_CHUNK, options->chunk);
    if ((int)options->attention < ARK_ATTENTION_BUILT || options->attention > ARK_ATTENTION_SPARSE)
        return fail(ARK_ARGUMENT, "attention is one of enum ark_attention, not %d", (int)options->attention);
    return ARK_OK;
}

static ark_status choose_gear(ark_engine *engine, ark_attention attention) {
    int64_t length = engine->program.dense_length;
    if (attention == ARK_ATTENTION_BUILT) attention = (ark_attention)engine->artifact.attention;
    if (attention == ARK_ATTENTION_SPARSE && length == NEVER)
        return fail(ARK_UNSUPPORTED, "this artifact has no sparse attention: its model has none, or it was built dense");
    engine->dense_length = attention == ARK_ATTENTION_DENSE || length == NEVER     ? NEVER
                           : attention == ARK_ATTENTION_SPARSE || length < 0 ? 0
                                                                             : length;
    return ARK_OK;
}

static ark_status choose_level(ark_engine *engine) {
    const struct program *program = &engine->program;
    for (uint32_t index = 0; index < program->level_count && !engine->level; index++)
        if (level_runs(program->levels[index].name)) engine->level = &program->levels[index];
    if (engine->level) return ARK_OK;
    return fail(ARK_UNSUPPORTED, "the artifact holds code for %s%s%s and this processor runs %s: build for its target",
                program->levels[0].name, program->level_count > 1 ? ", " : "",
                program->level_count > 1 ? program->levels[1].name : "", level_names());
}

static ark_status map_weights(ark_engine *engine, bool check) {
    struct program *program = &engine->program;
    ark_status status = artifact_map(&engine->artifact, program->weights, check, &engine->weights);
    for (uint32_t index = 0; index < program->value_count && !status; index++) {
        uint64_t bytes, offset = program->offsets[index];
        if (offset == UINT64_MAX) continue;
        if (!value_bytes(&program->values[index], 1, 1, &bytes) || offset > engine->weights.size ||
            bytes > engine->weights.size - offset)
            return fail(ARK_DAMAGED, "payload/native.json is not sound (a weight past the end); build the artifact again");
        program->values[index].tensor.data = (void *)(engine->weights.data + offset);
    }
    return status;
}

static ark_status reserve(ark_engine *engine, int32_t chunk) {
    struct program *program = &engine->program;
    engine->chunk = chunk ? chunk : CHUNK;
    engine->rows = LOGITS / program->vocabulary;
    if (engine->rows < 1) engine->rows = 1;
    if (engine->rows > engine->chunk) engine->rows = engine->chunk;
    uint64_t *places = calloc(program->value_count, sizeof *places);
    if (!places) return no_memory("the plan of its scratch memory", program->value_count * sizeof *places);
    ark_status status = arena_place(program, engine->chunk, engine->rows, places, &engine->arena_size);
    if (!status && !(engine->arena = pages_take(engine->arena_size)))
        status = no_memory("its scratch memory", engine->arena_size);
    for (uint32_t index = 0; index < program->value_count && !status; index++) {
        bool cache = index >= FIRST_CACHE && index < FIRST_CACHE + program->cache_count;
        if (!cache && program->offsets[index] == UINT64_MAX)
            program->values[index].tensor.data = (char *)engine->arena + places[index];
    }
    free(places);
    return status;
}

static ark_status open_all(ark_engine *engine, const char *path, const ark_options *options) {
    ark_status status = check_options(options);
    if (!status) status = artifact_open(&engine->artifact, path);
    if (!status) status = program_read(&engine->program, &engine->artifact);
    if (!status) status = choose_gear(engine, options->attention);
    if (!status) status = choose_level(engine);
    if (!status) status = map_weights(engine, options->check);
    if (!status)
        status = library_open(&engine->library, &engine->program, engine->level, &engine->artifact, options->libraries);
    if (!status) status = reserve(engine, options->chunk);
    engine->threads = options->threads ? options->threads : processors();
    if (engine->threads > MAX_THREADS) engine->threads = MAX_THREADS;
    if (!status) status = pool_open(engine->threads, &engine->pool);
    return status;
}

ark_status ark_open(const char *path, const ark_options *options, ark_engine **result) {
    static const ark_options defaults = {0};
    if (!path || !result) return fail(ARK_ARGUMENT, "ark_open needs a path and a place for the engine");
    *result = NULL;
    ark_engine *engine = calloc(1, sizeof *engine);
    if (!engine) return no_memory("an engine", sizeof *engine);
    pthread_mutex_init(&engine->lock, NULL);
    atomic_init(&engine->users, 1);
    engine->shaped_tokens = -1;
    ark_status status = open_all(engine, path, options ? options : &defaults);
    if (status)
        engine_release(engine);
    else
        *result = engine;
    return status;
}

void engine_release(ark_engine *engine) {
    if (atomic_fetch_sub(&engine->users, 1) > 1) return;
    pool_close(engine->pool);
    library_close(&engine->library);
    pages_give(engine->arena, engine->arena_size);
    file_unmap(&engine->weights);
    program_free(&engine->program);
    artifact_close(&engine->artifact);
    pthread_mutex_destroy(&engine->lock);
    free(engine);
}

void ark_close(ark_engine *engine) {
    if (engine) engine_release(engine);
}

int32_t ark_vocabulary(const ark_engine *engine) { return engine->program.vocabulary; }
int64_t ark_context(const ark_engine *engine) { return engine->program.context; }
int32_t ark_threads(const ark_engine *engine) { return engine->threads; }
const char *ark_level(const ark_engine *engine) { return engine->level->name; }
size_t ark_scratch(const ark_engine *engine) { return (size_t)engine->arena_size; }

const int32_t *ark_stops(const ark_engine *engine, size_t *count) {
    *count = engine->artifact.stop_count;
    return engine->artifact.stops;
}
