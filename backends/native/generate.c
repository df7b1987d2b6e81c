#include <stdlib.h>

#include "engine.h"

static bool among(const int32_t *stops, size_t count, int32_t token) {
    for (size_t index = 0; index < count; index++)
        if (stops[index] == token) return true;
    return false;
}

static ark_status generate(ark_session *session, const ark_generation *generation, float *logits, int32_t *tokens,
                           size_t *generated) {
    const ark_engine *engine = session->engine;
    const int32_t *stops = generation->stops ? generation->stops : engine->artifact.stops;
    size_t stop_count = generation->stops ? generation->stop_count : engine->artifact.stop_count;
    ark_random random;
    ark_seed(&random, generation->sampling.seed);
    for (;;) {
        int32_t token;
        ark_status status = ark_sample(logits, (size_t)engine->program.vocabulary, &generation->sampling, &random, &token);
        if (status) return status;
        if (among(stops, stop_count, token)) return ARK_OK;
        if (tokens) tokens[*generated] = token;
        ++*generated;
        if (generation->sink && generation->sink(generation->context, token)) return ARK_OK;
        if (*generated >= generation->limit || session->length >= session->capacity) return ARK_OK;
        status = session_append(session, &token, 1, ARK_ROWS_LAST, logits);
        if (status) return status;
    }
}

ark_status ark_generate(ark_session *session, const int32_t *prompt, size_t count, const ark_generation *generation,
                        int32_t *tokens, size_t *generated) {
    if (!generation || !generated || generation->limit < 1)
        return fail(ARK_ARGUMENT, "ark_generate needs a limit of at least 1 and a place for the number of tokens");
    *generated = 0;
    ark_status status = session_begin(session);
    if (status) return status;
    size_t bytes = (size_t)session->engine->program.vocabulary * sizeof(float);
    float *logits = malloc(bytes);
    status = logits ? session_append(session, prompt, count, ARK_ROWS_LAST, logits) : no_memory("logits", bytes);
    if (!status) status = generate(session, generation, logits, tokens, generated);
    free(logits);
    session_end(session);
    return status;
}
