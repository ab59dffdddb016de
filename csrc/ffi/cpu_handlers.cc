// The XLA custom calls of platform "cpu". A call returns a Future at once; its tasks run on XLA's
// intra-op pool, which must never be blocked on. The last task of a phase starts the next one, the
// last of all completes the Future.
#include "ffi/cpu_handlers.h"

#include <algorithm>
#include <atomic>
#include <functional>
#include <memory>
#include <new>

#include "cpu/scan.h"

namespace jax_sscan {
namespace {

// Runs task(0) ... task(count - 1) on the pool, then done(). Errors end the phase and complete the
// promise.
class Phase : public std::enable_shared_from_this<Phase> {
 public:
  static void Start(ffi::ThreadPool pool, ffi::Promise promise, int64_t count,
                    std::function<void(int64_t)> task, std::function<void()> done) {
    auto phase =
        std::make_shared<Phase>(std::move(promise), count, std::move(task), std::move(done));
    const int64_t workers = std::clamp<int64_t>(pool.num_threads(), 1, count);
    phase->running_ = workers;
    // The last share of the work runs here: the calling thread is one of XLA's, and free.
    for (int64_t i = 1; i < workers; ++i) pool.Schedule([phase] { phase->Work(); });
    phase->Work();
  }

  Phase(ffi::Promise promise, int64_t count, std::function<void(int64_t)> task,
        std::function<void()> done)
      : promise_(std::move(promise)),
        count_(count),
        task_(std::move(task)),
        done_(std::move(done)) {}

 private:
  void Work() {
    try {
      while (!failed_) {
        const int64_t i = next_.fetch_add(1);
        if (i >= count_) break;
        task_(i);
      }
    } catch (const std::bad_alloc&) {
      failed_ = true;
    }
    if (running_.fetch_sub(1) != 1) return;
    if (failed_)
      promise_.SetError(
          ffi::Error(XLA_FFI_Error_Code_RESOURCE_EXHAUSTED, "jax_sscan: out of memory"));
    else
      done_();
  }

  ffi::Promise promise_;
  const int64_t count_;
  const std::function<void(int64_t)> task_;
  const std::function<void()> done_;
  std::atomic<int64_t> next_{0}, running_{0};
  std::atomic<bool> failed_{false};
};

ffi::Future Failed(ffi::Error error) {
  ffi::Promise promise;
  ffi::Future future(promise);
  promise.SetError(std::move(error));
  return future;
}

ffi::Future OutOfMemory() {
  return Failed(ffi::Error(XLA_FFI_Error_Code_RESOURCE_EXHAUSTED, "jax_sscan: out of memory"));
}

ffi::Future ForwardImpl(ffi::ThreadPool pool, bool delta_softplus, bool reverse, bool channel_last,
                        int64_t chunk, int64_t groups, int64_t instances, ffi::RemainingArgs args,
                        ffi::RemainingRets rets) try {
  auto parsed =
      ParseForward({delta_softplus, reverse, channel_last, chunk, groups, instances}, args, rets);
  if (parsed.has_error()) return Failed(parsed.error());
  const Forward p = parsed.value();
  const cpu::Tasks tasks(p);
  ffi::Promise promise;
  ffi::Future future(promise);
  Phase::Start(
      pool, promise, tasks.count,
      [p, tasks](int64_t i) { cpu::BestKernels().forward(p, tasks, i); },
      [promise]() mutable { promise.SetAvailable(); });
  return future;
} catch (const std::bad_alloc&) {
  return OutOfMemory();
}

ffi::Future BackwardImpl(ffi::ThreadPool pool, bool delta_softplus, bool reverse, bool channel_last,
                         int64_t chunk, int64_t groups, int64_t instances, ffi::RemainingArgs args,
                         ffi::RemainingRets rets) try {
  auto parsed =
      ParseBackward({delta_softplus, reverse, channel_last, chunk, groups, instances}, args, rets);
  if (parsed.has_error()) return Failed(parsed.error());
  const Backward p = parsed.value();
  const cpu::Tasks tasks(p);
  const cpu::Workspace workspace(p, tasks, p.workspace.data);
  if (workspace.bytes > p.workspace_bytes)
    return Failed(ffi::Error::InvalidArgument("jax_sscan backward: the workspace is too small"));
  ffi::Promise promise;
  ffi::Future future(promise);
  auto reduce = [=] {
    Phase::Start(
        pool, promise, p.batch + 1,
        [=](int64_t i) { cpu::BestKernels().reduce(p, tasks, workspace, i); },
        [promise]() mutable { promise.SetAvailable(); });
  };
  Phase::Start(
      pool, promise, tasks.count,
      [=](int64_t i) { cpu::BestKernels().backward(p, tasks, workspace, i); }, reduce);
  return future;
} catch (const std::bad_alloc&) {
  return OutOfMemory();
}

auto Binding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Attr<bool>("delta_softplus")
      .Attr<bool>("reverse")
      .Attr<bool>("channel_last")
      .Attr<int64_t>("chunk")
      .Attr<int64_t>("groups")
      .Attr<int64_t>("instances")
      .RemainingArgs()
      .RemainingRets();
}

XLA_FFI_DEFINE_HANDLER(kForward, ForwardImpl, Binding());
XLA_FFI_DEFINE_HANDLER(kBackward, BackwardImpl, Binding());

}  // namespace

void* CpuForwardHandler() { return reinterpret_cast<void*>(kForward); }
void* CpuBackwardHandler() { return reinterpret_cast<void*>(kBackward); }

int64_t CpuWorkspaceBytes(const Problem& p) {
  return cpu::Workspace(p, cpu::Tasks(p), nullptr).bytes;
}

const char* CpuTarget() { return cpu::BestKernels().name; }

}  // namespace jax_sscan
