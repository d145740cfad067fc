// What the bodies of our kernels are written in, as CUDA has it: no header, no toolkit. metal.h has the same names.
//
// MLX hashes the compiled text at every launch, so a kernel is to be short.
#define BLOCK_X blockIdx.x
#define BLOCK_Y blockIdx.y
#define THREAD threadIdx.x
#define LANE (threadIdx.x % 32)
#define WARP (threadIdx.x / 32)
#define SHARED __shared__
#define BARRIER __syncthreads()

struct bfloat16 {
  unsigned short bits;
  bfloat16() = default;
  __device__ explicit bfloat16(float x) {
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  }
  __device__ operator float() const { return __uint_as_float(unsigned(bits) << 16); }
};

struct float16 {
  unsigned short bits;
  float16() = default;
  __device__ explicit float16(float x) {
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  }
  __device__ operator float() const {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
  }
};

__device__ inline float simd_sum(float x) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffff, x, step);
  return x;
}

__device__ inline float simd_max(float x) {
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, step));
  return x;
}

__device__ inline unsigned simd_min(unsigned x) {
  for (int step = 16; step > 0; step /= 2) x = min(x, __shfl_xor_sync(0xffffffff, x, step));
  return x;
}
