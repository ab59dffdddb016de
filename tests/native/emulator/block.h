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

// Runs all threads of all blocks, one block after the other.
void Run(int64_t blocks, int threads, const std::function<void()>& kernel);

// Waits until so many threads have come to that place. Whether any of them says x.
bool Meet(int place, int threads, bool x = false);

// What the lanes of the calling thread's warp have given, once all 32 have; until the next but one
// exchange.
const float* Exchange(float x);

[[noreturn]] void Fail(const char* what);

}  // namespace emulator
