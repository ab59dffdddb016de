// The CUDA kernels as XLA custom calls of platform "cpu", and what workspace they ask for.
#include <mutex>

#include "cuda/scan.h"

namespace jax_sscan {
namespace {

std::mutex one_at_a_time;  // as the emulator can

template <typename Pass>
ffi::Error Launch(ffi::ErrorOr<Pass> parsed, int64_t workspace_bytes(const Problem&),
                  gpu::Error launch(const Pass&, gpu::Stream)) {
  if (parsed.has_error()) return parsed.error();
  if (workspace_bytes(parsed.value()) > parsed.value().workspace_bytes)
    return ffi::Error::Internal("the workspace is too small");
  const std::lock_guard lock(one_at_a_time);
  launch(parsed.value(), nullptr);
  return ffi::Error::Success();
}

ffi::Error ForwardImpl(bool delta_softplus, bool reverse, bool channel_last, int64_t chunk,
                       int64_t groups, int64_t instances, ffi::RemainingArgs args,
                       ffi::RemainingRets rets) {
  return Launch(
      ParseForward({delta_softplus, reverse, channel_last, chunk, groups, instances}, args, rets),
      gpu::ForwardWorkspace::Enough, gpu::LaunchForward);
}

ffi::Error BackwardImpl(bool delta_softplus, bool reverse, bool channel_last, int64_t chunk,
                        int64_t groups, int64_t instances, ffi::RemainingArgs args,
                        ffi::RemainingRets rets) {
  return Launch(
      ParseBackward({delta_softplus, reverse, channel_last, chunk, groups, instances}, args, rets),
      gpu::BackwardWorkspace::Enough, gpu::LaunchBackward);
}

auto Binding() {
  return ffi::Ffi::Bind()
      .Attr<bool>("delta_softplus")
      .Attr<bool>("reverse")
      .Attr<bool>("channel_last")
      .Attr<int64_t>("chunk")
      .Attr<int64_t>("groups")
      .Attr<int64_t>("instances")
      .RemainingArgs()
      .RemainingRets();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(EmulatedForward, ForwardImpl, Binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(EmulatedBackward, BackwardImpl, Binding());

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
