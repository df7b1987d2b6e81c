#ifndef ARKINFER_ARKRUN_H
#define ARKINFER_ARKRUN_H

#include "arkinfer.h"

/* Serve requests on standard input until it ends; the return value is the exit status. */
int serve(const char *path, const ark_options *options);

#endif
