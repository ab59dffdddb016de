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

// Phases one after the other. Of each, every worker has a share of neighbouring tasks, and helps
// the others when that is done: so the next call over the same arrays finds most of them in the
// cache of the core that works on them, if it has as many workers. A worker that finds no task left
// waits until the phase is over; that cannot deadlock, since it only waits for tasks that other
// threads are already running.
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
    auto run = std::make_shared<Phases>(std::move(phases), workers, std::move(done));
    // The first share of the work runs here: the calling thread is one of XLA's, and free.
    for (int64_t i = 1; i < workers; ++i) pool.Schedule([run, i] { run->Work(i); });
    run->Work(0);
  }

  Phases(std::vector<Phase> phases, int64_t workers, std::function<void(bool)> done)
      : phases_(std::move(phases)),
        workers_(workers),
        done_(std::move(done)),
        shares_(phases_.size() * static_cast<size_t>(workers)),
        completed_(phases_.size()) {
    for (size_t i = 0; i < phases_.size(); ++i)
      for (int64_t k = 0; k < workers; ++k) {
        ShareOf(i, k).next = phases_[i].count * k / workers;
        ShareOf(i, k).end = phases_[i].count * (k + 1) / workers;
      }
  }

 private:
  struct alignas(64) Share {  // a cache line of its own
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };

  Share& ShareOf(size_t phase, int64_t worker) {
    return shares_[phase * static_cast<size_t>(workers_) + static_cast<size_t>(worker)];
  }

  void Work(int64_t worker) {
    for (size_t i = 0; i < phases_.size(); ++i) {
      for (int64_t k = 0; k < workers_; ++k) WorkOn(i, ShareOf(i, (worker + k) % workers_));
      if (i + 1 == phases_.size()) return;
      std::unique_lock<std::mutex> lock(mutex_);
      phase_over_.wait(lock, [&] { return completed_[i] == phases_[i].count; });
    }
  }

  void WorkOn(size_t phase, Share& share) {
    for (;;) {
      const int64_t i = share.next.fetch_add(1);
      if (i >= share.end) return;
      try {
        if (!failed_) phases_[phase].task(i);
      } catch (const std::bad_alloc&) {
        failed_ = true;
      }
      if (completed_[phase].fetch_add(1) + 1 < phases_[phase].count) continue;
      if (phase + 1 == phases_.size()) return done_(!failed_);
      // Under the lock, so that no worker is between its look at `completed_` and its wait.
      std::lock_guard<std::mutex> lock(mutex_);
      phase_over_.notify_all();
    }
  }

  const std::vector<Phase> phases_;
  const int64_t workers_;
  const std::function<void(bool)> done_;
  std::vector<Share> shares_;                    // of each phase, one per worker
  std::vector<std::atomic<int64_t>> completed_;  // tasks of each phase
  std::atomic<bool> failed_{false};
  std::mutex mutex_;
  std::condition_variable phase_over_;
};

}  // namespace jax_sscan::cpu
