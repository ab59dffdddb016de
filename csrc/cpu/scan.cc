#include "cpu/scan.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace jax_sscan::cpu {

namespace {
// The widest block of any instruction set, so that a slice holds whole blocks in all of them.
constexpr int64_t kBlock = 16;
// Enough tasks to keep many threads busy, and blocks enough in each to share the conversion of B
// and C.
constexpr int64_t kEnoughTasks = 32, kMostBlocks = 8;
}  // namespace

Tasks::Tasks(const Problem& p) {
  const int64_t blocks_per_group = (p.group_dim() + kBlock - 1) / kBlock;
  const int64_t blocks = p.batch * p.groups * blocks_per_group;
  const int64_t blocks_per_slice = std::clamp<int64_t>(blocks / kEnoughTasks, 1, kMostBlocks);
  slice_dim = blocks_per_slice * kBlock;
  slices_per_group = (p.group_dim() + slice_dim - 1) / slice_dim;
  slices = p.groups * slices_per_group;
  count = p.batch * slices;
}

Workspace::Workspace(const Problem& p, const Tasks& tasks, void* base) {
  const DataType real_type = ffi::ToReal(p.state);
  const int64_t real = static_cast<int64_t>(ffi::ByteWidth(real_type));
  const int64_t number = static_cast<int64_t>(ffi::ByteWidth(p.state));
  const int64_t weight = p.batch * p.dim * p.dstate * number;
  const int64_t varying = tasks.count * p.length * p.dstate * number;
  bytes = 0;
  auto take = [&](int64_t size) {
    char* first = static_cast<char*>(base) + bytes;
    bytes += (size + 63) / 64 * 64;
    return first;
  };
  A = take(weight);
  B = take(p.B_varies ? varying : weight);
  C = take(p.C_varies ? varying : weight);
  D = take(p.batch * p.dim * real);
  delta_bias = take(p.batch * p.dim * real);
}

const Kernels& BestKernels() {
  static const Kernels& best = []() -> const Kernels& {
#if defined(__x86_64__)
    const char* wanted = std::getenv("JAX_SSCAN_CPU_TARGET");
    auto allowed = [&](const char* name) { return !wanted || std::strcmp(wanted, name) == 0; };
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        allowed("avx512"))
      return kAvx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && allowed("avx2"))
      return kAvx2;
#endif
    return kBaseline;
  }();
  return best;
}

}  // namespace jax_sscan::cpu
