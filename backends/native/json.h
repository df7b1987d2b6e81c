/* JSON text as a flat list of nodes in the order of the text. */
#ifndef ARKINFER_JSON_H
#define ARKINFER_JSON_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum json_kind { JSON_NULL, JSON_TRUE, JSON_FALSE, JSON_NUMBER, JSON_STRING, JSON_ARRAY, JSON_OBJECT };

struct json_node {
    uint32_t kind;
    uint32_t start, end; /* its text; of a string, what is between the quotes */
    uint32_t next;       /* the node after this one and all that is in it */
    uint32_t count;      /* items of an array, members of an object */
};

struct json {
    const char *text;
    struct json_node *nodes; /* nodes[0] is the root; the first item of a node is the one after it */
    uint32_t count, room;
};

enum json_result { JSON_SOUND, JSON_UNSOUND, JSON_NO_MEMORY };

/* Read `size` bytes that outlive `json`; nodes are to be freed by json_free, whatever the result. */
enum json_result json_parse(struct json *json, const char *text, size_t size);
void json_free(struct json *json);

/* Return the value of a member of an object, or 0 if there is none (or `object` is none). */
uint32_t json_member(const struct json *json, uint32_t object, const char *name);

/* Return the first item of an array, to be followed by nodes[item].next; `kind` is checked: 0 if it is another. */
bool json_is(const struct json *json, uint32_t node, enum json_kind kind);
bool json_equals(const struct json *json, uint32_t node, const char *text);

/* Read a whole number, or a string without escapes of fewer than `room` bytes; false if it is none. */
bool json_integer(const struct json *json, uint32_t node, int64_t *value);
bool json_string(const struct json *json, uint32_t node, char *text, size_t room);

#endif
