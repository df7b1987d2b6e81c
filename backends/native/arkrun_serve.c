/* Sessions for another process, over its pipes: `arkrun ARTIFACT --serve`.
 *
 * A request is four int64 (what, session, a, b) and, for STEP, `a` int32 token ids. A reply is two int64, an ark_status
 * and a number of bytes, and those bytes: the result, or the text of the error. All in the machine's byte order. The
 * first reply, to no request, is that of opening the artifact: four int64 (ARK_INTERFACE, vocabulary, context, threads)
 * and the name of the level. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "arkrun.h"
#include "engine.h"

#define MAX_SESSIONS 256

enum { OPEN = 1, CLOSE = 2, STEP = 3, TRUNCATE = 4, FORK = 5 }; /* OPEN and FORK answer (session, capacity, length) */

struct server {
    ark_engine *engine;
    ark_session *sessions[MAX_SESSIONS];
};

static void reply(ark_status status, const void *data, size_t size) {
    int64_t head[2] = {status, 0};
    if (status) {
        data = ark_error();
        size = strlen(data);
    }
    head[1] = (int64_t)size;
    fwrite(head, sizeof head, 1, stdout);
    fwrite(data, 1, size, stdout);
    fflush(stdout);
}

static void answer_session(struct server *server, ark_status status, int64_t place) {
    int64_t facts[3] = {place, 0, 0};
    if (!status) {
        facts[1] = ark_capacity(server->sessions[place]);
        facts[2] = ark_length(server->sessions[place]);
    }
    reply(status, facts, sizeof facts);
}

static int64_t free_place(const struct server *server) {
    for (int64_t place = 0; place < MAX_SESSIONS; place++)
        if (!server->sessions[place]) return place;
    return -1;
}

/* Return false for what is no step, and when the tokens do not arrive. */
static int step(struct server *server, ark_session *session, int64_t count, int64_t rows) {
    if (rows < ARK_ROWS_NONE || rows > ARK_ROWS_ALL) return 0;
    size_t row = (size_t)ark_vocabulary(server->engine) * sizeof(float);
    size_t size = rows == ARK_ROWS_ALL ? (size_t)count * row : rows == ARK_ROWS_LAST ? row : 0;
    int32_t *tokens = malloc((size_t)count * sizeof *tokens + 1);
    float *logits = malloc(size + 1);
    int sound = tokens && logits && fread(tokens, sizeof *tokens, (size_t)count, stdin) == (size_t)count;
    if (sound) reply(ark_step(session, tokens, (size_t)count, (ark_rows)rows, logits), logits, size);
    free(tokens);
    free(logits);
    return sound;
}

static int handle(struct server *server, const int64_t request[4]) {
    int64_t place = request[1];
    ark_session *session = place >= 0 && place < MAX_SESSIONS ? server->sessions[place] : NULL;
    int64_t fresh = free_place(server);
    if ((request[0] != OPEN && !session) || request[2] < 0 || request[2] > ark_context(server->engine)) return 0;
    if (fresh < 0 && (request[0] == OPEN || request[0] == FORK)) {
        reply(fail(ARK_MEMORY, "%d sessions are open, which is the most; close one", MAX_SESSIONS), "", 0);
        return 1;
    }
    switch (request[0]) {
        case OPEN:
            answer_session(server, ark_session_open(server->engine, request[2], &server->sessions[fresh]), fresh);
            return 1;
        case CLOSE:
            ark_session_close(session);
            server->sessions[place] = NULL;
            reply(ARK_OK, "", 0);
            return 1;
        case STEP: return step(server, session, request[2], request[3]);
        case TRUNCATE: reply(ark_truncate(session, request[2]), "", 0); return 1;
        case FORK: answer_session(server, ark_fork(session, &server->sessions[fresh]), fresh); return 1;
        default: return 0;
    }
}

int serve(const char *path, const ark_options *options) {
    struct server server = {0};
    ark_status status = ark_open(path, options, &server.engine);
    char facts[4 * sizeof(int64_t) + 64];
    size_t size = 0;
    if (!status) {
        const ark_engine *engine = server.engine;
        int64_t numbers[4] = {ARK_INTERFACE, ark_vocabulary(engine), ark_context(engine), ark_threads(engine)};
        size_t length = strlen(ark_level(engine));
        memcpy(facts, numbers, sizeof numbers);
        memcpy(facts + sizeof numbers, ark_level(engine), length);
        size = sizeof numbers + length;
    }
    reply(status, facts, size);
    int64_t request[4];
    int sound = !status;
    while (sound && fread(request, sizeof request, 1, stdin) == 1) sound = handle(&server, request);
    for (int place = 0; place < MAX_SESSIONS; place++) ark_session_close(server.sessions[place]);
    ark_close(server.engine);
    return sound ? 0 : 1;
}
