/* payload/native.json: the ordered kernel calls of one step over numbered values. exporters/native.py writes it. */
#include <stdlib.h>
#include <string.h>

#include "engine.h"

#define NAME "payload/native.json"
#define MAX_EXTENT ((int64_t)1 << 40)

static ark_status unsound(const char *what) {
    return fail(ARK_DAMAGED, NAME " is not sound (%s); build the artifact again", what);
}

bool value_bytes(const struct value *value, int64_t tokens, int64_t rows, uint64_t *bytes) {
    uint64_t size = value->tensor.dtype.bits / 8;
    for (int axis = 0; axis < value->tensor.ndim; axis++) {
        int64_t extent = value->extents[axis];
        if (extent == EXTENT_TOKENS) extent = tokens;
        if (extent == EXTENT_ROWS) extent = rows;
        if (extent == EXTENT_GROWS) extent = 1;
        if (__builtin_mul_overflow(size, (uint64_t)extent, &size)) return false;
    }
    *bytes = size;
    return size <= (uint64_t)MAX_EXTENT;
}

static bool read_dtype(const struct json *json, uint32_t node, DLDataType *dtype) {
    static const struct {
        const char *name;
        DLDataType dtype;
    } known[] = {
        {"float32", {TYPE_FLOAT, 32, 1}}, {"float16", {TYPE_FLOAT, 16, 1}}, {"int32", {TYPE_INT, 32, 1}},
        {"int8", {TYPE_INT, 8, 1}},       {"uint8", {TYPE_UINT, 8, 1}},     {"uint16", {TYPE_UINT, 16, 1}},
    };
    for (size_t index = 0; index < sizeof known / sizeof *known; index++)
        if (json_equals(json, node, known[index].name)) {
            *dtype = known[index].dtype;
            return true;
        }
    return false;
}

static bool read_extent(const struct json *json, uint32_t node, int64_t *extent) {
    if (json_integer(json, node, extent)) return *extent > 0 && *extent <= MAX_EXTENT;
    *extent = json_equals(json, node, "n")   ? EXTENT_TOKENS
              : json_equals(json, node, "r") ? EXTENT_ROWS
              : json_equals(json, node, "g") ? EXTENT_GROWS
                                             : 0;
    return *extent != 0;
}

/* An entry is [dtype, [extents], alias, offset]: -1 for no alias, and for what is not in the weight file. */
static ark_status read_value(struct program *program, uint32_t index, uint32_t node) {
    const struct json *json = &program->json;
    struct value *value = &program->values[index];
    int64_t alias, offset;
    if (!json_is(json, node, JSON_ARRAY) || json->nodes[node].count != 4) return unsound("a value has no four fields");
    uint32_t dtype = node + 1, shape = json->nodes[dtype].next, third = json->nodes[shape].next;
    if (!read_dtype(json, dtype, &value->tensor.dtype)) return unsound("a value has an unknown dtype");
    if (!json_is(json, shape, JSON_ARRAY) || !json->nodes[shape].count || json->nodes[shape].count > MAX_AXES)
        return unsound("a value has no shape");
    value->tensor.ndim = (int32_t)json->nodes[shape].count;
    uint32_t extent = shape + 1;
    for (int axis = 0; axis < value->tensor.ndim; axis++, extent = json->nodes[extent].next) {
        if (!read_extent(json, extent, &value->extents[axis])) return unsound("a value has an unknown extent");
        value->shape[axis] = value->extents[axis] > 0 ? value->extents[axis] : 0;
        value->symbolic |= value->extents[axis] == EXTENT_TOKENS || value->extents[axis] == EXTENT_ROWS;
    }
    if (!json_integer(json, third, &alias) || alias < -1 || alias >= (int64_t)index)
        return unsound("a value is a view of none before it");
    if (!json_integer(json, json->nodes[third].next, &offset) || offset < -1 || offset % ALIGNMENT > 0)
        return unsound("a value has no place in the weight file");
    uint64_t bytes, aliased;
    if (!value_bytes(value, 1, 1, &bytes)) return unsound("a value is too large");
    if (offset >= 0 && (value->symbolic || alias >= 0)) return unsound("a weight has no fixed shape");
    for (int64_t step = 0; step < 3 && alias >= 0; step++) {
        int64_t tokens = 1 + (step == 1), rows = 1 + (step == 2);
        if (!value_bytes(value, tokens, rows, &bytes) || !value_bytes(&program->values[alias], tokens, rows, &aliased) ||
            aliased != bytes || program->offsets[alias] != UINT64_MAX)
            return unsound("a view has another size than its value");
    }
    value->alias = (int32_t)alias;
    value->tensor.device_type = DEVICE_CPU;
    value->tensor.shape = value->shape;
    program->offsets[index] = offset < 0 ? UINT64_MAX : (uint64_t)offset;
    return ARK_OK;
}

