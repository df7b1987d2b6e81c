/* Mutated manifests, programs and lists of stop ids, thousands in a second: every read stays inside its buffer.
 *
 * usage: fuzz FOLDER SEED ROUNDS; prints how many of each were still taken for sound. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine.h"

#define artifact_map artifact_map_of_manifest
#define strcmp(left, right) 0 /* artifact.c compares digests with it: all fit, or no mutated text would get further */
#include "artifact.c"
#undef artifact_map
#undef strcmp
#include "program.c"

enum { MANIFEST_TEXT, PROGRAM_TEXT, GENERATION_TEXT, TEXTS };
static const char *const names[TEXTS] = {"manifest.json", "payload/native.json", "generation.json"};
static struct file whole[TEXTS], current[TEXTS];
static uint64_t state;

/* Files come from memory, in blocks of their exact size. */
ark_status file_map(const char *folder, const char *name, struct file *file) {
    (void)folder;
    for (int text = 0; text < TEXTS; text++)
        if (!strcmp(name, names[text])) {
            uint8_t *data = malloc(current[text].size);
            memcpy(data, current[text].data, current[text].size);
            *file = (struct file){data, current[text].size};
            return ARK_OK;
        }
    return ARK_DAMAGED;
}

void file_unmap(struct file *file) {
    free((void *)file->data);
    *file = (struct file){0};
}

ark_status artifact_map(const struct artifact *artifact, const char *name, bool digest, struct file *file) {
    (void)artifact, (void)digest;
    return file_map("", name, file);
}

static uint64_t next(uint64_t below) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return below ? (state >> 11) % below : 0;
}

static struct file read_all(const char *folder, const char *name) {
    char path[MAX_PATH];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *stream = fopen(path, "rb");
    if (!stream) exit(2);
    fseek(stream, 0, SEEK_END);
    size_t size = (size_t)ftell(stream);
    rewind(stream);
    uint8_t *data = malloc(size);
    if (fread(data, 1, size, stream) != size) exit(2);
    fclose(stream);
    return (struct file){data, size};
}

/* One to four changes: a byte, a cut, a copied piece, or a number or word that means something. */
static struct file mutated(const uint8_t *text, size_t size) {
    static const char *const words[] = {"-1",   "0",    "4294967296", "9223372036854775807", "99999999999999999999", "{}",
                                        "null", "\"g\"", "\"n\"",      "\"v0\"",              "[[[[",                 "\"\\u00"};
    size_t room = 2 * size + 64;
    uint8_t *copy = malloc(room);
    memcpy(copy, text, size);
    for (uint64_t change = 0; change <= next(4) && size > 8; change++) {
        size_t at = next(size), length = next(size - at < 40 ? size - at : 40);
        const char *word = words[next(sizeof words / sizeof *words)];
        switch (next(5)) {
            case 0: copy[at] = (uint8_t)next(256); break;
            case 1: size = next(8) ? size - length : at, memmove(copy + at, copy + at + length, size > at ? size - at : 0); break;
            case 2:
                if (size + length > room) break;
                memmove(copy + at + length, copy + at, size - at);
                size += length;
                break;
            default: /* in place of a number: look for the next one */
                while (at < size && (copy[at] < '0' || copy[at] > '9')) at++;
                for (length = 0; at + length < size && copy[at + length] >= '0' && copy[at + length] <= '9';) length++;
                if (size + strlen(word) > room) break;
                memmove(copy + at + strlen(word), copy + at + length, size - at - length);
                memcpy(copy + at, word, strlen(word));
                size = size - length + strlen(word);
        }
    }
    return (struct file){realloc(copy, size ? size : 1), size};
}

/* A change that keeps the size, which the manifest knows. */
static struct file scratched(const uint8_t *text, size_t size) {
    uint8_t *copy = malloc(size);
    memcpy(copy, text, size);
    for (uint64_t change = 0; change <= next(3); change++) copy[next(size)] = "0123456789-[]{}\",e "[next(19)];
    return (struct file){copy, size};
}

static int run_program(void) {
    struct program program;
    struct artifact artifact = {0};
    ark_status status = program_read(&program, &artifact);
    uint64_t size, *places = NULL;
    if (!status) {
        places = calloc(program.value_count, sizeof *places);
        status = arena_place(&program, 128, 7, places, &size);
    }
    free(places);
    program_free(&program);
    return !status;
}

static int run_manifest(void) {
    struct artifact artifact;
    struct file file = {0};
    ark_status status = artifact_open(&artifact, "folder");
    if (!status) status = artifact_map_of_manifest(&artifact, "payload/native.json", true, &file);
    if (!status) file_unmap(&file);
    artifact_close(&artifact);
    return !status;
}

int main(int count, char **words) {
    if (count != 4) return 2;
    int sound[TEXTS] = {0};
    state = strtoull(words[2], NULL, 10) * 2 + 1;
    for (int text = 0; text < TEXTS; text++) current[text] = whole[text] = read_all(words[1], names[text]);
    for (int round = 0; round < atoi(words[3]); round++) {
        int text = round % TEXTS;
        current[text] = (text == GENERATION_TEXT ? scratched : mutated)(whole[text].data, whole[text].size);
        sound[text] += text == PROGRAM_TEXT ? run_program() : run_manifest();
        free((void *)current[text].data);
        current[text] = whole[text];
    }
    printf("%d manifests, %d programs, %d stop ids taken for sound\n", sound[0], sound[1], sound[2]);
    for (int text = 0; text < TEXTS; text++) free((void *)whole[text].data);
    return 0;
}
