// The forward kernel.
//
// Computes, per batch row b, channel d and state n, in processing order t,
//     h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t,   out_t = (sum_n C_t h_t + D u_t) silu(z_t)
// (twice the real part of the sum where A is complex).
//
// Work: a block takes one batch row, some channels of one group and one span of the sequence, tile
// by tile. A channel's states lie on kLanes lanes, kStates on each, and stay in registers; a lane
// serves kPerLane adjacent channels, which share the loads of B and C; time runs in order. More
// states than kStates * kLanes are taken in turn, tile by tile, and wait in shared memory.
//
// Shared memory, twice, for the tile that is walked and for the one that is staged meanwhile: delta
// and delta * u (softplus and bias done), B and C, y, and what makes out of y. Staging, and skip
// and gate of the tile before, lie between the steps of the walk, so that the waits of one are
// filled by the other; one barrier per tile.
//
// Cost per (b, d, t, n): one exp2, two multiplies, two FMAs, and (with 4 states) 2.5 registers from
// shared memory, 1.5 with two channels to a lane; a multiprocessor moves one such register of a
// warp per cycle, which with the issue of instructions is what bounds this kernel. Per (b, d, t):
// staging, about 50 instructions, and the sum over lanes (3 shuffles per 4 steps at 4 lanes).
#include "cuda/scan.h"
#include "cuda/tile.cuh"

