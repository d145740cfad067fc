// The C face of the device's kernels: what delegate/mlx_kernel.rs calls.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// What MLX computes on by default. The same numbers stand in delegate/mlx_kernel.rs.
enum offbook_device {
  OFFBOOK_CPU = 0,
  OFFBOOK_CUDA = 1,
  OFFBOOK_METAL = 2,
};
int32_t offbook_default_device(void);

// One launch. The kernel takes the addresses of operand, token, result and next token, then the
// scalars. The token is what puts one launch behind the other.
typedef struct offbook_launch {
  const int32_t* scalars;
  size_t scalar_count;
  const int32_t* shape; // of the result
  size_t dimensions;
  uint32_t dtype; // an mlx_dtype
  uint32_t item_bytes;
  int32_t blocks;
  int32_t threads; // per block
} offbook_launch;

// A kernel of CUDA in PTX form, or null when there is no memory.
void* offbook_cuda_kernel_new(const char* name, const char* ptx);
void offbook_cuda_kernel_free(void* kernel);

// Adds one launch to the graph of arrays. All of `operand`, `token`, `result`, `next_token` are the
// `ctx` of an mlx_array, `stream` that of an mlx_stream; the last two arrays are new and the
// caller's. 0 on success.
int32_t offbook_cuda_launch(
    const void* kernel,
    const offbook_launch* launch,
    const void* operand,
    const void* token,
    const void* stream,
    void** result,
    void** next_token);

// A kernel of Metal: what stands before it, and its body.
void* offbook_metal_kernel_new(const char* name, const char* header, const char* body);
void offbook_metal_kernel_free(void* kernel);

// As offbook_cuda_launch. The scalars go as an array, and `memory` is one that the kernel shares with
// the host.
int32_t offbook_metal_launch(
    const void* kernel,
    const offbook_launch* launch,
    const void* operand,
    const void* token,
    const void* memory,
    const void* stream,
    void** result,
    void** next_token);

#ifdef __cplusplus
}
#endif
