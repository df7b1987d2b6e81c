/* Linked into every library of kernels, so that it loads where there is no TVM: kernels call this function when they
 * refuse an argument. Where TVM's runtime is loaded, its function of the same name comes first. */
void (*__ark_raised)(const char *kind, const char *const *parts, int count);

__attribute__((weak)) void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char *const *parts, int count) {
    if (__ark_raised) __ark_raised(kind, parts, count);
}