namespace jax_sscan::gpu {
namespace {

// kElements: kMixed for a kernel that takes everything; otherwise B and C vary along the sequence,
// all arrays but the weights have that dtype, and nothing restarts.
template <typename Number, int kStates, int kLanes, int kPerLane, int kThreads, Elements kElements,
          Layout kLayout>
struct ForwardShared {
  static constexpr int kChannels = kThreads / kLanes * kPerLane, kGroup = kStates * kLanes;
  static constexpr bool kPlain = kElements != Elements::kMixed;
  // Against bank conflicts: of y's stores (8), of pairs of steps.
  static constexpr int kPad = kLayout == Layout::kChannelLast ? 8 : kPlain && kPerLane == 1 ? 1 : 2;
  using Sequences = Tile<kThreads, kChannels, kPad, kElements, kLayout>;
  using Projections = Tile<kThreads, kGroup * NumberTraits<Number>::kParts, 4, kElements, kLayout>;
  static constexpr int kStep = Sequences::kRow;
  // Numbers of a row of B or C; rows are steps, or channels for a fixed one.
  static constexpr int kRow = Projections::kRow / NumberTraits<Number>::kParts;
  static constexpr int kRows = kPlain || kTile > kChannels ? kTile : kChannels;
  struct Staged {
    alignas(16) float2 steps[Sequences::kCells];  // delta, delta * u
    alignas(16) float y[Sequences::kCells];
    // out = y * x + y for the two elements of a thread's pair, read back by that thread.
    alignas(16) float4 gates[Sequences::kCount * kThreads];
    uint32_t restarts;
  };
  struct StagedProjections {
    alignas(16) Number B[kRows * kRow];
    alignas(16) Number C[kRows * kRow];
  };
  // One is walked, the other staged.
  Staged sequences[2];
  StagedProjections projections[2];
  // What comes next, as it lies in memory.
  typename Sequences::Slot u[Sequences::kCount * kThreads];
  typename Sequences::Slot delta[Sequences::kCount * kThreads];
  typename Sequences::Slot z[Sequences::kCount * kThreads];
  typename Projections::Slot B[Projections::kCount * kThreads];
  typename Projections::Slot C[Projections::kCount * kThreads];
  float2 vectors[kChannels];  // D, delta_bias
};

template <typename Number, int kStates, int kLanes, int kPerLane, int kThreads, Elements kElements,
          Layout kLayout>
__global__ void __launch_bounds__(kThreads, kPerLane > 1 ? 3 : 4)
    ForwardKernel(const __grid_constant__ Forward p, const __grid_constant__ Plan plan,
                  const Number* __restrict__ carry) {
  using Shared = ForwardShared<Number, kStates, kLanes, kPerLane, kThreads, kElements, kLayout>;
  using Sequences = typename Shared::Sequences;
  using Projections = typename Shared::Projections;
  constexpr int kChannels = Shared::kChannels, kGroup = Shared::kGroup, kRow = Shared::kRow;
  constexpr bool kPlain = Shared::kPlain;
  constexpr int kStep = Shared::kStep, kParts = NumberTraits<Number>::kParts;
  extern __shared__ char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  // Only where there are several groups of states: (groups, kStates, threads).
  Number* waiting = reinterpret_cast<Number*>(memory + sizeof(Shared)) + threadIdx.x;

  const Operands& o = p.operands;
  const Block block(p, plan);
  const Lines lines = SequenceLines(p, block);
  const Sequences sequences(lines, p.reverse);
  const Projections projections(ProjectionLines<kParts>(p, block), p.reverse);
  StageVectors<kThreads, kChannels>(p, block, shared.vectors);
  const int lane = threadIdx.x % kLanes, channel = threadIdx.x / kLanes * kPerLane;
  const bool has_z = o.z.data != nullptr;
  const bool B_varies = kPlain || p.B_varies, C_varies = kPlain || p.C_varies;
  // 16 states or fewer are always one group.
  const int groups = kPlain && kGroup <= 16 ? 1 : plan.state_groups;

  const int first_tile = static_cast<int>(block.span) * plan.span_tiles;
  const int last_tile =
      first_tile + plan.span_tiles < plan.tiles ? first_tile + plan.span_tiles : plan.tiles;
  auto rows_of = [&](int tile) { return Rows(p, plan, tile, p.reverse, tile < last_tile); };

  Number rate[kPerLane][kStates], h[kPerLane][kStates];
  auto each = [&](int group, auto body) {
#pragma unroll
    for (int j = 0; j < kPerLane; ++j)
#pragma unroll
      for (int i = 0; i < kStates; ++i)
        body(j, i, static_cast<int64_t>(group) * kGroup + lane * kStates + i);
  };
  auto exists = [&](int j, int64_t n) { return channel + j < block.channels && n < p.dstate; };
  auto load_group = [&](int group) {
    each(group, [&](int j, int i, int64_t n) {
      rate[j][i] = Rate(LoadWeight<Number>(o.A, p, block, channel + j, n));
    });
  };
  auto place_of = [&](int group, int j, int i) {
    return ((group * kPerLane + j) * kStates + i) * kThreads;
  };
  for (int group = 0; group < groups; ++group) {
    each(group, [&](int j, int i, int64_t n) {
      Number x{};
      if (exists(j, n)) {
        if (block.span)
          x = carry[TransposedIndex(p, block, (block.span - 1) * p.batch + block.row, channel + j,
                                    n)];
        else if (o.initial_state.data)
          x = static_cast<const Number*>(
              o.initial_state.data)[StateIndex(p, block, channel + j, n)];
      }
      h[j][i] = x;
      if (groups > 1) waiting[place_of(group, j, i)] = x;
    });
  }
  load_group(0);

  int64_t next_sequences = sequences.At(rows_of(first_tile));
  auto load_sequences = [&](const Rows& rows) {
    sequences.Prefetch(o.u, next_sequences, rows, shared.u);
    sequences.Prefetch(o.delta, next_sequences, rows, shared.delta);
    sequences.Prefetch(o.z, next_sequences, rows, shared.z, 0, has_z);
    next_sequences += sequences.Stride();
  };
  int64_t next_projections = projections.At(rows_of(first_tile));
  auto load_projections = [&](const Rows& rows, int group) {
    const int line = group * kGroup * kParts;
    const int64_t at = groups > 1 ? projections.At(rows, line) : next_projections;
    projections.Prefetch(o.B, at, rows, shared.B, line, B_varies);
    projections.Prefetch(o.C, at, rows, shared.C, line, C_varies);
    SendCopies();
    next_projections += projections.Stride();
  };
  // D and delta_bias of the elements that this thread stages.
  constexpr int kPairs = Sequences::kCount, kProjectionPairs = Projections::kCount;
  float2 vectors[kPairs][2] = {};
  auto stage_sequences = [&](const Rows& rows, int k, typename Shared::Staged& to) {
    if (!sequences.Mine(k)) return;
    const float2 input = sequences.Widen(sequences.Take(shared.u, k), o.u);
    const float2 first = vectors[k][0], second = vectors[k][1];
    float2 value = sequences.Widen(sequences.Take(shared.delta, k), o.delta);
    value = {value.x + first.y, value.y + second.y};
    // No branches here: they would keep steps and staging apart.
    const float2 softplus{Softplus<kExact<kElements>>(value.x).value,
                          Softplus<kExact<kElements>>(value.y).value};
    value = p.delta_softplus ? softplus : value;
    // Steps that are not there have delta 0, whatever the bias.
    value = {sequences.Exists(k, 0, rows) ? value.x : 0.0f,
             sequences.Exists(k, 1, rows) ? value.y : 0.0f};
    sequences.Put(to.steps, k, {value.x, value.x * input.x}, {value.y, value.y * input.y});
    const float2 x = sequences.Widen(sequences.Take(shared.z, k), o.z);
    float2 gate{x.x * Sigmoid<kExact<kElements>>(x.x), x.y * Sigmoid<kExact<kElements>>(x.y)};
    gate = has_z ? gate : float2{1.0f, 1.0f};
    to.gates[k * kThreads + threadIdx.x] = {gate.x * kParts, first.x * input.x * gate.x,
                                            gate.y * kParts, second.x * input.y * gate.y};
  };
  int64_t finished = next_sequences - sequences.Stride();
  auto finish = [&](const Rows& rows, int k, const typename Shared::Staged& from) {
    if (!sequences.Mine(k)) return;
    const float2 y = sequences.Get(from.y, k);
    const float4 gate = from.gates[k * kThreads + threadIdx.x];
    sequences.Store(p.out, finished, rows, k, fmaf(y.x, gate.x, gate.y), fmaf(y.y, gate.z, gate.w));
  };
  auto stage_varying = [&](int k, typename Shared::StagedProjections& to) {
    if (B_varies) {
      const float2 x = projections.Widen(projections.Take(shared.B, k), o.B);
      projections.Put(reinterpret_cast<float*>(to.B), k, x.x, x.y);
    }
    if (C_varies) {
      const float2 x = projections.Widen(projections.Take(shared.C, k), o.C);
      projections.Put(reinterpret_cast<float*>(to.C), k, x.x, x.y);
    }
  };
  auto stage_fixed = [&](int group, typename Shared::StagedProjections& to) {
    auto stage = [&](const Array& from, Number* at) {
      StageFixed<Number, kThreads, kChannels, kGroup, kRow>(p, block, from, group * kGroup, at);
    };
    if (!B_varies) stage(o.B, to.B);
    if (!C_varies) stage(o.C, to.C);
  };
  auto stage_restarts = [&](const Rows& rows, typename Shared::Staged& to) {
    if (kPlain || !p.has_segments || threadIdx.x >= kWarp) return;
    const uint32_t restarts = Restarts(p, block.row, rows);
    if (threadIdx.x == 0) to.restarts = restarts;
  };

  load_sequences(rows_of(first_tile));
  load_projections(rows_of(first_tile), 0);
  WaitForCopies();
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kPairs; ++k) {
    if (!sequences.Mine(k)) continue;
    vectors[k][0] = shared.vectors[sequences.LineOf(k, 0)];
    vectors[k][1] = shared.vectors[sequences.LineOf(k, 1)];
  }
#pragma unroll
  for (int k = 0; k < kPairs; ++k) stage_sequences(rows_of(first_tile), k, shared.sequences[0]);
#pragma unroll
  for (int k = 0; k < kProjectionPairs; ++k) stage_varying(k, shared.projections[0]);
  stage_fixed(0, shared.projections[0]);
  stage_restarts(rows_of(first_tile), shared.sequences[0]);

