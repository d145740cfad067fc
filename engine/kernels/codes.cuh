// Products with quantised weights for few rows. MLX's kernel for that takes fewer than eight rows or routes and
// adds up in the type of the activations; from eight on it takes one that is made for many. These add up in
// 32 bits, in an order that does not depend on the number of rows: a row's result is the same in any company.
//
// Weights lie as MLX packs them: a row of codes of BITS is one stream of bits, the lowest first, with a
// scale and a bias for every GROUP of them. A thread takes a piece of 32 codes, which are BITS whole words.

template <int BITS>
struct Codes {
  unsigned words[BITS];

  __device__ void load(const unsigned* from) {
#pragma unroll
    for (int i = 0; i < BITS; ++i) words[i] = from[i];
  }

  // A number below 2^23 is the low bits of the float 2^23 + itself. A code that lies further up in them is
  // that much larger, so that one multiplication and addition, both exact, do without shifting it down.
  __device__ float at(int i) const {
    const int bit = i * BITS, word = bit / 32;
    const unsigned mask = (1u << BITS) - 1;
    unsigned from = words[word];
    int shift = bit % 32;
    if (shift + BITS > 32) {
      from = __funnelshift_r(from, words[word + 1], shift);
      shift = 0;
    } else if (shift + BITS > 23) {
      from >>= 16;
      shift -= 16;
    }
    const float lifted = __uint_as_float(0x4B000000u | (from & (mask << shift)));
    return fmaf(lifted, 1.0f / float(1 << shift), -8388608.0f / float(1 << shift));
  }
};

__device__ inline void load_eight(const float* from, float (&to)[8]) {
  const float4 low = reinterpret_cast<const float4*>(from)[0];
  const float4 high = reinterpret_cast<const float4*>(from)[1];
  to[0] = low.x; to[1] = low.y; to[2] = low.z; to[3] = low.w;
  to[4] = high.x; to[5] = high.y; to[6] = high.z; to[7] = high.w;
}

template <typename Half>
__device__ inline void load_eight(const Half* from, float (&to)[8]) {
  const uint4 raw = *reinterpret_cast<const uint4*>(from);
  const Half* halves = reinterpret_cast<const Half*>(&raw);
#pragma unroll
  for (int i = 0; i < 8; ++i) to[i] = float(halves[i]);
}

// A piece of some rows of weights: codes, and the scale and bias of their group.
template <int OUTS, int BITS>
struct Piece {
  Codes<BITS> codes[OUTS];
  float scale[OUTS], bias[OUTS];

  template <typename S>
  __device__ void load(
      int out, size_t row, unsigned at, unsigned width, int group, const unsigned* weight, const S* scales, const S* biases) {
    codes[out].load(weight + (row * width + at) / 32 * BITS);
    scale[out] = float(scales[(row * width + at) / group]);
    bias[out] = float(biases[(row * width + at) / group]);
  }

  // Adds Σ (scale ∘ code + bias) ∘ x to the sums of up to TILE rows of x, which lie `stride` apart.
  template <int TILE, typename X>
  __device__ void multiply(const X* x, size_t stride, unsigned rows, float (&sums)[TILE][OUTS]) const {
    float products[TILE][OUTS] = {}, channels[TILE] = {};
#pragma unroll
    for (int eighth = 0; eighth < 4; ++eighth) {
      float code[OUTS][8];
#pragma unroll
      for (int out = 0; out < OUTS; ++out) {
#pragma unroll
        for (int i = 0; i < 8; ++i) code[out][i] = codes[out].at(8 * eighth + i);
      }
#pragma unroll
      for (int row = 0; row < TILE; ++row) {
        if (row >= rows) break;
        float values[8];
        load_eight(x + row * stride + 8 * eighth, values);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          channels[row] += values[i];
#pragma unroll
          for (int out = 0; out < OUTS; ++out) {
            products[row][out] = fmaf(values[i], code[out][i], products[row][out]);
          }
        }
      }
    }
#pragma unroll
    for (int row = 0; row < TILE; ++row) {
#pragma unroll
      for (int out = 0; out < OUTS; ++out) {
        sums[row][out] = fmaf(scale[out], products[row][out], fmaf(bias[out], channels[row], sums[row][out]));
      }
    }
  }
};

// Adds up what the threads of a block have: thread `row × OUTS + out` gets that sum.
template <int THREADS, int TILE, int OUTS>
__device__ inline float block_sums(const float (&sums)[TILE][OUTS], float (&of_warps)[THREADS / 32][TILE * OUTS]) {
#pragma unroll
  for (int row = 0; row < TILE; ++row) {
#pragma unroll
    for (int out = 0; out < OUTS; ++out) {
      const float sum = simd_sum(sums[row][out]);
      if (LANE == 0) of_warps[WARP][row * OUTS + out] = sum;
    }
  }
  BARRIER;
  float sum = 0;
  if (THREAD < TILE * OUTS) {
    for (int warp = 0; warp < THREADS / 32; ++warp) sum += of_warps[warp][THREAD];
  }
  return sum;
}
