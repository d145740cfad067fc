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

class Attention final : public mx::UnaryPrimitive {
 public:
  Attention(mx::Stream stream, const offbook_attention& sizes, offbook_attend attend)
      : mx::UnaryPrimitive(stream), sizes_(sizes), attend_(attend) {}

  void eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) override {
    out.set_data(mx::allocator::malloc(out.nbytes()));
    auto& keys = inputs[1];
    auto& values = inputs[2];
    if (keys.strides(2) != 1 || values.strides(2) != 1) {
      throw std::runtime_error("[offbook] keys and values must lie in order along their width");
    }
    auto attention = sizes_;
    attention.queries = inputs[0].data<float>();
    attention.keys = keys.data<float>();
    attention.values = values.data<float>();
    attention.out = out.data<float>();
    attention.key_head_stride = keys.strides(0);
    attention.key_stride = keys.strides(1);
    attention.value_head_stride = values.strides(0);
    attention.value_stride = values.strides(1);
    auto& encoder = mx::cpu::get_command_encoder(stream());
    for (auto& input : inputs) {
      encoder.set_input_array(input);
    }
    encoder.set_output_array(out);
    encoder.dispatch([attention, attend = attend_]() { attend(&attention); });
  }
  void eval_gpu(const std::vector<mx::array>&, mx::array&) override {
    throw std::runtime_error("[offbook] this attention is for the CPU");
  }
  const char* name() const override {
    return "OffbookAttention";
  }

 private:
  offbook_attention sizes_;
  offbook_attend attend_;
};

} // namespace

extern "C" void* offbook_attention_new(
    const offbook_attention* sizes,
    offbook_attend attend,
    const void* queries,
    const void* keys,
    const void* values,
    const void* stream) {
  try {
    auto& on = *static_cast<const mx::Stream*>(stream);
    std::vector<mx::array> arrays{
        mx::contiguous(*static_cast<const mx::array*>(queries), false, on),
        *static_cast<const mx::array*>(keys),
        *static_cast<const mx::array*>(values)};
    mx::Shape shape{
        static_cast<int>(sizes->rows), static_cast<int>(sizes->heads * sizes->width)};
    return new mx::array(
        std::move(shape),
        mx::float32,
        std::make_shared<Attention>(on, *sizes, attend),
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
