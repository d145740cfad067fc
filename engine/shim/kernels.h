// The C face of kernels of ours for a GPU: what kernels/device.rs calls.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum offbook_language { OFFBOOK_NONE = 0, OFFBOOK_CUDA = 1, OFFBOOK_METAL = 2 } offbook_language;

// What kernels for MLX's default device are written in. The same numbers stand in device.rs.
int32_t offbook_kernel_language(void);

// A kernel of CUDA that is compiled: a cubin, whose entry is called `name`. Null when there is no memory.
void* offbook_cubin_kernel_new(const char* name, const char* cubin, size_t bytes);

// The text of a kernel of Metal: MLX writes its signature, from the names of inputs and outputs.
typedef struct offbook_kernel_text {
  const char* name;
  const char* header;
  const char* body;
  const char* const* inputs;
  size_t input_count;
  const char* const* outputs;
  size_t output_count;
} offbook_kernel_text;

// Null where MLX has no Metal, or no memory.
void* offbook_metal_text_kernel_new(const offbook_kernel_text* text);
void offbook_kernel_free(void* kernel);

typedef struct offbook_kernel_output {
  const int32_t* shape;
  size_t dimensions;
  uint32_t dtype; // an mlx_dtype
  uint32_t item_bytes;
} offbook_kernel_output;

// One launch: `blocks` blocks of `threads` threads. Each input is the `ctx` of an mlx_array. The scalars are for
// kernels of CUDA, which take them behind inputs and outputs.
typedef struct offbook_kernel_launch {
  const void* const* inputs;
  size_t input_count;
  const offbook_kernel_output* outputs;
  size_t output_count;
  const int32_t* scalars;
  size_t scalar_count;
  int32_t blocks[2];
  int32_t threads;
} offbook_kernel_launch;

// Adds it to the graph of arrays. `stream` is the `ctx` of an mlx_stream; the results are arrays that are new and
// the caller's. 0 on success.
int32_t offbook_kernel_run(
    const void* kernel, const offbook_kernel_launch* launch, const void* stream, void** results);

#ifdef __cplusplus
}
#endif
