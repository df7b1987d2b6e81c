#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine.h"

#if defined(__APPLE__)
#define SUFFIX ".dylib"
#else
#define SUFFIX ".so"
#endif

/* A kernel says through this what was wrong with its arguments: exporters/kernels/raised.c calls it. */
static void raised(const char *kind, const char *const *parts, int32_t count) {
    char text[512];
    size_t length = 0;
    text[0] = 0;
    for (int32_t part = 0; part < count && length < sizeof text - 1; part++)
        if (parts[part]) length += (size_t)snprintf(text + length, sizeof text - length, "%s", parts[part]);
    fail(ARK_INTERNAL, "a kernel refused its arguments: %s: %s", kind, text);
}

/* The pointers that the library calls the runtime through; it may lack those that none of its kernels needs. */
static void connect(void *handle) {
    static const struct {
        const char *name;
        void *function;
    } offered[] = {
        {"__TVMBackendParallelLaunch", (void *)TVMBackendParallelLaunch},
        {"__TVMBackendAllocWorkspace", (void *)TVMBackendAllocWorkspace},
        {"__TVMBackendFreeWorkspace", (void *)TVMBackendFreeWorkspace},
        {"__ark_raised", (void *)raised},
    };
    for (size_t index = 0; index < sizeof offered / sizeof *offered; index++) {
        void **pointer = dlsym(handle, offered[index].name);
        if (pointer) *pointer = offered[index].function;
    }
}

/* `list` names the kernels of one form; null stands for one that the form does not use. */
static ark_status find(struct library *library, const struct program *program, uint32_t list,
                       TVMFFISafeCallType *kernels) {
    const struct json *json = &program->json;
    uint32_t node = list + 1;
    for (uint32_t index = 0; index < program->kernel_count; index++, node = json->nodes[node].next) {
        char name[128] = "__tvm_ffi_";
        if (json_is(json, node, JSON_NULL)) continue;
        if (!json_string(json, node, name + strlen(name), sizeof name - strlen(name)))
            return fail(ARK_DAMAGED, "payload/native.json is not sound (the name of a kernel); build the artifact again");
        void *symbol = dlsym(library->handle, name);
        if (!symbol)
            return fail(ARK_DAMAGED, "the compiled code has no kernel %s: it belongs to another artifact", name + 10);
        memcpy(&kernels[index], &symbol, sizeof symbol);
    }
    return ARK_OK;
}

ark_status library_open(struct library *library, const struct program *program, const struct level *level,
                        const struct artifact *artifact, const char *folder) {
    char path[MAX_PATH];
    struct file file = {0};
    *library = (struct library){0};
    if (folder) {
        const char *separator = *folder ? "/" : "";
        int length = snprintf(path, sizeof path, "%s%slib%s" SUFFIX, folder, separator, level->name);
        if (length < 0 || length >= MAX_PATH) return fail(ARK_ARGUMENT, "the path of the libraries is too long");
    } else {
        ark_status status = artifact_map(artifact, level->library, true, &file);
        if (status) return status;
        if (!join(path, artifact->folder, level->library)) status = fail(ARK_ARGUMENT, "the artifact's path is too long");
        file_unmap(&file);
        if (status) return status;
    }
    library->handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library->handle) {
        const char *reason = dlerror();
        return fail(ARK_UNSUPPORTED, "the compiled code of level %s does not load: %s; build for this system", level->name,
                    reason ? reason : path);
    }
    connect(library->handle);
    library->many = calloc(program->kernel_count, sizeof *library->many);
    library->one = calloc(program->kernel_count, sizeof *library->one);
    ark_status status = ARK_OK;
    if (!library->many || !library->one)
        status = no_memory("its kernels", program->kernel_count * sizeof *library->many);
    if (!status) status = find(library, program, level->many, library->many);
    if (!status) status = find(library, program, level->one, library->one);
    for (uint32_t index = 0; index < program->call_count && !status; index++)
        if (!library->many[program->calls[index].kernel] || !library->one[program->calls[index].kernel])
            status = fail(ARK_DAMAGED, "payload/native.json is not sound (a call without a kernel); build the artifact again");
    return status;
}

void library_close(struct library *library) {
    free(library->many);
    free(library->one);
    if (library->handle) dlclose(library->handle);
    *library = (struct library){0};
}
