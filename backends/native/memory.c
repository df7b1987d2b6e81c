#include <sys/mman.h>

#include "engine.h"

#ifndef MAP_ANONYMOUS
#define MAP_ANONYMOUS MAP_ANON
#endif

void *pages_take(uint64_t bytes) {
    if (bytes > SIZE_MAX / 2) return NULL;
    void *pages = mmap(NULL, bytes ? (size_t)bytes : 1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return pages == MAP_FAILED ? NULL : pages;
}

void pages_give(void *pages, uint64_t bytes) {
    if (pages) munmap(pages, bytes ? (size_t)bytes : 1);
}
