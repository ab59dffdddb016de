// The CPU kernels on a thread pool, several calls at a time, for a build with -fsanitize=thread
// (python3 build/build.py sanitize): XLA's own pool is not instrumented, so that a race detector
// sees nothing through it. Also checks that the number of threads changes no bit of any result.
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "cpu/phases.h"
#include "cpu/scan.h"

namespace {

using namespace jax_sscan;

class Pool {
 public:
  explicit Pool(int threads) {
    for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { Run(); });
  }
  ~Pool() {
    Schedule(nullptr);
    for (std::thread& thread : threads_) thread.join();
  }
  void Schedule(std::function<void()> task) {
    std::lock_guard<std::mutex> lock(mutex_);
    tasks_.push_back(std::move(task));
    wake_.notify_one();
  }
  int64_t num_threads() const { return static_cast<int64_t>(threads_.size()); }

 private:
  void Run() {
    for (;;) {
      std::function<void()> task;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [this] { return !tasks_.empty(); });
        task = tasks_.front();
        if (task) tasks_.pop_front();  // the empty one ends every thread
      }
      if (!task) return wake_.notify_one();
      task();
    }
  }
  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::function<void()>> tasks_;
  std::vector<std::thread> threads_;
};

// What Phases takes: a handle that copies.
struct PoolHandle {
  Pool* pool;
  void Schedule(std::function<void()> task) { pool->Schedule(std::move(task)); }
  int64_t num_threads() const { return pool->num_threads(); }
};

// One problem with its arrays; every optional operand is there.
class Call {
 public:
  Call(int64_t batch, int64_t dim, int64_t length, bool channel_last, bool reverse, bool has_states,
       unsigned seed)
      : random_(seed) {
    const int64_t dstate = 5, groups = 2;
    Problem p{};
    p.batch = batch, p.dim = dim, p.length = length, p.dstate = dstate, p.groups = groups;
    p.chunk = std::min<int64_t>(32, length), p.instances = 1;
    p.delta_softplus = true, p.reverse = reverse, p.channel_last = channel_last;
    p.B_varies = p.C_varies = true;
    p.state = DataType::F32;
    const int64_t sequence = batch * dim * length, projection = batch * groups * dstate * length;
    auto operands = [&](float scale) {
      Operands o;
      o.u = New(sequence, scale), o.delta = New(sequence, scale), o.z = New(sequence, scale);
      o.A = New(dim * dstate, -scale), o.D = New(dim, scale), o.delta_bias = New(dim, scale);
      o.B = New(projection, scale), o.C = New(projection, scale);
      if (has_states) o.initial_state = New(batch * dim * dstate, scale);
      return o;
    };
    p.operands = operands(1);
    static_cast<Problem&>(forward_) = static_cast<Problem&>(backward_) = p;
    forward_.out = New(sequence, 0);
    const int64_t states = batch * (p.num_chunks() - 1) * dstate * dim;
    forward_.states = backward_.states = New(states, 0);
    forward_.ungated = backward_.ungated = New(sequence, 0);
    if (has_states) forward_.last_state = New(batch * dim * dstate, 0);
    if (has_states) backward_.last_state_cotangent = New(batch * dim * dstate, 1);
    backward_.out_cotangent = New(sequence, 1);
    backward_.cotangents = operands(0);
    cpu::FoldRows(forward_, has_states);
    cpu::FoldRows(backward_, has_states);
    workspace_.resize(cpu::Workspace(backward_, cpu::Tasks(backward_), nullptr).bytes);
  }

  // Forward, backward and reduction, as the handlers chain them.
  void Start(PoolHandle pool, std::function<void()> done) {
    const cpu::Tasks tasks(forward_);
    const cpu::Workspace workspace(backward_, tasks, workspace_.data());
    const cpu::Kernels& kernels = cpu::BestKernels();
    cpu::Phases::Start(
        pool,
        {{tasks.count, [=, &kernels](int64_t i) { kernels.forward(forward_, tasks, i); }},
         {tasks.count,
          [=, &kernels](int64_t i) { kernels.backward(backward_, tasks, workspace, i); }},
         {tasks.reduce_parts,
          [=, &kernels](int64_t i) { kernels.reduce(backward_, tasks, workspace, i); }}},
        [=](bool) { done(); });
  }

  // The bytes of all results, and of the operands.
  const std::deque<std::vector<float>>& arrays() const { return arrays_; }

 private:
  Array New(int64_t count, float scale) {
    std::uniform_real_distribution<float> draw(0.1f, 1.0f);
    std::vector<float>& array = arrays_.emplace_back(static_cast<size_t>(count));
    for (float& x : array) x = scale * draw(random_);
    return Array{array.data(), DataType::F32};
  }

  std::mt19937 random_;
  std::deque<std::vector<float>> arrays_;
  std::vector<char> workspace_;
  Forward forward_{};
  Backward backward_{};
};

// Runs all problems at once on `threads` threads and returns them.
std::deque<Call> RunAll(int threads) {
  std::deque<Call> calls;
  unsigned seed = 0;
  for (bool channel_last : {true, false})
    for (bool reverse : {false, true})
      for (bool has_states : {false, true}) {
        calls.emplace_back(3, 70, 75, channel_last, reverse, has_states, ++seed);
        calls.emplace_back(48, 20, 3, channel_last, reverse, has_states, ++seed);
      }
  std::mutex mutex;
  std::condition_variable all_done;
  size_t running = calls.size();
  {
    Pool pool(threads);
    for (Call& call : calls)
      pool.Schedule([&call, handle = PoolHandle{&pool}, &mutex, &all_done, &running] {
        call.Start(handle, [&mutex, &all_done, &running] {
          std::lock_guard<std::mutex> lock(mutex);
          if (--running == 0) all_done.notify_one();
        });
      });
    std::unique_lock<std::mutex> lock(mutex);
    all_done.wait(lock, [&] { return running == 0; });
  }
  return calls;
}

}  // namespace

int main() {
  const std::deque<Call> expected = RunAll(1);
  for (int threads : {2, 5, 8}) {
    const std::deque<Call> calls = RunAll(threads);
    for (size_t i = 0; i < calls.size(); ++i)
      for (size_t k = 0; k < calls[i].arrays().size(); ++k) {
        const auto &got = calls[i].arrays()[k], &wanted = expected[i].arrays()[k];
        if (!got.empty() && std::memcmp(got.data(), wanted.data(), got.size() * sizeof(float))) {
          std::printf("call %zu: array %zu differs between 1 and %d threads\n", i, k, threads);
          return 1;
        }
      }
  }
  std::printf("%zu calls, the same bits on 1, 2, 5 and 8 threads\n", expected.size());
}