  // Sums of y over lanes are made for kSum steps at once; this lane comes to hold kHeld of them,
  // from first_row on.
  constexpr int kSum = kLanes <= 4 ? 4 : kLanes, kHeld = kSum / kLanes;
  int first_row = 0;
#pragma unroll
  for (int bit = 1, half = kSum / 2; bit < kLanes; bit *= 2, half /= 2)
    first_row += lane & bit ? half : 0;
  int turn = 0;  // of the projections' buffers
  for (int tile = first_tile; tile < last_tile; ++tile) {
    const Rows next = rows_of(tile + 1), previous(p, plan, tile - 1, p.reverse, tile > first_tile);
    typename Shared::Staged& staged = shared.sequences[(tile - first_tile) & 1];
    typename Shared::Staged& staging = shared.sequences[(tile - first_tile + 1) & 1];
    for (int group = 0; group < groups; ++group, turn ^= 1) {
      const bool last_group = group + 1 == groups;
      const typename Shared::StagedProjections& staged_projections = shared.projections[turn];
      typename Shared::StagedProjections& staging_projections = shared.projections[turn ^ 1];
      if (groups > 1) {
        load_group(group);
        each(group, [&](int j, int i, int64_t) { h[j][i] = waiting[place_of(group, j, i)]; });
      }
      if (p.states.data && tile) {
        const int saved = p.reverse ? plan.tiles - 1 - tile : tile - 1;
        each(group, [&](int j, int i, int64_t n) {
          if (exists(j, n))
            static_cast<Number*>(p.states.data)[TransposedIndex(
                p, block, block.row * (plan.tiles - 1) + saved, channel + j, n)] = h[j][i];
        });
      }
      // What was staged is there, and everyone is done with what lay where now is staged.
      __syncthreads();
      // Loaded here, staged in the second half of the walk.
      if (last_group) load_sequences(next);
      load_projections(last_group ? next : rows_of(tile), last_group ? 0 : group + 1);
      uint32_t restarts = 0;
      if (!kPlain && p.has_segments) restarts = staged.restarts;
      if (!kPlain) {
        stage_fixed(last_group ? 0 : group + 1, staging_projections);
        if (last_group) stage_restarts(next, staging);
      }

      auto load = [&](const Number* from, bool varies, int row, Number(&to)[kPerLane][kStates]) {
#pragma unroll
        for (int j = 0; j < kPerLane; ++j) {
          if (j && kPlain) {
#pragma unroll
            for (int n = 0; n < kStates; ++n) to[j][n] = to[0][n];
          } else {
            LoadStates(from + lane * kStates + (varies ? row : channel + j) * kRow, to[j]);
          }
        }
      };
      struct Step {
        float2 step[kPerLane];
        Number b[kPerLane][kStates], c[kPerLane][kStates];
      };
      auto load_step = [&](int i, Step& to) {
        if constexpr (kPerLane == 2) {
          const float4 x = *reinterpret_cast<const float4*>(staged.steps + i * kStep + channel);
          to.step[0] = {x.x, x.y}, to.step[1] = {x.z, x.w};
        } else {
          to.step[0] = staged.steps[i * kStep + channel];
        }
        load(staged_projections.B, B_varies, i, to.b);
        load(staged_projections.C, C_varies, i, to.c);
      };
      float y[kPerLane][kSum];
      auto sum_over_lanes = [&](int first) {
#pragma unroll
        for (int j = 0; j < kPerLane; ++j) SumHalves<kSum, 0, 1, kLanes>(y[j]);
#pragma unroll
        for (int k = 0; k < kHeld; ++k) {
          float* to = staged.y + (first + first_row + k) * kStep + channel;
          if constexpr (kPerLane == 2) {
            float2 sum{y[0][k], y[1][k]};
            if (group) {
              const float2 before = *reinterpret_cast<const float2*>(to);
              sum = {sum.x + before.x, sum.y + before.y};
            }
            *reinterpret_cast<float2*>(to) = sum;
          } else {
            *to = group ? *to + y[0][k] : y[0][k];
          }
        }
      };
      // Between the steps of this tile the one before is finished and the next one staged, so that
      // the waits of one are filled by another.
      constexpr int kJobs = kPairs + kProjectionPairs, kSpacing = 2 * kJobs <= kTile / 2 ? 2 : 1;
      static_assert(kJobs <= kTile / 2);
      auto job = [&](int i) {
        if (i >= 1 && i <= kPairs && group == 0) finish(previous, i - 1, staging);
        const int stage = (i - kTile / 2) / kSpacing;
        if (i < kTile / 2 || (i - kTile / 2) % kSpacing) return;
        if (i == kTile / 2) WaitForCopies();
        if (stage < kPairs && last_group) stage_sequences(next, stage, staging);
        if (stage >= kPairs && stage < kJobs) stage_varying(stage - kPairs, staging_projections);
      };
      Step now, then;
      load_step(0, now);
#pragma unroll
      for (int i = 0; i < kTile; ++i) {
        // Loaded a step ahead, since the compiler moves no load across a store.
        if (i + 1 < kTile) load_step(i + 1, then);
        if (i && i % kSum == 0) sum_over_lanes(i - kSum);
        job(i);
#pragma unroll
        for (int j = 0; j < kPerLane; ++j) {
          float sum = 0.0f;
#pragma unroll
          for (int n = 0; n < kStates; ++n) {
            if constexpr (!kPlain) h[j][n] = Unless(restarts & 1u << i, h[j][n]);
            h[j][n] =
                MultiplyAdd(Decay(rate[j][n], now.step[j].x), h[j][n], now.b[j][n] * now.step[j].y);
            sum = RealMultiplyAdd(now.c[j][n], h[j][n], sum);
          }
          y[j][i % kSum] = sum;
        }
        now = then;
      }
      sum_over_lanes(kTile - kSum);
      if (groups > 1) {
        each(group, [&](int j, int i, int64_t) { waiting[place_of(group, j, i)] = h[j][i]; });
      }
    }

    finished += sequences.Stride();
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kPairs; ++k)
    finish(Rows(p, plan, last_tile - 1, p.reverse), k,
           shared.sequences[(last_tile - 1 - first_tile) & 1]);

