// The XLA custom calls of platform "CUDA": they check, and put kernels on XLA's stream. The same
// kernels with the same arguments each time, nothing allocated, read back or waited for, so that
// XLA may record them in a command buffer.
#include "ffi/cuda_handlers.h"

#include <string>

#include "cuda/scan.h"

namespace jax_sscan {
namespace {

// What the kernels ask of a problem beyond what its parser checks.
ffi::Error CheckProblem(const char* call, const Problem& p, int64_t workspace_bytes) {
  auto fail = [&](const std::string& what) {
    return ffi::Error::InvalidArgument(std::string("jax_sscan ") + call + ": " + what);
  };
  if (p.state != DataType::F32 && p.state != DataType::C64)
    return fail(
        "the CUDA kernels compute in float32 and complex64; use implementation=\"xla\" for more");
  for (const Array& x : {p.operands.u, p.operands.delta, p.operands.z, p.operands.B, p.operands.C})
    if (x.dtype == DataType::F64) return fail("the CUDA kernels take no float64");
  if (p.chunk != gpu::kTile && p.chunk < p.length)
    return fail("saved states must be " + std::to_string(gpu::kTile) + " steps apart, got " +
                std::to_string(p.chunk));
  if (p.dstate > gpu::kMostStates)
    return fail("at most " + std::to_string(gpu::kMostStates) + " states, got " +
                std::to_string(p.dstate));
  if (workspace_bytes > p.workspace_bytes) return fail("the workspace is too small");
  return ffi::Error::Success();
}

ffi::Error Launched(gpu::Error error) {
  if (error == gpu::kSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(std::string("jax_sscan: a CUDA kernel did not start: ") +
                              gpu::Describe(error) +
                              ". If this GPU has less than 164 KB of shared memory a block, as "
                              "consumer GPUs have, it is not "
                              "served: use implementation=\"xla\"");
}

ffi::Error ForwardImpl(gpu::Stream stream, const Attributes& attributes, ffi::RemainingArgs args,
                       ffi::RemainingRets rets) {
  auto parsed = ParseForward(attributes, args, rets);
  if (parsed.has_error()) return parsed.error();
  const Forward& p = parsed.value();
  if (auto error = CheckProblem("forward", p, CudaForwardWorkspaceBytes(p)); error.failure())
    return error;
  return Launched(gpu::LaunchForward(p, stream));
}

ffi::Error BackwardImpl(gpu::Stream stream, const Attributes& attributes, ffi::RemainingArgs args,
                        ffi::RemainingRets rets) {
  auto parsed = ParseBackward(attributes, args, rets);
  if (parsed.has_error()) return parsed.error();
  const Backward& p = parsed.value();
  if (auto error = CheckProblem("backward", p, CudaBackwardWorkspaceBytes(p)); error.failure())
    return error;
  return Launched(gpu::LaunchBackward(p, stream));
}

auto Binding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::PlatformStream<gpu::Stream>>()
      .Attrs<Attributes>()
      .RemainingArgs()
      .RemainingRets();
}

XLA_FFI_DEFINE_HANDLER(kForward, ForwardImpl, Binding(), {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kBackward, BackwardImpl, Binding(), {ffi::Traits::kCmdBufferCompatible});

}  // namespace

void* CudaForwardHandler() { return reinterpret_cast<void*>(kForward); }
void* CudaBackwardHandler() { return reinterpret_cast<void*>(kBackward); }

int64_t CudaForwardWorkspaceBytes(const Problem& p) { return gpu::ForwardWorkspace::Enough(p); }
int64_t CudaBackwardWorkspaceBytes(const Problem& p) { return gpu::BackwardWorkspace::Enough(p); }

}  // namespace jax_sscan
