// Plugs a transport written in Rust into MLX's distributed operations. It decides nothing: each
// operation becomes one task on the stream that calls back, in order, with plain pointers.

#include "group.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>

#include "mlx/backend/cpu/encoder.h"
#include "mlx/distributed/distributed.h"
#include "mlx/distributed/distributed_impl.h"
#include "mlx/utils.h"

namespace {

namespace mx = mlx::core;

// The Rust object behind a group; operations in flight share it with the group.
struct Carrier {
  void* handle;
  offbook_callbacks callbacks;

  Carrier(void* handle, offbook_callbacks callbacks)
      : handle(handle), callbacks(callbacks) {}
  Carrier(const Carrier&) = delete;
  ~Carrier() {
    callbacks.release(handle);
  }

  void run(const offbook_call& call) const noexcept {
    if (callbacks.run(handle, &call) != 0 && call.output != nullptr) {
      std::memset(call.output, 0, call.output_bytes);
    }
  }
};

class CarriedGroup final : public mx::distributed::detail::GroupImpl {
 public:
  CarriedGroup(std::shared_ptr<Carrier> carrier, int rank, int size)
      : carrier_(std::move(carrier)), rank_(rank), size_(size) {}

  mx::Stream communication_stream(mx::StreamOrDevice s) override {
    return mx::to_stream(s, mx::Device::cpu);
  }
  int rank() override {
    return rank_;
  }
  int size() override {
    return size_;
  }
  std::shared_ptr<GroupImpl> split(int, int) override {
    throw std::runtime_error("[offbook] a group does not split");
  }

  void all_sum(const mx::array& in, mx::array& out, mx::Stream s) override {
    dispatch(OFFBOOK_ALL_SUM, in, out, s);
  }
  void all_max(const mx::array& in, mx::array& out, mx::Stream s) override {
    dispatch(OFFBOOK_ALL_MAX, in, out, s);
  }
  void all_min(const mx::array& in, mx::array& out, mx::Stream s) override {
    dispatch(OFFBOOK_ALL_MIN, in, out, s);
  }
  void all_gather(const mx::array& in, mx::array& out, mx::Stream s) override {
    dispatch(OFFBOOK_ALL_GATHER, in, out, s);
  }
  void send(const mx::array& in, int peer, mx::Stream s) override {
    auto& encoder = mx::cpu::get_command_encoder(s);
    encoder.set_input_array(in);
    enqueue(
        encoder,
        {OFFBOOK_SEND, dtype_of(in), peer, in.data<char>(), in.nbytes(), nullptr, 0});
  }
  // Both are asked for as a sum in place, see ffi.rs; MLX's own would come here.
  void recv(mx::array&, int, mx::Stream) override {
    throw std::runtime_error("[offbook] receive through the group, not through MLX");
  }
  void sum_scatter(const mx::array&, mx::array&, mx::Stream) override {
    throw std::runtime_error("[offbook] scatter through the group, not through MLX");
  }

 private:
  static uint32_t dtype_of(const mx::array& a) {
    // mlx_dtype numbers the types as Dtype::Val does.
    return static_cast<uint32_t>(a.dtype().val());
  }

  void dispatch(offbook_call_kind kind, const mx::array& in, mx::array& out, mx::Stream s) {
    auto& encoder = mx::cpu::get_command_encoder(s);
    encoder.set_input_array(in);
    encoder.set_output_array(out);
    enqueue(
        encoder,
        {static_cast<uint32_t>(kind),
         dtype_of(in),
         -1,
         in.data<char>(),
         in.nbytes(),
         out.data<char>(),
         out.nbytes()});
  }

  void enqueue(mx::cpu::CommandEncoder& encoder, const offbook_call& call) {
    encoder.dispatch([carrier = carrier_, call]() { carrier->run(call); });
  }

  std::shared_ptr<Carrier> carrier_;
  int rank_;
  int size_;
};

} // namespace

extern "C" void*
offbook_group_new(void* handle, offbook_callbacks callbacks, int32_t rank, int32_t size) {
  try {
    auto carrier = std::make_shared<Carrier>(handle, callbacks);
    return new mx::distributed::Group(
        std::make_shared<CarriedGroup>(std::move(carrier), rank, size));
  } catch (...) {
    return nullptr;
  }
}

extern "C" int32_t offbook_jaccl_is_available(void) {
  try {
    return mx::distributed::is_available("jaccl");
  } catch (...) {
    return 0;
  }
}

extern "C" void*
offbook_jaccl_new(void* handle, offbook_callbacks callbacks, char* why, size_t why_bytes) {
  try {
    auto carrier = std::make_shared<Carrier>(handle, callbacks);
    auto side_channel = [carrier](int, int size) {
      return [carrier, size](const char* ours, char* all, size_t bytes) {
        offbook_call call{
            OFFBOOK_ALL_GATHER,
            static_cast<uint32_t>(mx::Dtype::Val::uint8),
            -1,
            ours,
            bytes,
            all,
            bytes * static_cast<size_t>(size)};
        if (carrier->callbacks.run(carrier->handle, &call) != 0) {
          throw std::runtime_error("the ranks did not meet");
        }
      };
    };
    return new mx::distributed::Group(mx::distributed::init(true, "jaccl", side_channel));
  } catch (const std::exception& error) {
    std::snprintf(why, why_bytes, "%s", error.what());
  } catch (...) {
    std::snprintf(why, why_bytes, "it gave no reason");
  }
  return nullptr;
}

extern "C" int32_t offbook_set_environment(const char* name, const char* value) {
  return setenv(name, value, 1);
}
