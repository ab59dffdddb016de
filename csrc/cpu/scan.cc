#include "cpu/scan.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace jax_sscan::cpu {

namespace {
// The widest block of any instruction set, so that a slice holds whole blocks in all of them.
constexpr int64_t kBlock = 16;
// Blocks enough in a task to share the conversion of B and C.
constexpr int64_t kMostBlocks = 8;
// Steps that are worth the start of a walk, and whose inputs fit L1.
constexpr int64_t kEnoughSteps = 32;
}  // namespace

int64_t EnoughForwardTasks(int64_t threads) {
  return std::clamp<int64_t>(8 * threads, 8, kEnoughTasks);
}

void FoldRows(Problem& p, bool has_states, int64_t enough_tasks) {
  if (has_states || !p.channel_last || p.num_chunks() > 1 || 2 * p.length > kEnoughSteps) return;
  // A divisor of the rows of an instance, so that all sequences are of one length.
  const int64_t rows = p.batch / p.instances;
  const int64_t slices = p.instances * Tasks(p, enough_tasks).slices;
  const int64_t enough = std::min(rows, enough_tasks / slices + 1);
  int64_t sequences = enough;
  while (rows % sequences) ++sequences;
  p.restart_every = p.length;
  p.chunk = kEnoughSteps / p.length * p.length;
  p.length *= rows / sequences;
  p.batch = p.instances * sequences;
}

void LengthenChunks(Forward& p) {
  if (!p.states && !p.restart_every) p.chunk = std::max(p.chunk, kEnoughSteps);
}

Tasks::Tasks(const Problem& p, int64_t enough) {
  const int64_t blocks_per_group = (p.group_dim() + kBlock - 1) / kBlock;
  const int64_t blocks = p.batch * p.groups * blocks_per_group;
  const int64_t blocks_per_slice = std::clamp<int64_t>(blocks / enough, 1, kMostBlocks);
  slice_dim = blocks_per_slice * kBlock;
  slices_per_group = (p.group_dim() + slice_dim - 1) / slice_dim;
  slices = p.groups * slices_per_group;
  // Few parts of the batch, since each brings partial sums of its own.
  const int64_t instance_rows = p.batch / p.instances;
  rows = std::clamp<int64_t>(p.batch * slices / enough, 1, instance_rows);
  parts_per_instance = (instance_rows + rows - 1) / rows;
  parts = p.instances * parts_per_instance;
  count = parts * slices;
  reduce_steps = std::min<int64_t>(p.length, 512);
  reduce_parts = 1;
  if (p.B_varies || p.C_varies)
    reduce_parts += p.batch * ((p.length + reduce_steps - 1) / reduce_steps);
}

Workspace::Workspace(const Problem& p, const Tasks& tasks, void* base) {
  const DataType real_type = ffi::ToReal(p.state);
  const int64_t real = static_cast<int64_t>(ffi::ByteWidth(real_type));
  const int64_t number = static_cast<int64_t>(ffi::ByteWidth(p.state));
  const int64_t weight = tasks.parts * p.dim * p.dstate * number;
  const int64_t varying = p.batch * tasks.slices * p.length * p.dstate * number;
  bytes = 0;
  auto take = [&](int64_t size) {
    char* first = static_cast<char*>(base) + bytes;
    bytes += (size + 63) / 64 * 64;
    return first;
  };
  A = take(weight);
  B = take(p.B_varies ? varying : weight);
  C = take(p.C_varies ? varying : weight);
  D = take(tasks.parts * p.dim * real);
  delta_bias = take(tasks.parts * p.dim * real);
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
