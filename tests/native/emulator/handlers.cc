// The CUDA kernels as XLA custom calls of platform "cpu", and what workspace they ask for.
#include <mutex>

#include "cuda/scan.h"

namespace jax_sscan {
namespace {

std::mutex one_at_a_time;  // as the emulator can

template <auto kParse, auto kWorkspaceBytes, auto kLaunch>
ffi::Error Run(const Attributes& attributes, ffi::RemainingArgs args, ffi::RemainingRets rets) {
  const auto parsed = kParse(attributes, args, rets);
  if (parsed.has_error()) return parsed.error();
  if (kWorkspaceBytes(parsed.value()) > parsed.value().workspace_bytes)
    return ffi::Error::Internal("the workspace is too small");
  const std::lock_guard lock(one_at_a_time);
  kLaunch(parsed.value(), nullptr);
  return ffi::Error::Success();
}

constexpr auto kForward = Run<ParseForward, gpu::ForwardWorkspace::Enough, gpu::LaunchForward>;
constexpr auto kBackward = Run<ParseBackward, gpu::BackwardWorkspace::Enough, gpu::LaunchBackward>;

auto Binding() { return ffi::Ffi::Bind().Attrs<Attributes>().RemainingArgs().RemainingRets(); }

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(EmulatedForward, kForward, Binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(EmulatedBackward, kBackward, Binding());

extern "C" void EmulatedWorkspaceBytes(int64_t batch, int64_t dim, int64_t length, int64_t dstate,
                                       int64_t groups, int64_t chunk, int64_t instances,
                                       bool channel_last, bool B_varies, bool C_varies,
                                       bool has_segments, bool is_complex, int64_t* bytes) {
  const Problem p =
      MakeProblem(batch, dim, length, dstate, groups, chunk, instances, channel_last, B_varies,
                  C_varies, has_segments, is_complex ? DataType::C64 : DataType::F32);
  bytes[0] = gpu::ForwardWorkspace::Enough(p), bytes[1] = gpu::BackwardWorkspace::Enough(p);
}

}  // namespace jax_sscan
