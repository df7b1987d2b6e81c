/* The runner as a command: token ids in, token ids out. */
#include "arkrun.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char usage[] =
    "usage: arkrun ARTIFACT [OPTION]...\n"
    "Generate from token ids, on standard input or by --tokens, and print the ids of the answer.\n"
    "  --tokens 1,2,3     the prompt\n"
    "  --max-tokens N     length of the answer, at most (default 128)\n"
    "  --temperature T    0: the likeliest token (default 0)\n"
    "  --top-k K, --top-p P, --min-p P, --seed N\n"
    "  --threads N        default: all processors\n"
    "  --attention A      built, auto, dense or sparse\n"
    "  --chunk N          tokens computed at a time (default 128)\n"
    "  --check            compare all files with their digests first\n"
    "  --libraries DIR    where compiled code is, if not in the artifact\n"
    "  --serve            serve sessions on standard input and output\n";

struct request {
    const char *path, *tokens;
    ark_options options;
    ark_generation generation;
    int serve;
};

static int wrong(const char *what, const char *value) {
    fprintf(stderr, "arkrun: %s: %s\n%s", what, value, usage);
    return 2;
}

static int whole(const char *text, int64_t least, int64_t most, int64_t *value) {
    char *end;
    if (*text < '0' || *text > '9') return 0;
    *value = strtoll(text, &end, 10);
    return !*end && *value >= least && *value <= most;
}

static int real(const char *text, double *value) {
    char *end;
    *value = strtod(text, &end);
    return end != text && !*end;
}

static int take(struct request *request, const char *name, const char *value) {
    static const char *const gears[] = {"built", "auto", "dense", "sparse"};
    ark_sampling *sampling = &request->generation.sampling;
    int64_t number = 0;
    if (!strcmp(name, "--tokens")) request->tokens = value;
    else if (!strcmp(name, "--libraries")) request->options.libraries = value;
    else if (!strcmp(name, "--temperature")) return real(value, &sampling->temperature);
    else if (!strcmp(name, "--top-p")) return real(value, &sampling->top_p);
    else if (!strcmp(name, "--min-p")) return real(value, &sampling->min_p);
    else if (!strcmp(name, "--attention")) {
        for (int gear = 0; gear < 4; gear++)
            if (!strcmp(value, gears[gear])) {
                request->options.attention = (ark_attention)gear;
                return 1;
            }
        return 0;
    } else if (!strcmp(name, "--seed")) {
        if (!whole(value, 0, INT64_MAX, &number)) return 0;
        sampling->seed = (uint64_t)number;
    } else {
        if (!whole(value, 0, 1 << 30, &number)) return 0;
        if (!strcmp(name, "--max-tokens")) request->generation.limit = (size_t)number;
        else if (!strcmp(name, "--top-k")) sampling->top_k = (int32_t)number;
        else if (!strcmp(name, "--threads")) request->options.threads = (int32_t)number;
        else if (!strcmp(name, "--chunk")) request->options.chunk = (int32_t)number;
        else return -1;
    }
    return 1;
}

/* Read ids divided by commas or blanks from `text`, or from standard input where it is NULL; NULL if one is none. */
static int32_t *read_tokens(const char *text, size_t *count) {
    size_t room = 256, digits = 0;
    int32_t *tokens = malloc(room * sizeof *tokens);
    int64_t sum = 0;
    *count = 0;
    for (int c = 0; tokens && c != EOF;) {
        c = text ? (*text ? (unsigned char)*text++ : EOF) : getchar();
        if (c >= '0' && c <= '9' && digits < 10) {
            sum = 10 * sum + (c - '0');
            digits++;
            continue;
        }
        if (c != EOF && c != ',' && c != ' ' && c != '\n' && c != '\r' && c != '\t') {
            free(tokens);
            return NULL;
        }
        if (!digits) continue;
        if (*count == room) {
            int32_t *more = realloc(tokens, (room *= 2) * sizeof *tokens);
            if (!more) free(tokens);
            tokens = more;
        }
        if (tokens) tokens[(*count)++] = sum > INT32_MAX ? -1 : (int32_t)sum;
        digits = 0;
        sum = 0;
    }
    return tokens;
}

static int32_t print(void *context, int32_t token) {
    int *first = context;
    printf(*first ? "%d" : " %d", token);
    fflush(stdout);
    *first = 0;
    return 0;
}

static int generate(const struct request *request, const int32_t *tokens, size_t count) {
    ark_engine *engine = NULL;
    ark_session *session = NULL;
    size_t generated = 0;
    ark_status status = ark_open(request->path, &request->options, &engine);
    if (!status) status = ark_session_open(engine, 0, &session);
    if (!status) status = ark_generate(session, tokens, count, &request->generation, NULL, &generated);
    if (!status) putchar('\n');
    else fprintf(stderr, "arkrun: error %d: %s\n", status, ark_error());
    ark_session_close(session);
    ark_close(engine);
    return status ? 1 : 0;
}

int main(int count, char **words) {
    int first = 1;
    struct request request = {.generation = {.limit = 128, .sink = print, .context = &first}};
    for (int word = 1; word < count; word++) {
        const char *name = words[word];
        if (!strcmp(name, "--help")) {
            fputs(usage, stdout);
            return 0;
        }
        if (!strcmp(name, "--serve")) request.serve = 1;
        else if (!strcmp(name, "--check")) request.options.check = 1;
        else if (name[0] != '-') {
            if (request.path) return wrong("one artifact at a time", name);
            request.path = name;
        } else {
            if (word + 1 == count) return wrong("a value is missing or the option is unknown", name);
            int taken = take(&request, name, words[++word]);
            if (taken < 1) return wrong(taken ? "unknown option" : "this cannot be its value", name);
        }
    }
    if (!request.path) return wrong("which artifact?", "none is given");
    if (request.serve) return serve(request.path, &request.options);
    size_t length;
    int32_t *tokens = read_tokens(request.tokens, &length);
    if (!tokens) return wrong("token ids are whole numbers", request.tokens ? request.tokens : "standard input");
    int status = generate(&request, tokens, length);
    free(tokens);
    return status;
}
