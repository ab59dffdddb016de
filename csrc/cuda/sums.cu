// The sums of what the blocks of the backward walk left in the workspace, in their order.
//
// Computes gradients of weights, over batch rows and spans, and of B and C that vary, over blocks
// of channels. All of it is waiting for memory: a warp takes neighbouring numbers, 16 bytes a lane
// where they may be moved at once; a thread has as many loads on their way as its registers allow;
// and where there are many terms, warps share them and add up their parts in shared memory. What
// the blocks left was stored so as to stay in the L2 cache.
#include "cuda/scan.h"
#include "cuda/tile.cuh"

namespace jax_sscan::gpu {
namespace {

// An array that is a sum of what blocks left: `sets` of `count` numbers, each the sum of `terms`.
struct Sums {
  const float* from;
  Array to;
  int64_t sets, count, terms;
  // A set's terms: so many one after the other, then as many `far` further; all in arrays of count.
  int64_t together, far;
  // How numbers lie in `to`: rows of `width`, of which a set has every `interleaved`-th.
  int64_t width, interleaved;
  int vector;    // numbers that a thread takes at once, 4 or 1
  int parts;     // warps that share the terms of a number
  unsigned end;  // of its blocks
};
struct AllSums {
  Sums of[5];  // A, B, C, D, delta_bias
};

constexpr int kSumWarps = 8, kSumThreads = kSumWarps * kWarp;

template <int kVector>
__device__ inline void AddUp(const Sums& sums, int64_t block, float (&parts)[kSumThreads][4]) {
  constexpr int kAtOnce = 8;
  const int warp = threadIdx.x / kWarp, part = warp % sums.parts;
  const int64_t warps = block * (kSumWarps / sums.parts) + warp / sums.parts;
  const int64_t i = (warps * kWarp + threadIdx.x % kWarp) * kVector;
  const bool exists = i < sums.sets * sums.count;
  const int64_t set = sums.sets == 1 ? 0 : i / sums.count, place = i - set * sums.count;
  const float* const from = sums.from + set * sums.together * sums.count + place;
  const int terms = static_cast<int>(sums.terms), together = static_cast<int>(sums.together);
  const int last = exists ? terms * (part + 1) / sums.parts : 0;
  float sum[kVector] = {};
  for (int first = terms * part / sums.parts; first < last; first += kAtOnce) {
    float x[kAtOnce][kVector];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int term = first + k;
      const int64_t at = terms == together ? term : term / together * sums.far + term % together;
#pragma unroll
      for (int v = 0; v < kVector; ++v) x[k][v] = 0.0f;
      if (term < last) LoadLastTime(from + at * sums.count, x[k]);
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k)
#pragma unroll
      for (int v = 0; v < kVector; ++v) sum[v] += x[k][v];
  }
  if (sums.parts > 1) {
#pragma unroll
    for (int v = 0; v < kVector; ++v) parts[threadIdx.x][v] = sum[v];
    __syncthreads();
    if (part == 0)
      for (int other = 1; other < sums.parts; ++other)
#pragma unroll
        for (int v = 0; v < kVector; ++v) sum[v] += parts[threadIdx.x + other * kWarp][v];
  }
  if (!exists || part) return;
  int64_t to = i;
  if (sums.interleaved > 1) {
    const int64_t row = set / sums.interleaved * (sums.count / sums.width) + place / sums.width;
    to = (row * sums.interleaved + set % sums.interleaved) * sums.width + place % sums.width;
  }
  const DataType dtype = sums.to.dtype;
  if (dtype == DataType::BF16 || dtype == DataType::F16) {
    uint16_t* const at = static_cast<uint16_t*>(sums.to.data) + to;
    if constexpr (kVector == 4)
      *reinterpret_cast<uint2*>(at) = {Narrow(sum[0], sum[1], dtype).x,
                                       Narrow(sum[2], sum[3], dtype).x};
    else
      *at = static_cast<uint16_t>(Narrow(sum[0], 0.0f, dtype).x);
  } else {
    float* const at = static_cast<float*>(sums.to.data) + to;
    if constexpr (kVector == 4)
      *reinterpret_cast<float4*>(at) = {sum[0], sum[1], sum[2], sum[3]};
    else
      *at = sum[0];
  }
}

__global__ void __launch_bounds__(kSumThreads) SumKernel(const __grid_constant__ AllSums all) {
  WaitForBefore();
  static __shared__ float parts[kSumThreads][4];
  int array = 0;
  while (blockIdx.x >= all.of[array].end) ++array;
  const Sums& sums = all.of[array];
  const int64_t block = blockIdx.x - (array ? all.of[array - 1].end : 0);
  if (sums.vector == 4)
    AddUp<4>(sums, block, parts);
  else
    AddUp<1>(sums, block, parts);
}

}  // namespace

Error LaunchSums(const Backward& p, const Plan& plan, const BackwardWorkspace& workspace,
                 Stream stream) {
  const int64_t width = p.dstate * (IsComplex(p) ? 2 : 1), rows = p.batch / p.instances;
  const char* const base = static_cast<const char*>(p.workspace.data);
  auto from = [&](int64_t at) { return reinterpret_cast<const float*>(base + at); };
  // Gradients of weights: over the spans and batch rows of an instance.
  auto weight = [&](int64_t at, const Array& to, int64_t width) -> Sums {
    return {from(at), to, to ? p.instances : 0, p.dim * width, plan.spans * rows, rows, p.batch,
            width,    1};
  };
  // Varying dB and dC: over the blocks of a group.
  auto matrix = [&](int64_t at, const Array& to, bool varies) -> Sums {
    if (!varies) return weight(at, to, width);
    const int64_t blocks = plan.blocks_per_group;
    return {from(at), to,    p.batch * p.groups,           p.length * width, blocks, blocks,
            0,        width, p.channel_last ? p.groups : 1};
  };
  const Operands& ct = p.cotangents;
  AllSums all{{weight(workspace.dA, ct.A, width), matrix(workspace.dB, ct.B, p.B_varies),
               matrix(workspace.dC, ct.C, p.C_varies), weight(workspace.dD, ct.D, 1),
               weight(workspace.d_bias, ct.delta_bias, 1)}};
  int64_t end = 0;
  for (Sums& sums : all.of) {
    // What lies together is taken together, if it does so everywhere.
    const bool aligned = reinterpret_cast<uintptr_t>(sums.from) % 16 == 0 &&
                         reinterpret_cast<uintptr_t>(sums.to.data) % 16 == 0;
    const int64_t neighbours = sums.interleaved > 1 ? sums.width : sums.count;
    sums.vector = aligned && neighbours % 4 == 0 ? 4 : 1;
    sums.parts = 1;
    while (sums.parts < kSumWarps && sums.terms > 8 * sums.parts) sums.parts *= 2;
    const int64_t of_block = kSumThreads / sums.parts * sums.vector;
    end += (sums.sets * sums.count + of_block - 1) / of_block;
    sums.end = static_cast<unsigned>(end);
  }
  return LaunchKernel(SumKernel, end, kSumThreads, 0, stream, true, all);
}

}  // namespace jax_sscan::gpu