static ark_status read_values(struct program *program) {
    const struct json *json = &program->json;
    uint32_t list = json_member(json, 0, "values");
    if (!list || !json_is(json, list, JSON_ARRAY) || json->nodes[list].count < FIRST_CACHE) return unsound("no values");
    program->value_count = json->nodes[list].count;
    program->values = calloc(program->value_count, sizeof *program->values);
    program->offsets = calloc(program->value_count, sizeof *program->offsets);
    if (!program->values || !program->offsets) return no_memory(NAME, program->value_count * sizeof *program->values);
    uint32_t node = list + 1;
    for (uint32_t index = 0; index < program->value_count; index++, node = json->nodes[node].next) {
        ark_status status = read_value(program, index, node);
        if (status) return status;
    }
    return ARK_OK;
}

static bool fits(const struct value *value, DLDataType dtype, int axes, int64_t first, int64_t second) {
    return !memcmp(&value->tensor.dtype, &dtype, sizeof dtype) && value->tensor.ndim == axes &&
           value->extents[0] == first && (axes < 2 || value->extents[1] == second) && value->alias < 0;
}

/* The three inputs and the result are what this code fills and reads: nothing may be assumed of them. */
static ark_status check_ends(struct program *program) {
    const struct value *values = program->values;
    DLDataType whole = {TYPE_INT, 32, 1}, real = {TYPE_FLOAT, 32, 1};
    if (!fits(&values[VALUE_TOKENS], whole, 1, EXTENT_TOKENS, 0) ||
        !fits(&values[VALUE_ROTATION], real, 2, EXTENT_TOKENS, program->head_dim) ||
        !fits(&values[VALUE_ROWS], whole, 1, EXTENT_ROWS, 0))
        return unsound("its inputs are not tokens, rotation and rows");
    if (!fits(&values[program->result], real, 2, EXTENT_ROWS, program->vocabulary))
        return unsound("its result is no rows of logits");
    return ARK_OK;
}

static ark_status read_argument(struct program *program, uint32_t node) {
    const struct json *json = &program->json;
    char text[24];
    if (!json_string(json, node, text, sizeof text) || !text[0] || !text[1]) return unsound("an argument is none");
    int64_t number = 0;
    for (const char *digit = text + 1; *digit; digit++) {
        if (*digit < '0' || *digit > '9' || number > INT64_MAX / 16) return unsound("an argument is none");
        number = 10 * number + (*digit - '0');
    }
    TVMFFIAny *argument = &program->arguments[program->argument_count];
    switch (text[0]) {
        case 'v':
            if (number >= program->value_count) return unsound("an argument is none of the values");
            argument->type_index = ANY_TENSOR;
            argument->v_ptr = &program->values[number].tensor;
            break;
        case 's':
            if (number >= SCALARS) return unsound("an argument is none of the scalars");
            program->uses[program->use_count++] = (struct scalar_use){program->argument_count, (uint32_t)number};
            argument->type_index = ANY_INT;
            break;
        case 'c':
            argument->type_index = ANY_INT;
            argument->v_int64 = number;
            break;
        default:
            return unsound("an argument is none");
    }
    program->argument_count++;
    return ARK_OK;
}

