// The C face of the shim: what host/ calls, and what calls host/ back.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// One product, in plain memory: each of `rows` rows of `out` values is a row of x by one matrix,
// transposed. The same layout stands in product.rs.
typedef struct offbook_product {
  const float* x;
  const uint8_t* codes;
  const float* scales;
  const float* biases;
  const uint32_t* matrix_of_row; // null when there is one matrix
  float* y;
  size_t x_rows; // divides rows: x row i goes to rows i * rows / x_rows and on
  size_t rows;
  size_t inner;
  size_t out;
  size_t matrices;
  uint32_t group_size;
  uint32_t bits;
} offbook_product;

typedef void (*offbook_multiply)(const offbook_product* product);

// An mlx::core::array of `shape` and 32-bit floats that `multiply` fills on `stream`, a CPU stream.
// `inputs` are x, codes, scales, biases, and matrix_of_row if it is given; `sizes` says what shapes do
// not. Null when there is no memory. Never throws.
void* offbook_product_new(
    const offbook_product* sizes,
    offbook_multiply multiply,
    const void* const* inputs,
    size_t input_count,
    const int32_t* shape,
    size_t dimensions,
    const void* stream);

// Causal attention of one sequence's `rows` queries, the last of which sees all `positions`. They lie in
// blocks, each [2 * kv_heads, block_positions, row_words] words of 32 bits, in order along its last axes: all
// heads' keys, then all heads' values. The same layout stands in attention.rs.
typedef struct offbook_attention {
  const float* queries; // [rows, heads, width]
  const uint32_t* const* blocks; // as many as the positions take
  float* out; // [rows, heads, width]
  size_t rows;
  size_t heads;
  size_t kv_heads;
  size_t positions;
  size_t width;
  size_t block_positions;
  size_t row_words;
  size_t group_size; // of codes of 8 bits; 0 where a row is floats
  float scale;
} offbook_attention;

typedef void (*offbook_attend)(const offbook_attention* sequences, size_t count);

// An mlx::core::array [all rows, heads * width] of 32-bit floats that `attend` fills on `stream`, a CPU
// stream. `queries` has the rows of all sequences one after the other; `blocks` are the arrays of all of them,
// in the same order. Null when there is no memory. Never throws.
void* offbook_attention_new(
    const offbook_attention* sequences,
    size_t count,
    offbook_attend attend,
    const void* queries,
    const void* const* blocks,
    const void* stream);

#ifdef __cplusplus
}
#endif
