// Puts kernels of ours into MLX's graph of arrays, for a GPU, through the door that MLX keeps for that.

#include "kernels.h"

#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "mlx/array.h"
#include "mlx/backend/cuda/cuda.h"
#include "mlx/backend/metal/metal.h"
#include "mlx/device.h"
#include "mlx/fast.h"

namespace {

namespace mx = mlx::core;

struct Kernel {
  // Of CUDA.
  std::string name;
  std::string cubin;
  // Of Metal.
  mx::fast::CustomKernelFunction apply;
};

std::vector<std::string> strings(const char* const* of, size_t count) {
  return std::vector<std::string>(of, of + count);
}

} // namespace

extern "C" int32_t offbook_kernel_language(void) {
  if (mx::default_device() != mx::Device::gpu) {
    return OFFBOOK_NONE;
  }
  if (mx::metal::is_available()) {
    return OFFBOOK_METAL;
  }
  return mx::cu::is_available() ? OFFBOOK_CUDA : OFFBOOK_NONE;
}

extern "C" void* offbook_cubin_kernel_new(const char* name, const char* cubin, size_t bytes) {
  try {
    return new Kernel{name, std::string(cubin, bytes), {}};
  } catch (...) {
    return nullptr;
  }
}

extern "C" void* offbook_metal_text_kernel_new(const offbook_kernel_text* text) {
  try {
    return new Kernel{
        text->name,
        {},
        mx::fast::metal_kernel(
            text->name,
            strings(text->inputs, text->input_count),
            strings(text->outputs, text->output_count),
            text->body,
            text->header,
            true,
            false)};
  } catch (...) {
    return nullptr;
  }
}

extern "C" void offbook_kernel_free(void* kernel) {
  delete static_cast<Kernel*>(kernel);
}

extern "C" int32_t offbook_kernel_run(
    const void* kernel, const offbook_kernel_launch* launch, const void* stream, void** results) {
  try {
    auto& self = *static_cast<const Kernel*>(kernel);
    auto& on = *static_cast<const mx::Stream*>(stream);
    std::vector<mx::array> inputs;
    inputs.reserve(launch->input_count);
    for (size_t i = 0; i < launch->input_count; ++i) {
      inputs.push_back(*static_cast<const mx::array*>(launch->inputs[i]));
    }
    std::vector<mx::Shape> shapes;
    std::vector<mx::Dtype> dtypes;
    for (size_t i = 0; i < launch->output_count; ++i) {
      auto& output = launch->outputs[i];
      shapes.emplace_back(output.shape, output.shape + output.dimensions);
      dtypes.emplace_back(
          static_cast<mx::Dtype::Val>(output.dtype), static_cast<uint8_t>(output.item_bytes));
    }
    std::tuple<int, int, int> grid{launch->blocks[0] * launch->threads, launch->blocks[1], 1};
    std::tuple<int, int, int> threads{launch->threads, 1, 1};
    std::vector<mx::array> made;
    if (self.apply) {
      made = self.apply(inputs, shapes, dtypes, grid, threads, {}, std::nullopt, false, on);
    } else {
      std::vector<mx::fast::ScalarArg> scalars(
          launch->scalars, launch->scalars + launch->scalar_count);
      made = mx::fast::precompiled_cuda_kernel(
          self.name,
          self.cubin,
          inputs,
          shapes,
          dtypes,
          scalars,
          grid,
          threads,
          0,
          std::nullopt,
          true,
          on);
    }
    for (size_t i = 0; i < launch->output_count; ++i) {
      results[i] = new mx::array(std::move(made[i]));
    }
    return 0;
  } catch (...) {
    return 1;
  }
}
