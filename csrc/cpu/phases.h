// Runs the phases of a call on a thread pool. The thread that starts them only takes part in the
// work: a handler of XLA's that waits for XLA's own pool deadlocks.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

namespace jax_sscan::cpu {

// Tasks 0 ... count - 1 (at least one), in any order and at the same time.
struct Phase {
  int64_t count;
  std::function<void(int64_t)> task;
};

// Phases one after the other. A worker that finds no task left waits until the phase is over; that
// cannot deadlock, since it only waits for tasks that other threads are already running.
class Phases {
 public:
  // done(true) is called once, in the thread that ends last; done(false) if memory ran out.
  //
  // Pool has num_threads() and Schedule(function), as xla::ffi::ThreadPool does. That one is valid
  // in the handler's own call only, and so all workers are scheduled here and now.
  template <typename Pool>
  static void Start(Pool pool, std::vector<Phase> phases, std::function<void(bool)> done) {
    int64_t workers = 1;
    for (const Phase& phase : phases) workers = std::max(workers, phase.count);
    workers = std::min<int64_t>(workers, std::max<int64_t>(1, pool.num_threads()));
    auto run = std::make_shared<Phases>(std::move(phases), std::move(done));
    // The last share of the work runs here: the calling thread is one of XLA's, and free.
    for (int64_t i = 1; i < workers; ++i) pool.Schedule([run] { run->Work(); });
    run->Work();
  }

  Phases(std::vector<Phase> phases, std::function<void(bool)> done)
      : phases_(std::move(phases)), done_(std::move(done)), progress_(phases_.size()) {}

 private:
  struct Progress {
    std::atomic<int64_t> next{0}, completed{0};
  };

  void Work() {
    for (size_t i = 0; i < phases_.size(); ++i) {
      const bool is_last = i + 1 == phases_.size();
      WorkOn(phases_[i], progress_[i], is_last);
      if (is_last) return;
      std::unique_lock<std::mutex> lock(mutex_);
      phase_over_.wait(lock, [&] { return progress_[i].completed == phases_[i].count; });
    }
  }

  void WorkOn(const Phase& phase, Progress& progress, bool is_last) {
    for (;;) {
      const int64_t i = progress.next.fetch_add(1);
      if (i >= phase.count) return;
      try {
        if (!failed_) phase.task(i);
      } catch (const std::bad_alloc&) {
        failed_ = true;
      }
      if (progress.completed.fetch_add(1) + 1 < phase.count) continue;
      if (is_last) return done_(!failed_);
      // Under the lock, so that no worker is between its look at `completed` and its wait.
      std::lock_guard<std::mutex> lock(mutex_);
      phase_over_.notify_all();
    }
  }

  const std::vector<Phase> phases_;
  const std::function<void(bool)> done_;
  std::vector<Progress> progress_;
  std::atomic<bool> failed_{false};
  std::mutex mutex_;
  std::condition_variable phase_over_;
};

}  // namespace jax_sscan::cpu
