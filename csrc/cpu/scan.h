// The native CPU scan: how a problem is cut into tasks, and the kernels that run one.
#pragma once

#include <cstdint>

#include "ffi/scan.h"

namespace jax_sscan::cpu {

// A task is one batch row and one slice of channels of one group; it walks the whole sequence. The
// cut depends on the problem alone, never on threads or instruction sets, so that results do not
// either (sums over tasks are taken in a fixed order, see Reduce).
struct Tasks {
  explicit Tasks(const Problem& p);
  int64_t slice_dim;  // channels of a slice; the last of a group may have fewer
  int64_t slices_per_group;
  int64_t slices;  // of all groups
  int64_t count;   // batch * slices
};

// Sums that cross tasks, as partial sums in float or double: one per task for varying B and C
// (length * dstate), one per batch row for what belongs to a channel.
struct Workspace {
  Workspace(const Problem& p, const Tasks& tasks, void* base);
  // In reals, not numbers: a complex one takes two. Null where nothing of it is needed.
  char *A, *B, *C, *D, *delta_bias;
  int64_t bytes;
};

// The kernels of one instruction set; task in [0, count), part in [0, Parts()).
struct Kernels {
  const char* name;
  void (*forward)(const Forward& p, const Tasks& tasks, int64_t task);
  void (*backward)(const Backward& p, const Tasks& tasks, const Workspace& workspace, int64_t task);
  // Sums the partial sums of one batch row (varying B and C) or of all rows (part == batch).
  void (*reduce)(const Backward& p, const Tasks& tasks, const Workspace& workspace, int64_t part);
};

extern const Kernels kBaseline, kAvx2, kAvx512;

// The best kernels of this processor; JAX_SSCAN_CPU_TARGET=baseline|avx2|avx512 asks for others.
const Kernels& BestKernels();

}  // namespace jax_sscan::cpu
