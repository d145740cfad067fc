// Puts kernels of ours into MLX's graph of arrays, for the CPU. It decides nothing: when a kernel's turn
// comes on the stream, it calls back with plain pointers.

#include "host.h"

#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#include "mlx/allocator.h"
#include "mlx/array.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/ops.h"
#include "mlx/primitives.h"

namespace {

namespace mx = mlx::core;

class Product final : public mx::UnaryPrimitive {
 public:
  Product(mx::Stream stream, const offbook_product& sizes, offbook_multiply multiply)
      : mx::UnaryPrimitive(stream), sizes_(sizes), multiply_(multiply) {}

  void eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) override {
    out.set_data(mx::allocator::malloc(out.nbytes()));
    auto product = sizes_;
    product.x = inputs[0].data<float>();
    product.codes = inputs[1].data<uint8_t>();
    product.scales = inputs[2].data<float>();
    product.biases = inputs[3].data<float>();
    product.matrix_of_row = inputs.size() > 4 ? inputs[4].data<uint32_t>() : nullptr;
    product.y = out.data<float>();
    auto& encoder = mx::cpu::get_command_encoder(stream());
    for (auto& input : inputs) {
      encoder.set_input_array(input);
    }
    encoder.set_output_array(out);
    encoder.dispatch([product, multiply = multiply_]() { multiply(&product); });
  }
  void eval_gpu(const std::vector<mx::array>&, mx::array&) override {
    throw std::runtime_error("[offbook] this product is for the CPU");
  }
  const char* name() const override {
    return "OffbookProduct";
  }

 private:
  offbook_product sizes_;
  offbook_multiply multiply_;
};

size_t block_count(const offbook_attention& sequence) {
  return (sequence.positions + sequence.block_positions - 1) / sequence.block_positions;
}

class Attention final : public mx::UnaryPrimitive {
 public:
  Attention(mx::Stream stream, std::vector<offbook_attention> sequences, offbook_attend attend)
      : mx::UnaryPrimitive(stream), sequences_(std::move(sequences)), attend_(attend) {}

  void eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) override {
    out.set_data(mx::allocator::malloc(out.nbytes()));
    auto sequences = sequences_;
    std::vector<const uint32_t*> blocks;
    for (size_t i = 1; i < inputs.size(); ++i) {
      if (!inputs[i].flags().row_contiguous) {
        throw std::runtime_error("[offbook] the rows of a cache must lie in order");
      }
      blocks.push_back(inputs[i].data<uint32_t>());
    }
    auto* queries = inputs[0].data<float>();
    auto* place = out.data<float>();
    auto* first = blocks.data();
    for (auto& sequence : sequences) {
      sequence.queries = queries;
      sequence.blocks = first;
      sequence.out = place;
      auto size = sequence.rows * sequence.heads * sequence.width;
      queries += size;
      place += size;
      first += block_count(sequence);
    }
    auto& encoder = mx::cpu::get_command_encoder(stream());
    for (auto& input : inputs) {
      encoder.set_input_array(input);
    }
    encoder.set_output_array(out);
    // To move a vector leaves its elements where they are.
    encoder.dispatch(
        [sequences = std::move(sequences), blocks = std::move(blocks), attend = attend_]() {
          attend(sequences.data(), sequences.size());
        });
  }
  void eval_gpu(const std::vector<mx::array>&, mx::array&) override {
    throw std::runtime_error("[offbook] this attention is for the CPU");
  }
  const char* name() const override {
    return "OffbookAttention";
  }

 private:
  std::vector<offbook_attention> sequences_;
  offbook_attend attend_;
};

} // namespace

extern "C" void* offbook_attention_new(
    const offbook_attention* sequences,
    size_t count,
    offbook_attend attend,
    const void* queries,
    const void* const* blocks,
    const void* stream) {
  try {
    auto& on = *static_cast<const mx::Stream*>(stream);
    std::vector<mx::array> arrays{
        mx::contiguous(*static_cast<const mx::array*>(queries), false, on)};
    size_t rows = 0;
    for (size_t i = 0; i < count; ++i) {
      rows += sequences[i].rows;
      for (auto left = block_count(sequences[i]); left > 0; --left) {
        arrays.push_back(*static_cast<const mx::array*>(*blocks++));
      }
    }
    auto width = sequences[0].heads * sequences[0].width;
    mx::Shape shape{static_cast<int>(rows), static_cast<int>(width)};
    return new mx::array(
        std::move(shape),
        mx::float32,
        std::make_shared<Attention>(
            on, std::vector<offbook_attention>(sequences, sequences + count), attend),
        std::move(arrays));
  } catch (...) {
    return nullptr;
  }
}

extern "C" void* offbook_product_new(
    const offbook_product* sizes,
    offbook_multiply multiply,
    const void* const* inputs,
    size_t input_count,
    const int32_t* shape,
    size_t dimensions,
    const void* stream) {
  try {
    auto& on = *static_cast<const mx::Stream*>(stream);
    std::vector<mx::array> arrays;
    for (size_t i = 0; i < input_count; ++i) {
      // Free where memory is in order already, as weights are.
      arrays.push_back(mx::contiguous(*static_cast<const mx::array*>(inputs[i]), false, on));
    }
    return new mx::array(
        mx::Shape(shape, shape + dimensions),
        mx::float32,
        std::make_shared<Product>(on, *sizes, multiply),
        std::move(arrays));
  } catch (...) {
    return nullptr;
  }
}
