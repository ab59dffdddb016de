// How a problem is cut up for the GPU, and what its kernels share in workspace. The same plan is
// made where XLA is told of the workspace (Python, no GPU needed) and where kernels start, so that
// it may depend on sizes, layout and which operands vary, not on delta_softplus or reverse. Dtypes
// and the GPU's shared memory are known only in the second place: the first allows for all of them.
#pragma once

#include "ffi/scan.h"

namespace jax_sscan::gpu {

// Steps that a block takes at a time, and steps between two saved states.
constexpr int kTile = 16;

inline bool IsComplex(const Problem& p) { return ffi::ToReal(p.state) != p.state; }

// States that the pass before spans takes at a time, there or not.
constexpr int kPassStates = 16;

// States of a lane of forward's thin walkers, whatever the others have.
constexpr int kThinStates = 2;

// More states do not fit in the forward kernel's shared memory, where they wait their turn (kept in
// step with _MOST_STATES in jax_sscan/backends/native.py).
constexpr int64_t kMostStates = 1024;
// Of those kernels that have no shared memory to spare for more.
constexpr int64_t kMostPlainStates = 128;
// Lines of their tiles, at most.
constexpr int64_t kMostPlainLines = 128;
// Shared memory that a block can have, of an H100 or H200 and of an A100.
constexpr int64_t kSharedBytes = 227 * 1024, kLittleSharedBytes = 163 * 1024;

// What a kernel has to reckon with along the sequence. kGeneral: with everything. kOdd: B and C
// vary and are real, and sizes are not huge. kMixed: what is more, neighbours in memory may be
// moved two at a time. The others are regular: what is more, all is stored in that dtype.
enum class Elements { kGeneral, kOdd, kMixed, kFloat, kBfloat, kHalf };
constexpr bool IsRegular(Elements e) { return e > Elements::kMixed; }

// One way to lay a scan over threads: a channel's states lie on `lanes` lanes of a warp, `states`
// on each, and a lane serves `channels` adjacent channels at once.
struct Shape {
  int states, lanes, channels;
  int group() const { return states * lanes; }  // states taken at a time; more are taken in turn
};

struct Plan {
  Elements elements;
  Shape shape;
  int walkers;           // threads of a block that compute states
  int thin;              // and those of further channels, kThinStates on a lane
  bool alone;            // the kernel for blocks that have a multiprocessor each to themselves
  int block_channels;    // channels of a block, all of one group and batch row
  int blocks_per_group;  // blocks side by side over the channels of a group
  int64_t blocks;        // over batch, groups and channels
  int tiles;             // of kTile steps along the sequence
  int last_steps;        // in the last of them
  // Where batch * dim cannot fill the GPU, the sequence is cut into spans that run at once. A pass
  // before then finds the state (the adjoint, going back) that enters each.
  int spans, span_tiles;
  int pieces, piece_tiles;  // of a span, in that pass
  int state_groups;         // groups of states taken in turn
  bool in_quads;            // what InQuads says, once pointers are known

  // Spans of so many tiles (8192 steps) are long: the pass before them asks whether their end still
  // knows of their beginning. In shorter ones it would mostly ask in vain. It asks where states are
  // few enough to be taken at once, of regular elements without segments.
#ifndef JAX_SSCAN_LONG_SPAN  // tests have no time for as many
#define JAX_SSCAN_LONG_SPAN 512
#endif
  static constexpr int kLongSpan = JAX_SSCAN_LONG_SPAN;
  bool HasLongSpans(const Problem& p) const {
    return IsRegular(elements) && !p.has_segments && span_tiles >= kLongSpan &&
           p.dstate <= kPassStates;
  }

  // elements: what ElementsOf says.
  // little_shared: a block has less than kSharedBytes, for which some kernels want another's place.
  static Plan Forward(const Problem& p, Elements elements);
  static Plan Backward(const Problem& p, Elements elements, bool little_shared);
};

// Parts of the workspace, in bytes from its start. All numbers are float or Complex of them.
struct ForwardWorkspace {
  int64_t ends, sum_delta;  // see Pieces
  int64_t bytes;
  ForwardWorkspace(const Problem& p, const Plan& plan);
  // Enough for whichever plan it will be.
  static int64_t Enough(const Problem& p);
};

struct BackwardWorkspace {
  int64_t ends, sum_delta;  // of adjoints; pieces counted from the end
  // Partial sums: dB and dC (batch, groups, blocks_per_group, length * dstate) where they vary, and
  // (spans, batch, dim, dstate) where they do not; dA like those; dD and d_bias (spans, batch,
  // dim).
  int64_t dA, dB, dC, dD, d_bias;
  // Where states are taken in turn, what those have come to that wait for theirs.
  static constexpr int kWaitingArrays = 5;
  int64_t waiting;
  int64_t bytes;
  BackwardWorkspace(const Problem& p, const Plan& plan);
  static int64_t Enough(const Problem& p);
};

Elements ElementsOf(const Forward& p);
Elements ElementsOf(const Backward& p);

// Whether sequences may be loaded 16 bytes at a time, if they are of one dtype.
bool InQuads(const Forward& p);
bool InQuads(const Backward& p);

}  // namespace jax_sscan::gpu
