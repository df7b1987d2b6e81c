#include "json.h"

#include <stdlib.h>
#include <string.h>

#define MAX_DEPTH 32
#define MAX_TEXT ((size_t)1 << 30)

struct reader {
    struct json *json;
    const char *text;
    uint32_t at, size;
};

static bool more(const struct reader *reader) { return reader->at < reader->size; }

static void skip_space(struct reader *reader) {
    while (more(reader)) {
        char c = reader->text[reader->at];
        if (c != ' ' && c != '\n' && c != '\t' && c != '\r') return;
        reader->at++;
    }
}

static bool take(struct reader *reader, char c) {
    if (!more(reader) || reader->text[reader->at] != c) return false;
    reader->at++;
    return true;
}

static enum json_result add(struct reader *reader, enum json_kind kind, uint32_t *index) {
    struct json *json = reader->json;
    if (json->count == json->room) {
        uint32_t room = json->room ? 2 * json->room : 256;
        struct json_node *nodes = realloc(json->nodes, (size_t)room * sizeof *nodes);
        if (!nodes) return JSON_NO_MEMORY;
        json->nodes = nodes;
        json->room = room;
    }
    *index = json->count++;
    json->nodes[*index] = (struct json_node){.kind = kind, .start = reader->at};
    return JSON_SOUND;
}

static void finish(struct reader *reader, uint32_t index, uint32_t end) {
    reader->json->nodes[index].end = end;
    reader->json->nodes[index].next = reader->json->count;
}

static bool hexadecimal(char c) {
    return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f') || (c >= 'A' && c <= 'F');
}

static enum json_result read_string(struct reader *reader) {
    uint32_t index;
    if (!take(reader, '"')) return JSON_UNSOUND;
    if (add(reader, JSON_STRING, &index)) return JSON_NO_MEMORY;
    while (more(reader)) {
        unsigned char c = (unsigned char)reader->text[reader->at++];
        if (c == '"') {
            finish(reader, index, reader->at - 1);
            return JSON_SOUND;
        }
        if (c < 0x20) return JSON_UNSOUND;
        if (c != '\\') continue;
        if (!more(reader)) return JSON_UNSOUND;
        c = (unsigned char)reader->text[reader->at++];
        if (c == 'u') {
            for (int digit = 0; digit < 4; digit++)
                if (!more(reader) || !hexadecimal(reader->text[reader->at++])) return JSON_UNSOUND;
        } else if (!c || !strchr("\"\\/bfnrt", c)) {
            return JSON_UNSOUND;
        }
    }
    return JSON_UNSOUND;
}

static bool digits(struct reader *reader) {
    uint32_t start = reader->at;
    while (more(reader) && reader->text[reader->at] >= '0' && reader->text[reader->at] <= '9') reader->at++;
    return reader->at > start;
}

static enum json_result read_number(struct reader *reader) {
    uint32_t index;
    if (add(reader, JSON_NUMBER, &index)) return JSON_NO_MEMORY;
    take(reader, '-');
    if (!take(reader, '0') && !digits(reader)) return JSON_UNSOUND;
    if (take(reader, '.') && !digits(reader)) return JSON_UNSOUND;
    if (take(reader, 'e') || take(reader, 'E')) {
        if (!take(reader, '+')) take(reader, '-');
        if (!digits(reader)) return JSON_UNSOUND;
    }
    finish(reader, index, reader->at);
    return JSON_SOUND;
}

static enum json_result read_word(struct reader *reader, const char *word, enum json_kind kind) {
    uint32_t index, length = (uint32_t)strlen(word);
    if (reader->size - reader->at < length || memcmp(reader->text + reader->at, word, length)) return JSON_UNSOUND;
    if (add(reader, kind, &index)) return JSON_NO_MEMORY;
    reader->at += length;
    finish(reader, index, reader->at);
    return JSON_SOUND;
}

static enum json_result read_value(struct reader *reader, int depth);

