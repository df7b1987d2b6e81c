/* The calling convention of compiled kernels: as much as they need of DLPack 1 and of tvm-ffi's c_api.h. */
#ifndef ARKINFER_TVM_H
#define ARKINFER_TVM_H

#include <stdint.h>

enum { DEVICE_CPU = 1 };
enum { TYPE_INT = 0, TYPE_UINT = 1, TYPE_FLOAT = 2 };        /* DLDataTypeCode */
enum { ANY_NONE = 0, ANY_INT = 1, ANY_TENSOR = 7 };          /* TVMFFITypeIndex: None, Int, DLTensorPtr */

typedef struct {
    uint8_t code, bits;
    uint16_t lanes;
} DLDataType;

typedef struct {
    void *data;
    int32_t device_type, device_id;
    int32_t ndim;
    DLDataType dtype;
    int64_t *shape;
    int64_t *strides; /* NULL: compact, in row-major order */
    uint64_t byte_offset;
} DLTensor;

typedef struct {
    int32_t type_index;
    uint32_t padding;
    union {
        int64_t v_int64;
        void *v_ptr;
    };
} TVMFFIAny;

typedef int (*TVMFFISafeCallType)(void *handle, const TVMFFIAny *arguments, int32_t count, TVMFFIAny *result);

typedef struct {
    void *sync_handle;
    int32_t num_task;
} TVMParallelGroupEnv;

typedef int (*FTVMParallelLambda)(int task, TVMParallelGroupEnv *environment, void *data);

/* What a kernel library calls through pointers of these names with "__" before them. */
int TVMBackendParallelLaunch(FTVMParallelLambda lambda, void *data, int tasks);
void *TVMBackendAllocWorkspace(int device_type, int device_id, uint64_t bytes, int code, int bits);
int TVMBackendFreeWorkspace(int device_type, int device_id, void *memory);

#endif
