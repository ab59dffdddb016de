// A block of GPU threads on one thread of a CPU: they take turns, and leave off where they wait.
#pragma once

#include <cstdint>
#include <functional>

// As CUDA names them. Of the thread whose turn it is.
struct Index {
  unsigned x;
};
extern Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

constexpr int kWarp = 32;

inline int Lane() { return static_cast<int>(threadIdx.x % kWarp); }

// Runs all threads of all blocks, one block after the other. A warp goes on as long as it can
// before another does, so that none is where it is not made sure to be: in half of the blocks the
// first warps are far ahead of the others, in half of them the last.
void Run(int64_t blocks, int threads, const std::function<void()>& kernel);

// Waits until so many threads have come to that place. Whether any of them says x.
bool Meet(int place, int threads, bool x = false);

// What the lanes of the calling thread's warp have given, once all 32 have; until the next but one
// exchange.
const float* Exchange(float x);

// Copies, and then zeros up to `all` bytes, which are there once the calling thread has sent them
// and waited for all that it sent but the last so many times.
void CopyLater(void* to, const void* from, int bytes, int all);
void SendCopies();
void WaitForCopies(int sent_later);

[[noreturn]] void Fail(const char* what);

}  // namespace emulator
