#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine.h"

#define SCHEMA 1
#define MANIFEST "manifest.json"
#define MAX_MANIFEST ((size_t)16 << 20)
#define MAX_STOPS 4096

static ark_status untrusted(const char *reason) {
    return fail(ARK_DAMAGED, "the artifact's manifest.json cannot be trusted: %s; copy or build the artifact again",
                reason);
}

/* The text without its line `digest` is what that digest was made of: keys are sorted, one a line. */
static bool own_digest_fits(const struct artifact *artifact) {
    const struct json *json = &artifact->manifest;
    uint32_t node = json_member(json, 0, "digest");
    char expected[65], found[65];
    if (!json_string(json, node, expected, sizeof expected)) return false;
    const char *text = json->text, *end = text + artifact->manifest_file.size;
    const char *line = text + json->nodes[node].start, *next;
    while (line > text && line[-1] != '\n') line--;
    next = memchr(line, '\n', (size_t)(end - line));
    if (!next) return false;
    struct sha256 hash;
    sha256_begin(&hash);
    sha256_add(&hash, text, (size_t)(line - text));
    sha256_add(&hash, next + 1, (size_t)(end - next - 1));
    sha256_end(&hash, found);
    return !strcmp(expected, found);
}

static ark_status read_manifest(struct artifact *artifact) {
    struct json *json = &artifact->manifest;
    const struct file *file = &artifact->manifest_file;
    if (file->size > MAX_MANIFEST) return untrusted("it is too long");
    enum json_result result = json_parse(json, (const char *)file->data, file->size);
    if (result == JSON_NO_MEMORY) return no_memory(MANIFEST, file->size);
    int64_t schema;
    if (result || !json_integer(json, json_member(json, 0, "schema"), &schema) || schema < 1)
        return untrusted("it is not sound JSON, or names no schema");
    if (schema > SCHEMA)
        return fail(ARK_NEWER, "the artifact has schema %lld and this library reads %d: update the library",
                    (long long)schema, SCHEMA);
    if (!own_digest_fits(artifact)) return untrusted("its text does not match its own digest");
    if (!json_equals(json, json_member(json, 0, "backend"), "tvm"))
        return fail(ARK_UNSUPPORTED, "the artifact is not for processors: build it for a target of the backend tvm");
    artifact->files = json_member(json, 0, "files");
    if (!json_is(json, artifact->files, JSON_OBJECT) || !artifact->files) return untrusted("it lists no files");
    uint32_t attention = json_member(json, 0, "attention");
    static const char *const names[] = {"", "auto", "dense", "sparse"};
    for (int index = ARK_ATTENTION_AUTO; index <= ARK_ATTENTION_SPARSE; index++)
        if (attention && json_equals(json, attention, names[index])) artifact->attention = index;
    return artifact->attention ? ARK_OK : untrusted("it names no attention");
}

ark_status artifact_map(const struct artifact *artifact, const char *name, bool digest, struct file *file) {
    const struct json *json = &artifact->manifest;
    uint32_t entry = json_member(json, artifact->files, name);
    int64_t size;
    char expected[65], found[65];
    if (*name == '/' || strstr(name, "..")) return untrusted("it names a file outside the artifact");
    if (!entry)
        return fail(ARK_DAMAGED,
                    "the artifact has no file %s; was it built for a target with `native: true`? Build it again", name);
    if (!json_integer(json, json_member(json, entry, "size"), &size) ||
        !json_string(json, json_member(json, entry, "sha256"), expected, sizeof expected))
        return untrusted("the entry of a file is not a size and a sha256");
    ark_status status = file_map(artifact->folder, name, file);
    if (status) return status;
    if (file->size != (uint64_t)size) {
        status = fail(ARK_DAMAGED, "%s has %llu bytes, not %lld: its copy was interrupted? Copy the artifact again", name,
                      (unsigned long long)file->size, (long long)size);
    } else if (digest) {
        struct sha256 hash;
        sha256_begin(&hash);
        sha256_add(&hash, file->data, file->size);
        sha256_end(&hash, found);
        if (strcmp(expected, found))
            status = fail(ARK_DAMAGED, "%s was changed or damaged: its SHA-256 is not the manifest's; copy the artifact again",
                          name);
    }
    if (status) file_unmap(file);
    return status;
}

static ark_status read_stops(struct artifact *artifact) {
    static const char name[] = "generation.json";
    struct file file;
    struct json json = {0};
    ark_status status = artifact_map(artifact, name, true, &file);
    if (status) return status;
    enum json_result result = json_parse(&json, (const char *)file.data, file.size);
    uint32_t list = result ? 0 : json_member(&json, 0, "eos_ids");
    if (result == JSON_NO_MEMORY) {
        status = no_memory(name, file.size);
    } else if (!list || !json_is(&json, list, JSON_ARRAY) || json.nodes[list].count > MAX_STOPS) {
        status = fail(ARK_DAMAGED, "%s lists no eos_ids; build the artifact again", name);
    } else if (!(artifact->stops = calloc(json.nodes[list].count + 1, sizeof *artifact->stops))) {
        status = no_memory(name, json.nodes[list].count * sizeof *artifact->stops);
    } else {
        uint32_t item = list + 1;
        for (uint32_t index = 0; index < json.nodes[list].count && !status; index++, item = json.nodes[item].next) {
            int64_t token;
            if (json_integer(&json, item, &token) && token >= 0 && token <= INT32_MAX)
                artifact->stops[artifact->stop_count++] = (int32_t)token;
            else
                status = fail(ARK_DAMAGED, "%s has an eos id that is none; build the artifact again", name);
        }
    }
    json_free(&json);
    file_unmap(&file);
    return status;
}

ark_status artifact_open(struct artifact *artifact, const char *path) {
    *artifact = (struct artifact){0};
    size_t length = strlen(path);
    if (!length || length >= MAX_PATH) return fail(ARK_ARGUMENT, "the path of the artifact is empty or too long");
    memcpy(artifact->folder, path, length + 1);
    ark_status status = file_map(path, MANIFEST, &artifact->manifest_file);
    if (status == ARK_DAMAGED) return fail(ARK_ABSENT, "there is no artifact at %s: no manifest.json can be read there", path);
    if (!status) status = read_manifest(artifact);
    if (!status) status = read_stops(artifact);
    if (status) artifact_close(artifact);
    return status;
}

void artifact_close(struct artifact *artifact) {
    json_free(&artifact->manifest);
    file_unmap(&artifact->manifest_file);
    free(artifact->stops);
    *artifact = (struct artifact){0};
}
