/* Generate from token ids with an artifact: what an application does, in one file.
 *
 *     generate ARTIFACT ID...
 */
#include <stdio.h>
#include <stdlib.h>

#include "arkinfer.h"

static int failed(const char *what) {
    fprintf(stderr, "%s: %s\n", what, ark_error());
    return 1;
}

/* Each token as it comes: turn it into text with your tokenizer; return 1 to stop. */
static int32_t show(void *context, int32_t token) {
    (void)context;
    printf("%d\n", token);
    return 0;
}

int main(int count, char **words) {
    if (count < 3) return fprintf(stderr, "usage: generate ARTIFACT ID...\n"), 2;
    size_t length = (size_t)count - 2, generated;
    int32_t *prompt = malloc(length * sizeof *prompt);
    for (size_t index = 0; prompt && index < length; index++) prompt[index] = (int32_t)strtol(words[index + 2], NULL, 10);

    ark_options options = {0}; /* all processors, the attention that the artifact was built for */
    ark_engine *engine;
    if (!prompt || ark_open(words[1], &options, &engine)) return failed("open");
    ark_session *session;
    if (ark_session_open(engine, 1024, &session)) return failed("session");

    ark_generation generation = {.limit = 64, .sampling = {.temperature = 0.7, .top_p = 0.9, .seed = 1}, .sink = show};
    ark_status status = ark_generate(session, prompt, length, &generation, NULL, &generated);
    if (status) failed("generate");

    ark_session_close(session);
    ark_close(engine);
    free(prompt);
    return status != ARK_OK;
}