  if (p.last_state.data && block.span == plan.spans - 1) {
    for (int group = 0; group < groups; ++group) {
      each(group, [&](int j, int i, int64_t n) {
        const Number x = groups > 1 ? waiting[place_of(group, j, i)] : h[j][i];
        if (exists(j, n))
          static_cast<Number*>(p.last_state.data)[StateIndex(p, block, channel + j, n)] = x;
      });
    }
  }
}

template <typename Number, int kStates, int kLanes, int kPerLane, Elements kElements,
          Layout kLayout>
Error Launch(const Forward& p, const Plan& plan, const void* carry, Stream stream) {
  constexpr int kThreads = 128;
  const auto kernel =
      ForwardKernel<Number, kStates, kLanes, kPerLane, kThreads, kElements, kLayout>;
  constexpr int kShared =
      sizeof(ForwardShared<Number, kStates, kLanes, kPerLane, kThreads, kElements, kLayout>);
  constexpr int kWaiting = kStates * kPerLane * kThreads * sizeof(Number);
  constexpr int kMost = kElements == Elements::kMixed ? kMostStates : kMostPlainStates;
  static_assert(kShared + kMost / (kStates * kLanes) * kWaiting <= kSharedBytes);
  const int bytes = kShared + (plan.state_groups > 1 ? plan.state_groups * kWaiting : 0);
  if (const Error error = AllowSharedBytes(kernel, bytes); error != kSuccess) return error;
  kernel<<<static_cast<unsigned>(plan.blocks * plan.spans), kThreads, bytes, stream>>>(
      p, plan, static_cast<const Number*>(carry));
  return LastError();
}

template <Elements kElements, Layout kLayout>
Error LaunchRegular(const Forward& p, const Plan& plan, const void* carry, Stream stream) {
  switch (plan.shape.lanes) {
    case 2:
      return Launch<float, 2, 2, 1, kElements, kLayout>(p, plan, carry, stream);
    case 4:
      return plan.shape.channels == 2
                 ? Launch<float, 4, 4, 2, kElements, kLayout>(p, plan, carry, stream)
                 : Launch<float, 4, 4, 1, kElements, kLayout>(p, plan, carry, stream);
    default:
      return Launch<float, 4, 16, 2, kElements, kLayout>(p, plan, carry, stream);
  }
}

template <Elements kElements>
Error LaunchLayout(const Forward& p, const Plan& plan, const void* carry, Stream stream) {
  return p.channel_last ? LaunchRegular<kElements, Layout::kChannelLast>(p, plan, carry, stream)
                        : LaunchRegular<kElements, Layout::kTimeLast>(p, plan, carry, stream);
}

}  // namespace

Error LaunchForward(const Forward& p, Stream stream) {
  const Elements elements = PlainElements(p);
  const Plan plan = Plan::Forward(p, elements);
  const ForwardWorkspace workspace(p, plan);
  char* base = static_cast<char*>(p.workspace.data);
  if (plan.spans > 1) {
    const Error error =
        LaunchCarries(p, plan, base + workspace.carry, base + workspace.sum_delta, stream);
    if (error != kSuccess) return error;
  }
  const void* carry = base + workspace.carry;
  switch (elements) {
    case Elements::kFloat:
      return LaunchLayout<Elements::kFloat>(p, plan, carry, stream);
    case Elements::kBfloat:
      return LaunchLayout<Elements::kBfloat>(p, plan, carry, stream);
    case Elements::kHalf:
      return LaunchLayout<Elements::kHalf>(p, plan, carry, stream);
    default:
      return IsComplex(p)
                 ? Launch<Complex, 2, 8, 1, Elements::kMixed, Layout::kAny>(p, plan, carry, stream)
                 : Launch<float, 2, 8, 1, Elements::kMixed, Layout::kAny>(p, plan, carry, stream);
  }
}

}  // namespace jax_sscan::gpu
