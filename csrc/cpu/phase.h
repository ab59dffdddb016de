// Runs the tasks of one phase of a call on a thread pool without ever waiting for it: a handler of
// XLA's that blocks on XLA's own pool deadlocks.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <new>

namespace jax_sscan::cpu {

// Pool has num_threads() and Schedule(function), as xla::ffi::ThreadPool does.
template <typename Pool>
class Phase {
 public:
  // Runs task(0) ... task(count - 1), each once and in no order, then done(true) in the thread that
  // ends last; done(false) if memory ran out, with tasks left undone.
  static void Start(Pool pool, int64_t count, std::function<void(int64_t)> task,
                    std::function<void(bool)> done) {
    auto phase = std::make_shared<Phase>(count, std::move(task), std::move(done));
    const int64_t workers = std::clamp<int64_t>(pool.num_threads(), 1, count);
    phase->running_ = workers;
    // The last share of the work runs here: the calling thread is one of XLA's, and free.
    for (int64_t i = 1; i < workers; ++i) pool.Schedule([phase] { phase->Work(); });
    phase->Work();
  }

  Phase(int64_t count, std::function<void(int64_t)> task, std::function<void(bool)> done)
      : count_(count), task_(std::move(task)), done_(std::move(done)) {}

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
    if (running_.fetch_sub(1) == 1) done_(!failed_);
  }

  const int64_t count_;
  const std::function<void(int64_t)> task_;
  const std::function<void(bool)> done_;
  std::atomic<int64_t> next_{0}, running_{0};
  std::atomic<bool> failed_{false};
};

}  // namespace jax_sscan::cpu