/* A call is [kernel, argument, ...]. */
static ark_status read_calls(struct program *program) {
    const struct json *json = &program->json;
    uint32_t list = json_member(json, 0, "calls");
    if (!list || !json_is(json, list, JSON_ARRAY) || !json->nodes[list].count) return unsound("no calls");
    program->call_count = json->nodes[list].count;
    size_t most = 0;
    uint32_t node = list + 1;
    for (uint32_t index = 0; index < program->call_count; index++, node = json->nodes[node].next) {
        if (!json_is(json, node, JSON_ARRAY) || json->nodes[node].count < 2 || json->nodes[node].count > MAX_ARGUMENTS)
            return unsound("a call has no arguments, or too many");
        most += json->nodes[node].count - 1;
    }
    program->calls = calloc(program->call_count, sizeof *program->calls);
    program->arguments = calloc(most, sizeof *program->arguments);
    program->uses = calloc(most, sizeof *program->uses);
    if (!program->calls || !program->arguments || !program->uses) return no_memory(NAME, most * sizeof(TVMFFIAny));
    node = list + 1;
    for (uint32_t index = 0; index < program->call_count; index++, node = json->nodes[node].next) {
        int64_t kernel;
        if (!json_integer(json, node + 1, &kernel) || kernel < 0 || kernel >= program->kernel_count)
            return unsound("a call names no kernel");
        program->calls[index] =
            (struct call){(uint32_t)kernel, program->argument_count, json->nodes[node].count - 1};
        uint32_t item = json->nodes[node + 1].next;
        for (uint32_t place = 0; place < program->calls[index].count; place++, item = json->nodes[item].next) {
            ark_status status = read_argument(program, item);
            if (status) return status;
        }
    }
    return ARK_OK;
}

/* Caches are the values after the inputs, in order; an entry is [stride, pack]. */
static ark_status read_caches(struct program *program) {
    const struct json *json = &program->json;
    uint32_t list = json_member(json, 0, "caches");
    if (!list || !json_is(json, list, JSON_ARRAY) || json->nodes[list].count > MAX_CACHES ||
        FIRST_CACHE + json->nodes[list].count > program->value_count)
        return unsound("no caches");
    program->cache_count = json->nodes[list].count;
    uint32_t node = list + 1;
    for (uint32_t index = 0; index < program->cache_count; index++, node = json->nodes[node].next) {
        struct cache *cache = &program->caches[index];
        *cache = (struct cache){.value = (int32_t)(FIRST_CACHE + index), .axis = -1};
        const struct value *value = &program->values[cache->value];
        for (int axis = 0; axis < value->tensor.ndim; axis++)
            if (value->extents[axis] == EXTENT_GROWS) cache->axis = cache->axis < 0 ? axis : MAX_AXES;
        if (cache->axis < 0 || cache->axis == MAX_AXES || value->symbolic || value->alias >= 0)
            return unsound("a cache does not grow along one axis");
        if (!json_is(json, node, JSON_ARRAY) || json->nodes[node].count != 2 ||
            !json_integer(json, node + 1, &cache->stride) || !json_integer(json, node + 2, &cache->pack) ||
            cache->stride < 1 || cache->stride > INT32_MAX || cache->pack < 1 || cache->pack > INT32_MAX)
            return unsound("a cache has no stride and pack");
    }
    uint32_t after = FIRST_CACHE + program->cache_count;
    for (uint32_t index = 0; index < program->value_count; index++) {
        const struct value *value = &program->values[index];
        for (int axis = 0; axis < value->tensor.ndim; axis++)
            if (value->extents[axis] == EXTENT_GROWS && (index < FIRST_CACHE || index >= after))
                return unsound("a value grows that is no cache");
        if (value->alias >= FIRST_CACHE && value->alias < (int32_t)after) return unsound("a value is a view of a cache");
        if (index < after && program->offsets[index] != UINT64_MAX) return unsound("an input lies in the weight file");
    }
    return ARK_OK;
}

static ark_status read_levels(struct program *program) {
    const struct json *json = &program->json;
    uint32_t list = json_member(json, 0, "levels");
    if (!list || !json_is(json, list, JSON_ARRAY) || !json->nodes[list].count || json->nodes[list].count > MAX_LEVELS)
        return unsound("no levels");
    program->level_count = json->nodes[list].count;
    uint32_t node = list + 1;
    for (uint32_t index = 0; index < program->level_count; index++, node = json->nodes[node].next) {
        struct level *level = &program->levels[index];
        level->many = json_member(json, node, "many");
        level->one = json_member(json, node, "one");
        if (!json_string(json, json_member(json, node, "name"), level->name, sizeof level->name) ||
            !json_string(json, json_member(json, node, "library"), level->library, sizeof level->library) ||
            !level->many || !json_is(json, level->many, JSON_ARRAY) || !level->one ||
            !json_is(json, level->one, JSON_ARRAY) || json->nodes[level->many].count != json->nodes[level->one].count)
            return unsound("a level has no name, library and kernels");
        if (index && json->nodes[level->many].count != program->kernel_count)
            return unsound("levels differ in their kernels");
        program->kernel_count = json->nodes[level->many].count;
    }
    return ARK_OK;
}

