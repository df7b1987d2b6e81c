#include <fcntl.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "engine.h"

bool join(char path[MAX_PATH], const char *folder, const char *name) {
    int length = snprintf(path, MAX_PATH, "%s/%s", folder, name);
    return length > 0 && length < MAX_PATH;
}

ark_status file_map(const char *folder, const char *name, struct file *file) {
    char path[MAX_PATH];
    *file = (struct file){0};
    if (!join(path, folder, name)) return fail(ARK_ARGUMENT, "the path of the artifact is too long");
    int descriptor = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a pipe would be waited for */
    if (descriptor < 0)
        return fail(ARK_DAMAGED, "%s cannot be opened: it is missing, or this process may not read it", path);
    struct stat found;
    if (fstat(descriptor, &found) || !S_ISREG(found.st_mode) || found.st_size <= 0) {
        close(descriptor);
        return fail(ARK_DAMAGED, "%s is empty, or not a file", path);
    }
    void *data = mmap(NULL, (size_t)found.st_size, PROT_READ, MAP_SHARED, descriptor, 0);
    close(descriptor);
    if (data == MAP_FAILED) return no_memory(name, (uint64_t)found.st_size);
    *file = (struct file){data, (size_t)found.st_size};
    return ARK_OK;
}

void file_unmap(struct file *file) {
    if (file->data) munmap((void *)file->data, file->size);
    *file = (struct file){0};
}
