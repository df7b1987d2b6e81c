#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include "engine.h"

#define LENGTH 1024

/* A key and not _Thread_local: Android has that only since API level 29. */
static pthread_key_t key;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void make_key(void) { pthread_key_create(&key, free); }

static char *text(void) {
    pthread_once(&once, make_key);
    char *found = pthread_getspecific(key);
    if (!found && (found = calloc(1, LENGTH))) pthread_setspecific(key, found);
    return found;
}

const char *ark_error(void) {
    char *found = text();
    return found ? found : "out of memory";
}

void forget_error(void) {
    char *found = text();
    if (found) found[0] = 0;
}

ark_status fail(ark_status status, const char *format, ...) {
    char *found = text();
    if (found) {
        va_list arguments;
        va_start(arguments, format);
        vsnprintf(found, LENGTH, format, arguments);
        va_end(arguments);
    }
    return status;
}

ark_status no_memory(const char *what, uint64_t bytes) {
    return fail(ARK_MEMORY,
                "the system gives no %llu bytes for %s; close other sessions, take a smaller capacity or a smaller chunk",
                (unsigned long long)bytes, what);
}