static ark_status read_rope(struct program *program) {
    const struct json *json = &program->json;
    uint32_t rope = json_member(json, 0, "rope"), list = json_member(json, rope, "frequencies");
    int64_t bits;
    if (!rope || !list || !json_is(json, list, JSON_ARRAY) || !json->nodes[list].count ||
        json->nodes[list].count > 4096)
        return unsound("no rotation");
    program->head_dim = 2 * (int32_t)json->nodes[list].count;
    program->frequencies = calloc(json->nodes[list].count, sizeof *program->frequencies);
    if (!program->frequencies) return no_memory(NAME, (uint64_t)program->head_dim * 2);
    uint32_t node = list + 1;
    for (uint32_t index = 0; index <= json->nodes[list].count; index++) {
        bool last = index == json->nodes[list].count;
        if (!json_integer(json, last ? json_member(json, rope, "magnitude") : node, &bits) || bits < 0 ||
            bits > UINT32_MAX)
            return unsound("a rotation is none");
        uint32_t word = (uint32_t)bits;
        memcpy(last ? &program->magnitude : &program->frequencies[index], &word, sizeof word);
        if (!last) node = json->nodes[node].next;
    }
    return ARK_OK;
}

static ark_status read_numbers(struct program *program) {
    const struct json *json = &program->json;
    int64_t format, vocabulary, result;
    if (!json_integer(json, json_member(json, 0, "format"), &format)) return unsound("no format");
    if (format != FORMAT)
        return fail(ARK_NEWER, NAME " has format %lld and this library reads %d: use the library of the artifact",
                    (long long)format, FORMAT);
    if (!json_integer(json, json_member(json, 0, "vocabulary"), &vocabulary) || vocabulary < 1 ||
        vocabulary > INT32_MAX || !json_integer(json, json_member(json, 0, "context"), &program->context) ||
        program->context < 1 || program->context > INT32_MAX ||
        !json_integer(json, json_member(json, 0, "block"), &program->block) || program->block < 1 ||
        program->block > INT32_MAX || !json_integer(json, json_member(json, 0, "result"), &result) || result < 0 ||
        !json_string(json, json_member(json, 0, "weights"), program->weights, sizeof program->weights))
        return unsound("a number is missing");
    uint32_t dense = json_member(json, 0, "dense_len");
    program->dense_length = NEVER;
    if (!json_is(json, dense, JSON_NULL) && !json_integer(json, dense, &program->dense_length))
        return unsound("no dense_len");
    program->vocabulary = (int32_t)vocabulary;
    if (result >= json->nodes[json_member(json, 0, "values")].count || result > INT32_MAX) return unsound("no result");
    program->result = (int32_t)result;
    return ARK_OK;
}

ark_status program_read(struct program *program, const struct artifact *artifact) {
    *program = (struct program){0};
    ark_status status = artifact_map(artifact, NAME, true, &program->file);
    if (status) return status;
    enum json_result result = json_parse(&program->json, (const char *)program->file.data, program->file.size);
    if (result == JSON_NO_MEMORY) return no_memory(NAME, program->file.size);
    if (result) return unsound("not JSON");
    ark_status (*const parts[])(struct program *) = {read_numbers, read_rope,  read_values, check_ends,
                                                     read_caches,  read_levels, read_calls};
    for (size_t part = 0; part < sizeof parts / sizeof *parts && !status; part++) status = parts[part](program);
    return status;
}

void program_free(struct program *program) {
    json_free(&program->json);
    file_unmap(&program->file);
    free(program->frequencies);
    free(program->values);
    free(program->offsets);
    free(program->calls);
    free(program->arguments);
    free(program->uses);
    *program = (struct program){0};
}
