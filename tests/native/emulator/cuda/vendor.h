// Stands in for csrc/cuda/vendor.h where there is no GPU: the same functions, on the threads of
// block.h. With it before csrc on the include path the kernels build as C++.
//
// What it keeps: who meets whom and how many, shuffles, copies that have to be waited for,
// alignment (a wider access than a pointer's aborts), the bits of every rounding but those of
// exponentials and reciprocals. What it does not: all of a block see at once what others wrote, and
// blocks run one after the other. A missing barrier shows if one warp far ahead of the others makes
// a difference; racecheck, on a GPU, sees the rest.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "block.h"

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};

using std::isinf;
using std::isnan;
using std::max;
using std::min;

template <typename To, typename From>
To SameBits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof x);
  return y;
}
inline float __uint_as_float(uint32_t x) { return SameBits<float>(x); }
inline float __int_as_float(int32_t x) { return SameBits<float>(x); }
inline uint32_t __float_as_uint(float x) { return SameBits<uint32_t>(x); }
inline void sincospif(float x, float* sine, float* cosine) {
  constexpr double kPi = 3.14159265358979323846;
  *sine = static_cast<float>(std::sin(kPi * x));
  *cosine = static_cast<float>(std::cos(kPi * x));
}
inline void __syncthreads() { emulator::Meet(0, static_cast<int>(blockDim.x)); }

namespace jax_sscan::gpu {

constexpr int kWarp = emulator::kWarp;

using Stream = void*;
using Error = int;
constexpr Error kSuccess = 0;
constexpr int kSharedOfLaunch = 227 * 1024;

inline void RequireAligned(const void* at, uintptr_t bytes) {
  if (reinterpret_cast<uintptr_t>(at) % bytes) emulator::Fail("an access is not aligned");
}

inline void StoreTogether(float* to, float x, float y) {
  RequireAligned(to, 8);
  to[0] = x, to[1] = y;
}
inline void StoreForLater(float* to, float x) { *to = x; }
template <int kCount>
inline void LoadLastTime(const float* from, float (&to)[kCount]) {
  RequireAligned(from, kCount * sizeof(float));
  std::copy_n(from, kCount, to);
}

inline float Exp2(float x) {
  const float y = std::exp2(x);
  return y < 1.17549435e-38f ? 0.0f : y;  // a NaN stays one
}
inline float Reciprocal(float x) { return 1.0f / x; }

inline float ShuffleXor(float x, int mask) {
  return emulator::Exchange(x)[emulator::Lane() ^ mask];
}
inline uint32_t Ballot(bool x) {
  const float* all = emulator::Exchange(x);
  uint32_t ballot = 0;
  for (int lane = 0; lane < kWarp; ++lane) ballot |= (all[lane] != 0.0f ? 1u : 0u) << lane;
  return ballot;
}

inline float2 FromBfloats(uint32_t pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}
inline uint32_t ToBfloats(float x, float y) {
  auto rounded = [](float x) {
    const uint32_t bits = __float_as_uint(x);
    return isnan(x) ? 0x7fffu : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  };
  return rounded(x) | rounded(y) << 16;
}
inline float2 FromHalves(uint32_t pair) {
  return {_cvtsh_ss(static_cast<uint16_t>(pair)), _cvtsh_ss(static_cast<uint16_t>(pair >> 16))};
}
inline uint32_t ToHalves(float x, float y) {
  return static_cast<uint32_t>(_cvtss_sh(x, 0)) | static_cast<uint32_t>(_cvtss_sh(y, 0)) << 16;
}

inline int Anew(int x) { return x; }
inline int ThreadAnew() { return static_cast<int>(threadIdx.x); }

template <int kThreads, int kPlace = 1>
inline void Meet() {
  emulator::Meet(kPlace, kThreads);
}
inline void Meet(int threads, int place) { emulator::Meet(place, threads); }
inline void MeetWarp(int place) { emulator::Meet(place, kWarp); }
inline void MeetLanes() { emulator::Exchange(0.0f); }
template <int kThreads>
inline bool MeetAny(bool x) {
  return emulator::Meet(1, kThreads, x);
}

template <int kBytes>
inline void CopyAsync(void* to, const void* from, int bytes) {
  RequireAligned(to, kBytes);
  if (bytes) RequireAligned(from, kBytes);
  emulator::CopyLater(to, from, bytes, kBytes);
}
inline void CopyPairAsync(void* to, const void* from, bool words, bool exists) {
  if (words)
    CopyAsync<8>(to, from, exists ? 8 : 0);
  else
    CopyAsync<4>(to, from, exists ? 4 : 0);
}
inline void SendCopies() { emulator::SendCopies(); }
template <int kSentLater = 0>
inline void WaitForCopies() {
  emulator::WaitForCopies(kSentLater);
}

inline void LetNextBegin() {}
inline void WaitForBefore() {}

// An H100's, or, where JAX_SSCAN_EMULATED_LITTLE_SHARED is set, an A100's.
inline int64_t SharedBytesOfBlock() {
  return (std::getenv("JAX_SSCAN_EMULATED_LITTLE_SHARED") ? 163 : 227) * 1024;
}
inline int64_t Multiprocessors() { return 132; }

// Each source has its own, as `memory` of its kernels says. One block runs at a time.
namespace {

alignas(128) char memory[kSharedOfLaunch];

template <typename... Parameters, typename... Arguments>
Error LaunchKernel(void (*kernel)(Parameters...), int64_t blocks, int threads, int bytes, Stream,
                   bool /*early*/, const Arguments&... arguments) {
  if (bytes > kSharedOfLaunch) emulator::Fail("too much shared memory");
  std::memset(memory, 0xff, sizeof memory);
  emulator::Run(blocks, threads, [&] { kernel(arguments...); });
  return kSuccess;
}

}  // namespace

}  // namespace jax_sscan::gpu
