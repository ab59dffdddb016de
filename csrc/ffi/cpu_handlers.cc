// The XLA custom calls of platform "cpu". A call returns a Future; its tasks run on XLA's intra-op
// pool, and whoever ends the last one completes the Future.
#include "ffi/cpu_handlers.h"

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <cstdint>
#include <functional>
#include <new>

#include "cpu/phases.h"
#include "cpu/scan.h"

namespace jax_sscan {
namespace {

ffi::Future Failed(ffi::Error error) {
  ffi::Promise promise;
  ffi::Future future(promise);
  promise.SetError(std::move(error));
  return future;
}

ffi::Error OutOfMemory() {
  return ffi::Error(XLA_FFI_Error_Code_RESOURCE_EXHAUSTED, "jax_sscan: out of memory");
}

// Results are new memory in each call, which the system hands out page by page as they are first
// written: in pages of 4 KB that takes longer than the scan itself. Large pages are asked for where
// the system leaves that to programs, from the size on from which NumPy asks, too.
void PreferLargePages(ffi::RemainingRets rets) {
#ifdef MADV_HUGEPAGE
  constexpr size_t kWorthwhile = size_t{4} << 20;
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  for (size_t i = 0; i < rets.size(); ++i) {
    auto result = rets.get<ffi::AnyBuffer>(i);
    if (result.has_error() || (*result)->size_bytes() < kWorthwhile) continue;
    const uintptr_t data = reinterpret_cast<uintptr_t>((*result)->untyped_data());
    const uintptr_t first = (data + page - 1) / page * page;
    const uintptr_t last = (data + (*result)->size_bytes()) / page * page;
    // A wish; nothing depends on it.
    (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
#else
  (void)rets;
#endif
}

// Completes the promise of a call whose last phase is done.
std::function<void(bool)> Complete(ffi::Promise promise) {
  return [promise](bool completed) mutable {
    if (completed)
      promise.SetAvailable();
    else
      promise.SetError(OutOfMemory());
  };
}

ffi::Future ForwardImpl(ffi::ThreadPool pool, const Attributes& attributes, ffi::RemainingArgs args,
                        ffi::RemainingRets rets) try {
  auto parsed = ParseForward(attributes, args, rets);
  if (parsed.has_error()) return Failed(parsed.error());
  PreferLargePages(rets);
  Forward p = parsed.value();
  const int64_t enough = cpu::EnoughForwardTasks(pool.num_threads());
  cpu::FoldRows(p, p.operands.initial_state || p.last_state, enough);
  cpu::LengthenChunks(p);
  const cpu::Tasks tasks(p, enough);
  ffi::Promise promise;
  ffi::Future future(promise);
  auto forward = [=](int64_t i) { cpu::BestKernels().forward(p, tasks, i); };
  cpu::Phases::Start(pool, {{tasks.count, forward}}, Complete(promise));
  return future;
} catch (const std::bad_alloc&) {
  return Failed(OutOfMemory());
}

ffi::Future BackwardImpl(ffi::ThreadPool pool, const Attributes& attributes,
                         ffi::RemainingArgs args, ffi::RemainingRets rets) try {
  auto parsed = ParseBackward(attributes, args, rets);
  if (parsed.has_error()) return Failed(parsed.error());
  PreferLargePages(rets);
  Backward p = parsed.value();
  cpu::FoldRows(p, p.operands.initial_state || p.last_state_cotangent);
  const cpu::Tasks tasks(p);
  const cpu::Workspace workspace(p, tasks, p.workspace.data);
  if (workspace.bytes > p.workspace_bytes)
    return Failed(ffi::Error::InvalidArgument("jax_sscan backward: the workspace is too small"));
  ffi::Promise promise;
  ffi::Future future(promise);
  auto backward = [=](int64_t i) { cpu::BestKernels().backward(p, tasks, workspace, i); };
  auto reduce = [=](int64_t i) { cpu::BestKernels().reduce(p, tasks, workspace, i); };
  cpu::Phases::Start(pool, {{tasks.count, backward}, {tasks.reduce_parts, reduce}},
                     Complete(promise));
  return future;
} catch (const std::bad_alloc&) {
  return Failed(OutOfMemory());
}

auto Binding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Attrs<Attributes>()
      .RemainingArgs()
      .RemainingRets();
}

XLA_FFI_DEFINE_HANDLER(kForward, ForwardImpl, Binding());
XLA_FFI_DEFINE_HANDLER(kBackward, BackwardImpl, Binding());

}  // namespace

void* CpuForwardHandler() { return reinterpret_cast<void*>(kForward); }
void* CpuBackwardHandler() { return reinterpret_cast<void*>(kBackward); }

int64_t CpuWorkspaceBytes(Problem p, bool has_states) {
  cpu::FoldRows(p, has_states);
  return cpu::Workspace(p, cpu::Tasks(p), nullptr).bytes;
}

const char* CpuTarget() { return cpu::BestKernels().name; }

}  // namespace jax_sscan
