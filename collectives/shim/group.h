// The C face of the shim: what ffi.rs calls, and what calls ffi.rs back.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Which of MLX's distributed operations is asked for. The same numbers stand in ffi.rs.
enum offbook_call_kind {
  OFFBOOK_ALL_SUM = 0,
  OFFBOOK_ALL_MAX = 1,
  OFFBOOK_ALL_MIN = 2,
  OFFBOOK_ALL_GATHER = 3,
  OFFBOOK_SEND = 4,
};

// One operation, called on the thread of its stream. `output` may be `input`, never a part of it.
typedef struct offbook_call {
  uint32_t kind;
  uint32_t dtype; // an mlx_dtype
  int32_t peer;   // of a send, else -1
  const void* input;
  size_t input_bytes;
  void* output; // null for a send
  size_t output_bytes;
} offbook_call;

// `run` returns 0, or anything else to have the output filled with zeros. Neither throws.
typedef struct offbook_callbacks {
  int32_t (*run)(void* handle, const offbook_call* call);
  void (*release)(void* handle);
} offbook_callbacks;

// A pointer to an mlx::core::distributed::Group, as in mlx_distributed_group, or null when there is
// no memory. It owns `handle` from here on, and releases it with the last operation that needs it.
void* offbook_group_new(void* handle, offbook_callbacks callbacks, int32_t rank, int32_t size);

// Whether this machine has RDMA over Thunderbolt that MLX can use.
int32_t offbook_jaccl_is_available(void);

// MLX's JACCL as an mlx::core::distributed::Group, configured by the environment; its ranks meet
// through `callbacks.run`, which is asked for OFFBOOK_ALL_GATHER of plain bytes. Null when it cannot be
// formed, with the reason in `why`, cut to `why_bytes` and ended by a zero. `handle` as above.
void* offbook_jaccl_new(void* handle, offbook_callbacks callbacks, char* why, size_t why_bytes);

// Puts one variable into the environment of this process; 0 on success.
int32_t offbook_set_environment(const char* name, const char* value);

#ifdef __cplusplus
}
#endif
