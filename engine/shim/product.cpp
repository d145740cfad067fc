// Puts a product of ours into MLX's graph of arrays, for the CPU. It decides nothing: when its turn
// comes on the stream, it calls back with plain pointers.

#include "product.h"

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

} // namespace

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
