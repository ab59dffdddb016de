// The native CPU scan: how a problem is cut into tasks, and the kernels that run one.
#pragma once

#include <cstdint>

#include "ffi/scan.h"

namespace jax_sscan::cpu {

// How many tasks are enough to keep many threads busy. A forward pass on few threads is cut into
// fewer, larger ones: a slice that is wider makes more of each page of memory. That changes no bit,
// since none of its sums cross channels.
constexpr int64_t kEnoughTasks = 32;
int64_t EnoughForwardTasks(int64_t threads);

// Short sequences cost more to start than to run. Where batch rows lie behind one another as time
// steps do, and no state enters or leaves them, several become one long sequence whose state
// restarts at every row.
void FoldRows(Problem& p, bool has_states, int64_t enough_tasks = kEnoughTasks);

// A chunk is what a block of channels walks before the next one does, and starting costs. Where no
// states are saved between chunks, they may be longer than the caller's.
void LengthenChunks(Forward& p);

// A task is a slice of channels of one group and some batch rows of one instance, whose sequences
// it walks one after the other. Where sums cross tasks, in the backward pass, the cut depends on
// the problem alone, never on threads or instruction sets, so that results do not either (those
// sums are taken in a fixed order, see Reduce).
struct Tasks {
  explicit Tasks(const Problem& p, int64_t enough = kEnoughTasks);
  int64_t slice_dim;  // channels of a slice; the last of a group may have fewer
  int64_t slices_per_group;
  int64_t slices;  // of all groups
  int64_t rows;    // batch rows of a part; the last of an instance may have fewer
  int64_t parts_per_instance;
  int64_t parts;         // of all instances
  int64_t count;         // parts * slices
  int64_t reduce_steps;  // of the sequence, in one part of the reduction
  int64_t reduce_parts;
};

// Sums that cross tasks, as partial sums in float or double: for varying B and C one per batch row
// and slice (length * dstate), for what belongs to a channel one per part of the batch.
struct Workspace {
  Workspace(const Problem& p, const Tasks& tasks, void* base);
  // In reals, not numbers: a complex one takes two.
  char *A, *B, *C, *D, *delta_bias;
  int64_t bytes;
};

// The kernels of one instruction set; task in [0, count), part in [0, reduce_parts).
struct Kernels {
  const char* name;
  void (*forward)(const Forward& p, const Tasks& tasks, int64_t task);
  void (*backward)(const Backward& p, const Tasks& tasks, const Workspace& workspace, int64_t task);
  // Part 0 sums what belongs to channels, the others varying B and C over some of their steps.
  void (*reduce)(const Backward& p, const Tasks& tasks, const Workspace& workspace, int64_t part);
};

extern const Kernels kBaseline, kAvx2, kAvx512;

// The best kernels of this processor; JAX_SSCAN_CPU_TARGET=baseline|avx2|avx512 asks for others.
const Kernels& BestKernels();

}  // namespace jax_sscan::cpu
