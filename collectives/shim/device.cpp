// Puts kernels of ours into MLX's graph of arrays, through the door that MLX keeps for that: they run
// on its stream, in its command buffers and graphs, between its own.

#include "device.h"

#include <optional>
#include <string>
#include <vector>

#include "mlx/array.h"
#include "mlx/backend/cuda/cuda.h"
#include "mlx/backend/metal/metal.h"
#include "mlx/device.h"
#include "mlx/fast.h"
#include "mlx/ops.h"

namespace {

namespace mx = mlx::core;

struct CudaKernel {
  std::string name;
  std::string ptx;
};

// A `metal_kernel` of MLX's, which is a function.
struct MetalKernel {
  mx::fast::CustomKernelFunction apply;
};

// MLX passes smaller arrays by value, in another address space than the kernel expects.
constexpr size_t BY_VALUE_BELOW = 8;

mx::array by_reference(const mx::array& operand, mx::Stream stream) {
  if (operand.size() >= BY_VALUE_BELOW) {
    return operand;
  }
  auto flat = mx::reshape(operand, {-1}, stream);
  auto rest = mx::zeros({static_cast<int>(BY_VALUE_BELOW)}, operand.dtype(), stream);
  return mx::concatenate({flat, rest}, stream);
}

} // namespace

extern "C" int32_t offbook_default_device(void) {
  if (mx::default_device() != mx::Device::gpu) {
    return OFFBOOK_CPU;
  }
  if (mx::metal::is_available()) {
    return OFFBOOK_METAL;
  }
  return mx::cu::is_available() ? OFFBOOK_CUDA : OFFBOOK_CPU;
}

extern "C" void* offbook_cuda_kernel_new(const char* name, const char* ptx) {
  try {
    return new CudaKernel{name, ptx};
  } catch (...) {
    return nullptr;
  }
}

extern "C" void offbook_cuda_kernel_free(void* kernel) {
  delete static_cast<CudaKernel*>(kernel);
}

extern "C" int32_t offbook_cuda_launch(
    const void* kernel,
    const offbook_launch* launch,
    const void* operand,
    const void* token,
    const void* stream,
    void** result,
    void** next_token) {
  try {
    auto& cuda = *static_cast<const CudaKernel*>(kernel);
    mx::Dtype dtype(
        static_cast<mx::Dtype::Val>(launch->dtype), static_cast<uint8_t>(launch->item_bytes));
    std::vector<mx::fast::ScalarArg> scalars(
        launch->scalars, launch->scalars + launch->scalar_count);
    auto outputs = mx::fast::precompiled_cuda_kernel(
        cuda.name,
        cuda.ptx,
        {*static_cast<const mx::array*>(operand), *static_cast<const mx::array*>(token)},
        {mx::Shape(launch->shape, launch->shape + launch->dimensions), mx::Shape{1}},
        {dtype, mx::uint32},
        scalars,
        {launch->blocks * launch->threads, 1, 1},
        {launch->threads, 1, 1},
        0,
        std::nullopt,
        true,
        *static_cast<const mx::Stream*>(stream));
    *result = new mx::array(std::move(outputs[0]));
    *next_token = new mx::array(std::move(outputs[1]));
    return 0;
  } catch (...) {
    return 1;
  }
}

extern "C" void* offbook_metal_kernel_new(const char* name, const char* header, const char* body) {
  try {
    return new MetalKernel{mx::fast::metal_kernel(
        name,
        {"operand", "token", "scalars", "memory"},
        {"result", "next_token"},
        body,
        header,
        true,
        false)};
  } catch (...) {
    return nullptr;
  }
}

extern "C" void offbook_metal_kernel_free(void* kernel) {
  delete static_cast<MetalKernel*>(kernel);
}

extern "C" int32_t offbook_metal_launch(
    const void* kernel,
    const offbook_launch* launch,
    const void* operand,
    const void* token,
    const void* memory,
    const void* stream,
    void** result,
    void** next_token) {
  try {
    auto& metal = *static_cast<const MetalKernel*>(kernel);
    auto& on = *static_cast<const mx::Stream*>(stream);
    mx::Dtype dtype(
        static_cast<mx::Dtype::Val>(launch->dtype), static_cast<uint8_t>(launch->item_bytes));
    mx::array scalars(
        launch->scalars, mx::Shape{static_cast<int>(launch->scalar_count)}, mx::uint32);
    auto outputs = metal.apply(
        {by_reference(*static_cast<const mx::array*>(operand), on),
         *static_cast<const mx::array*>(token),
         scalars,
         *static_cast<const mx::array*>(memory)},
        {mx::Shape(launch->shape, launch->shape + launch->dimensions), mx::Shape{1}},
        {dtype, mx::uint32},
        {launch->blocks * launch->threads, 1, 1},
        {launch->threads, 1, 1},
        {},
        std::nullopt,
        false,
        on);
    *result = new mx::array(std::move(outputs[0]));
    *next_token = new mx::array(std::move(outputs[1]));
    return 0;
  } catch (...) {
    return 1;
  }
}