static enum json_result read_items(struct reader *reader, int depth, char open, char close, enum json_kind kind) {
    uint32_t index;
    enum json_result result = add(reader, kind, &index);
    if (result) return result;
    take(reader, open);
    skip_space(reader);
    if (!take(reader, close)) {
        uint32_t count = 0;
        do {
            skip_space(reader);
            if (kind == JSON_OBJECT) {
                if ((result = read_string(reader))) return result;
                skip_space(reader);
                if (!take(reader, ':')) return JSON_UNSOUND;
            }
            if ((result = read_value(reader, depth + 1))) return result;
            count++;
            skip_space(reader);
        } while (take(reader, ','));
        if (!take(reader, close)) return JSON_UNSOUND;
        reader->json->nodes[index].count = count;
    }
    finish(reader, index, reader->at);
    return JSON_SOUND;
}

static enum json_result read_value(struct reader *reader, int depth) {
    if (depth > MAX_DEPTH) return JSON_UNSOUND;
    skip_space(reader);
    if (!more(reader)) return JSON_UNSOUND;
    switch (reader->text[reader->at]) {
        case '{': return read_items(reader, depth, '{', '}', JSON_OBJECT);
        case '[': return read_items(reader, depth, '[', ']', JSON_ARRAY);
        case '"': return read_string(reader);
        case 't': return read_word(reader, "true", JSON_TRUE);
        case 'f': return read_word(reader, "false", JSON_FALSE);
        case 'n': return read_word(reader, "null", JSON_NULL);
        default: return read_number(reader);
    }
}

enum json_result json_parse(struct json *json, const char *text, size_t size) {
    *json = (struct json){.text = text};
    if (size > MAX_TEXT) return JSON_UNSOUND;
    struct reader reader = {json, text, 0, (uint32_t)size};
    enum json_result result = read_value(&reader, 0);
    if (result) return result;
    skip_space(&reader);
    return more(&reader) ? JSON_UNSOUND : JSON_SOUND;
}

void json_free(struct json *json) {
    free(json->nodes);
    *json = (struct json){0};
}

bool json_is(const struct json *json, uint32_t node, enum json_kind kind) {
    return node < json->count && json->nodes[node].kind == (uint32_t)kind;
}

bool json_equals(const struct json *json, uint32_t node, const char *text) {
    const struct json_node *found = &json->nodes[node];
    size_t length = strlen(text);
    return found->kind == JSON_STRING && found->end - found->start == length &&
           !memcmp(json->text + found->start, text, length);
}

uint32_t json_member(const struct json *json, uint32_t object, const char *name) {
    if (!json_is(json, object, JSON_OBJECT)) return 0;
    uint32_t key = object + 1;
    for (uint32_t member = 0; member < json->nodes[object].count; member++) {
        if (json_equals(json, key, name)) return key + 1;
        key = json->nodes[key + 1].next;
    }
    return 0;
}

bool json_integer(const struct json *json, uint32_t node, int64_t *value) {
    if (!node || !json_is(json, node, JSON_NUMBER)) return false;
    const char *text = json->text + json->nodes[node].start, *end = json->text + json->nodes[node].end;
    bool negative = *text == '-';
    int64_t sum = 0;
    for (text += negative; text < end; text++) {
        if (*text < '0' || *text > '9' || sum > (INT64_MAX - 9) / 10) return false;
        sum = 10 * sum + (*text - '0');
    }
    *value = negative ? -sum : sum;
    return true;
}

bool json_string(const struct json *json, uint32_t node, char *text, size_t room) {
    if (!node || !json_is(json, node, JSON_STRING)) return false;
    const struct json_node *found = &json->nodes[node];
    size_t length = found->end - found->start;
    if (length >= room || memchr(json->text + found->start, '\\', length)) return false;
    memcpy(text, json->text + found->start, length);
    text[length] = 0;
    return true;
}
