// The forward kernel.
//
// Computes, per batch row b, channel d and state n, in processing order t,
//     h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t,   out_t = (sum_n C_t h_t + D u_t) silu(z_t)
// (twice the real part of the sum where A is complex).
//
// Work: a block takes one batch row, some channels of one group and one span of the sequence, tile
// by tile. Half of its threads walk, half stage. Walkers compute the states: a channel's lie on
// kLanes lanes, kStates on each, and stay in registers; a lane serves kPerLane adjacent channels,
// which share the loads of B and C; time runs in order. More states than kStates * kLanes are taken
// in turn, tile by tile, and wait in shared memory. Stagers meanwhile make ready what the next tile
// needs, and put skip and gate on what the last one left. They meet once a tile. So the warps of a
// scheduler are twice as many as there are channels for, and one kind's waits are the other's time.
//
// Shared memory, twice, for the tile that is walked and for the one that is staged: delta and
// delta * u (softplus and bias done), B and C, y, and what makes out of y. Once, or twice for
// float32: what is on its way from global memory.
//
// Cost per (b, d, t, n): one exp2, two multiplies, two FMAs, and (with 4 states) 2.5 registers from
// shared memory, 1.5 with two channels to a lane, at two such registers of a warp per cycle and
// multiprocessor (see LanePlace). Per (b, d, t): staging, about 70 instructions, and the sum over
// lanes (3 shuffles per 4 steps at 4 lanes).
#include <type_traits>

#include "cuda/scan.h"
#include "cuda/tile.cuh"

namespace jax_sscan::gpu {
namespace {

// kRestarts: the state may start anew along the sequence. kQuads: as in Tile.
template <typename Number, int kStates, int kLanes, int kPerLane, int kWalkers, Elements kElements,
          Layout kLayout, bool kRestarts, bool kQuads>
struct ForwardShared {
  static constexpr int kStagers = kWalkers;
  // To a multiprocessor: 768 threads leave each 80 registers, 512 leave 128.
  static constexpr bool kNeedsRegisters = kRestarts && kStates * kLanes > 16;
  static constexpr int kBlocks = (kNeedsRegisters ? 512 : 768) / (2 * kWalkers);
  static constexpr int kChannels = kWalkers / kLanes * kPerLane, kGroup = kStates * kLanes;
  static constexpr bool kVary = kElements != Elements::kGeneral;
  // Against bank conflicts: of y's stores, 4 rows of 8 channels; of pairs of steps.
  static constexpr int kPad = kLayout == Layout::kChannelLast ? (kChannels % 32 ? 16 : 8)
                              : kLayout == Layout::kTimeLast && kPerLane == 1 ? 1
                                                                              : 2;
  using Sequences = Tile<kStagers, kChannels, kPad, kElements, kLayout, true, kQuads>;
  using Projections =
      Tile<kStagers, kGroup * NumberTraits<Number>::kParts, 4, kElements, kLayout, true>;
  static constexpr int kStep = Sequences::kRow;
  static_assert(Sequences::template Skew<float>() == 0);
  // Numbers of a row of B or C; rows are steps, or channels for a fixed one.
  static constexpr int kRow = Projections::kRow / NumberTraits<Number>::kParts;
  static constexpr int kRows = kVary || kTile > kChannels ? kTile : kChannels;
  struct Staged {
    alignas(16) float2 steps[Sequences::kCells];  // delta, delta * u
    alignas(16) float y[Sequences::kCells];
    // out = y * x + y for the two elements of a thread's pair, read back by that thread.
    alignas(16) float4 gates[Sequences::kCount * kStagers];
    uint32_t restarts;
  };
  struct StagedProjections {
    alignas(16) Number B[kRows * kRow];
    alignas(16) Number C[kRows * kRow];
  };
  // One is walked, the other staged.
  Staged sequences[2];
  StagedProjections projections[2];
  // What comes next, as it lies in memory: one tile, or two of float32, which takes longer to come.
  // (Two channels to a lane would take it from the L1 cache, where they have more use for it.)
  static constexpr bool kTakesLong = kElements == Elements::kFloat;
  static constexpr int kAhead = kTakesLong && kGroup <= 16 && kPerLane == 1 ? 2 : 1;
  struct Next {
    alignas(16) typename Sequences::Slot u[Sequences::kCount * kStagers];
    alignas(16) typename Sequences::Slot delta[Sequences::kCount * kStagers];
    alignas(16) typename Sequences::Slot z[Sequences::kCount * kStagers];
    typename Projections::Slot B[Projections::kCount * kStagers];
    typename Projections::Slot C[Projections::kCount * kStagers];
  };
  Next next[kAhead];
  Vectors<kChannels> vectors;
};

template <typename Number, int kStates, int kLanes, int kPerLane, int kWalkers, Elements kElements,
          Layout kLayout, bool kRestarts, bool kQuads>
__global__ void __launch_bounds__(2 * kWalkers,
                                  ForwardShared<Number, kStates, kLanes, kPerLane, kWalkers,
                                                kElements, kLayout, kRestarts, kQuads>::kBlocks)
    ForwardKernel(const __grid_constant__ Forward p, const __grid_constant__ Plan plan,
                  const __grid_constant__ Pieces<Number> pieces) {
  using Shared = ForwardShared<Number, kStates, kLanes, kPerLane, kWalkers, kElements, kLayout,
                               kRestarts, kQuads>;
  using Sequences = typename Shared::Sequences;
  using Projections = typename Shared::Projections;
  constexpr int kChannels = Shared::kChannels, kGroup = Shared::kGroup, kRow = Shared::kRow;
  constexpr bool kVary = Shared::kVary;
  constexpr int kStep = Shared::kStep, kParts = NumberTraits<Number>::kParts;
  extern __shared__ char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  constexpr int kStagers = Shared::kStagers, kThreads = kWalkers + kStagers;
  const Operands& o = p.operands;
  const Block block(p, plan);
  StageVectors<kThreads, kChannels>(p, block, shared.vectors);
  const bool has_z = o.z.data != nullptr;
  const bool B_varies = kVary || p.B_varies, C_varies = kVary || p.C_varies;
  // 16 states or fewer are always one group.
  const int groups = kVary && kGroup <= 16 ? 1 : plan.state_groups;
  const int first_tile = static_cast<int>(block.span) * plan.span_tiles;
  const int last_tile =
      first_tile + plan.span_tiles < plan.tiles ? first_tile + plan.span_tiles : plan.tiles;
  __syncthreads();

  // Stagers come first. Warps are dealt to the four schedulers in turn; where there are five of a
  // kind, the two walkers on one scheduler are to have it for themselves, for which the fourth warp
  // takes the place of the sixth.
  int thread = static_cast<int>(threadIdx.x);
  if (kWalkers == 5 * kWarp && (thread / kWarp == 3 || thread / kWarp == 5)) thread ^= 6 * kWarp;

  if (thread < kStagers) {
    const Sequences sequences(SequenceLines(p, block), p.reverse, thread);
    const Projections projections(ProjectionLines<kParts>(p, block), p.reverse, thread);
    constexpr int kPairs = Sequences::kCount;
    // D and delta_bias of the elements that this thread stages.
    float2 D[kPairs] = {}, delta_bias[kPairs] = {};
#pragma unroll
    for (int k = 0; k < kPairs; ++k) {
      if (!sequences.Mine(k)) continue;
      D[k] = sequences.OfLines(shared.vectors.D, k);
      delta_bias[k] = sequences.OfLines(shared.vectors.delta_bias, k);
    }
    auto rows_of = [&](int tile) {
      return Rows(p, plan, tile, p.reverse, first_tile <= tile && tile < last_tile);
    };

    // What was sent for last: a tile, and a group of states of it.
    struct {
      int tile, group;
    } sent{first_tile, -1};
    // Of that tile, of the one that is staged next, and of those that were staged last and, before,
    // walked. Irregular kernels lack the registers to keep them.
    Rows sent_rows = rows_of(first_tile), next_rows = sent_rows;
    Rows staged_rows = sent_rows, walked_rows = sent_rows;
    constexpr bool kRegular = Sequences::kRegular;
    auto rows_or = [&](const Rows& kept, int tile) { return kRegular ? kept : rows_of(tile); };
    int64_t sent_sequences = sequences.At(sent_rows), finished = sent_sequences;
    int64_t sent_projections = projections.At(sent_rows);
    auto send = [&] {
      if (++sent.group == groups) {
        ++sent.tile;
        sent.group = 0;
        sent_rows = rows_of(sent.tile);
      }
      const Rows rows = rows_or(sent_rows, sent.tile);
      auto& to = shared.next[(sent.tile - first_tile) % Shared::kAhead];
      if (sent.group == 0) {
        sequences.Prefetch(o.u, sent_sequences, rows, to.u);
        sequences.Prefetch(o.delta, sent_sequences, rows, to.delta);
        sequences.Prefetch(o.z, sent_sequences, rows, to.z, 0, has_z);
        sent_sequences += sequences.Stride();
      }
      const int line = sent.group * kGroup * kParts;
      const int64_t at = groups > 1 ? projections.At(rows, line) : sent_projections;
      projections.Prefetch(o.B, at, rows, to.B, line, B_varies);
      projections.Prefetch(o.C, at, rows, to.C, line, C_varies);
      SendCopies();
      sent_projections += projections.Stride();
    };
    auto stage_pair = [&](const Rows& rows, int k, uint2 u, uint2 delta, uint2 z,
                          typename Shared::Staged& to) {
      if (!sequences.Mine(k)) return;
      const float2 input = sequences.Widen(u, k, o.u);
      float2 value = sequences.Widen(delta, k, o.delta);
      value = {value.x + delta_bias[k].x, value.y + delta_bias[k].y};
      if (p.delta_softplus)
        value = {Softplus<kExact<kElements>>(value.x).value,
                 Softplus<kExact<kElements>>(value.y).value};
      // Steps that are not there have delta 0, whatever the bias.
      value = {sequences.Exists(k, 0, rows) ? value.x : 0.0f,
               sequences.Exists(k, 1, rows) ? value.y : 0.0f};
      sequences.Put(to.steps, k, {value.x, value.x * input.x}, {value.y, value.y * input.y});
      float2 gate{1.0f, 1.0f};
      if (has_z) {
        const float2 x = sequences.Widen(z, k, o.z);
        gate = {x.x * Sigmoid<kExact<kElements>>(x.x), x.y * Sigmoid<kExact<kElements>>(x.y)};
      }
      to.gates[sequences.Index(k)] = {gate.x * kParts, D[k].x * input.x * gate.x, gate.y * kParts,
                                      D[k].y * input.y * gate.y};
    };
    // What was sent for is in registers before the next is sent for, into the same slots: then that
    // has a whole tile's time to come.
    auto stage = [&] {
      const int tile = sent.tile - (Shared::kAhead - 1) - first_tile, group = sent.group;
      const Rows rows = Shared::kAhead > 1 ? next_rows : rows_or(sent_rows, sent.tile);
      auto& from = shared.next[tile % Shared::kAhead];
      typename Sequences::Raw u, delta, z;
      WaitForCopies<Shared::kAhead - 1>();
      sequences.MeetForCopies();
      if (group == 0) {
        u = sequences.TakeAll(from.u);
        delta = sequences.TakeAll(from.delta);
        z = sequences.TakeAll(from.z);
      }
      typename Projections::Raw B, C;
      if (B_varies) B = projections.TakeAll(from.B);
      if (C_varies) C = projections.TakeAll(from.C);
      next_rows = sent_rows;
      sequences.MeetForCopies();
      send();
      if (group == 0) {
        walked_rows = staged_rows;
        staged_rows = rows;
        typename Shared::Staged& to = shared.sequences[tile & 1];
#pragma unroll
        for (int k = 0; k < kPairs; ++k)
          stage_pair(rows, k, u.pair[k], delta.pair[k], z.pair[k], to);
        if (kRestarts && p.has_segments && thread < kWarp) {
          const uint32_t restarts = Restarts(p, block.row, rows);
          if (thread == 0) to.restarts = restarts;
        }
      }
      auto stage_projection = [&](const Array& from, bool varies,
                                  const typename Projections::Raw& raw, Number* to) {
        if (varies) {
#pragma unroll
          for (int k = 0; k < Projections::kCount; ++k) {
            const float2 x = projections.Widen(raw.pair[k], k, from);
            projections.Put(reinterpret_cast<float*>(to), k, x.x, x.y);
          }
        } else {
          StageFixed<Number, kStagers, kChannels, kGroup, kRow>(p, block, from, group * kGroup,
                                                                thread, to);
        }
      };
      typename Shared::StagedProjections& to = shared.projections[(tile * groups + group) & 1];
      stage_projection(o.B, B_varies, B, to.B);
      stage_projection(o.C, C_varies, C, to.C);
    };
    auto finish = [&](int tile) {
      const Rows rows = rows_or(walked_rows, tile);
      const typename Shared::Staged& from = shared.sequences[(tile - first_tile) & 1];
#pragma unroll
      for (int k = 0; k < kPairs; ++k) {
        if (!sequences.Mine(k)) continue;
        const float2 y = sequences.Get(from.y, k);
        const float4 gate = from.gates[sequences.Index(k)];
        sequences.Store(p.out, finished, rows, k, fmaf(y.x, gate.x, gate.y),
                        fmaf(y.y, gate.z, gate.w));
      }
      finished += sequences.Stride();
    };

#pragma unroll
    for (int i = 0; i < Shared::kAhead; ++i) send();
    stage();
    for (int tile = first_tile; tile < last_tile; ++tile) {
      for (int group = 0; group < groups; ++group) {
        Meet<kThreads>();
        if (tile > first_tile && group == 0) finish(tile - 1);
        stage();
      }
    }
    Meet<kThreads>();
    finish(last_tile - 1);
    return;
  }

  const int walker = LanePlace(thread - kStagers);
  const int lane = walker % kLanes, channel = walker / kLanes * kPerLane;
  // Only where there are several groups of states: (groups, kPerLane, kStates, walkers).
  Number* waiting = reinterpret_cast<Number*>(memory + sizeof(Shared)) + walker;
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
    return ((group * kPerLane + j) * kStates + i) * kWalkers;
  };
  for (int group = 0; group < groups; ++group) {
    load_group(group);
    each(group, [&](int j, int i, int64_t n) {
      h[j][i] = exists(j, n) && o.initial_state.data
                    ? static_cast<const Number*>(
                          o.initial_state.data)[StateIndex(p, block, channel + j, n)]
                    : Number{};
    });
#pragma unroll 4
    for (int64_t piece = 0; piece < block.span * plan.pieces; ++piece) {
      each(group, [&](int j, int i, int64_t n) {
        if (exists(j, n))
          h[j][i] = pieces.After(piece, h[j][i], p, block, channel + j, n, rate[j][i]);
      });
    }
    if (groups > 1)
      each(group, [&](int j, int i, int64_t) { waiting[place_of(group, j, i)] = h[j][i]; });
  }

  // Sums of y over lanes are made for kSum steps at once; this lane comes to hold kHeld of them,
  // from first_row on.
  constexpr int kSum = kLanes <= 4 ? 4 : kLanes, kHeld = kSum / kLanes;
  int first_row = 0;
#pragma unroll
  for (int bit = 1, half = kSum / 2; bit < kLanes; bit *= 2, half /= 2)
    first_row += lane & bit ? half : 0;
  // Of this lane's first state among the saved ones, where those that enter a tile go.
  int64_t saved = TransposedIndex(
      p, block,
      block.row * (plan.tiles - 1) + (p.reverse ? plan.tiles - 1 - first_tile : first_tile - 1),
      channel, lane * kStates);
  int turn = 0;  // of the projections' buffers
  for (int tile = first_tile; tile < last_tile; ++tile) {
    typename Shared::Staged& staged = shared.sequences[(tile - first_tile) & 1];
    for (int group = 0; group < groups; ++group, turn ^= 1) {
      const typename Shared::StagedProjections& staged_projections = shared.projections[turn];
      if (groups > 1) {
        load_group(group);
        each(group, [&](int j, int i, int64_t) { h[j][i] = waiting[place_of(group, j, i)]; });
      }
      if (p.states.data && tile) {
        Number* to = static_cast<Number*>(p.states.data) + saved + group * kGroup * p.dim;
        each(group, [&](int j, int i, int64_t n) {
          if (exists(j, n)) to[i * p.dim + j] = h[j][i];
        });
      }
      Meet<kThreads>();
      auto row_start = [](int i) { return Projections::template RowStart<float>(i) / kParts; };
      auto load = [&](const Number* from, bool varies, int row, Number(&to)[kPerLane][kStates]) {
#pragma unroll
        for (int j = 0; j < kPerLane; ++j) {
          if (j && kVary) {
#pragma unroll
            for (int n = 0; n < kStates; ++n) to[j][n] = to[0][n];
          } else {
            const int start = varies ? row_start(row) : (channel + j) * kRow;
            LoadStates(from + lane * kStates + start, to[j]);
          }
        }
      };
      auto step_start = [](int i) { return Sequences::template RowStart<float2>(i); };
      struct Step {
        float2 step[kPerLane];
        Number b[kPerLane][kStates], c[kPerLane][kStates];
      };
      auto load_step = [&](int i, Step& to) {
        if constexpr (kPerLane == 2) {
          const float4 x = *reinterpret_cast<const float4*>(staged.steps + step_start(i) + channel);
          to.step[0] = {x.x, x.y}, to.step[1] = {x.z, x.w};
        } else {
          to.step[0] = staged.steps[step_start(i) + channel];
        }
        load(staged_projections.B, B_varies, i, to.b);
        load(staged_projections.C, C_varies, i, to.c);
      };
      float y[kPerLane][kSum], sums[kTile / kSum][kPerLane][kHeld];
      auto sum_over_lanes = [&](int first) {
#pragma unroll
        for (int j = 0; j < kPerLane; ++j) {
          SumHalves<kSum, 0, 1, kLanes>(y[j]);
#pragma unroll
          for (int k = 0; k < kHeld; ++k) sums[first / kSum][j][k] = y[j][k];
        }
      };
      auto store = [&](int first) {
#pragma unroll
        for (int k = 0; k < kHeld; ++k) {
          const auto& sum = sums[first / kSum];
          float* to = staged.y + (first + first_row + k) * kStep + channel;
          if constexpr (kPerLane == 2) {
            const float2 before = group ? *reinterpret_cast<const float2*>(to) : float2{};
            *reinterpret_cast<float2*>(to) = {sum[0][k] + before.x, sum[1][k] + before.y};
          } else {
            *to = group ? *to + sum[0][k] : sum[0][k];
          }
        }
      };
      // The compiler moves no load across a store: where there are registers for it, sums are
      // stored at the end of the tile, and everywhere what a step needs is loaded a step ahead.
      constexpr bool kStoresLate = kPerLane == 1;
      // Twice in the code: most tiles restart nowhere, whether there are segments or not.
      auto walk = [&](auto restarting, uint32_t restarts) {
        Step now, then;
        load_step(0, now);
#pragma unroll
        for (int i = 0; i < kTile; ++i) {
          if (i + 1 < kTile) load_step(i + 1, then);
          if (i && i % kSum == 0) {
            sum_over_lanes(i - kSum);
            if (!kStoresLate) store(i - kSum);
          }
#pragma unroll
          for (int j = 0; j < kPerLane; ++j) {
            float sum = 0.0f;
#pragma unroll
            for (int n = 0; n < kStates; ++n) {
              if constexpr (decltype(restarting)::value)
                h[j][n] = Unless(restarts & 1u << i, h[j][n]);
              h[j][n] = MultiplyAdd(Decay(rate[j][n], now.step[j].x), h[j][n],
                                    now.b[j][n] * now.step[j].y);
              sum = RealMultiplyAdd(now.c[j][n], h[j][n], sum);
            }
            y[j][i % kSum] = sum;
          }
          now = then;
        }
      };
      const uint32_t restarts = kRestarts && p.has_segments ? staged.restarts : 0;
      if (kRestarts && restarts)
        walk(std::true_type{}, restarts);
      else
        walk(std::false_type{}, 0);
      sum_over_lanes(kTile - kSum);
#pragma unroll
      for (int first = kStoresLate ? 0 : kTile - kSum; first < kTile; first += kSum) store(first);
      if (groups > 1) {
        each(group, [&](int j, int i, int64_t) { waiting[place_of(group, j, i)] = h[j][i]; });
      }
    }
    saved += (p.reverse ? -p.dstate : p.dstate) * p.dim;
  }
  Meet<kThreads>();

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

template <typename Number, int kStates, int kLanes, int kPerLane, int kWalkers, Elements kElements,
          Layout kLayout, bool kRestarts = !IsRegular(kElements), bool kQuads = false>
Error Launch(const Forward& p, const Plan& plan, const ForwardWorkspace& workspace, Stream stream) {
  const auto kernel = ForwardKernel<Number, kStates, kLanes, kPerLane, kWalkers, kElements, kLayout,
                                    kRestarts, kQuads>;
  constexpr int kShared = sizeof(ForwardShared<Number, kStates, kLanes, kPerLane, kWalkers,
                                               kElements, kLayout, kRestarts, kQuads>);
  constexpr int kWaiting = kStates * kPerLane * kWalkers * sizeof(Number);
  constexpr int kMost = kElements == Elements::kGeneral ? kMostStates : kMostPlainStates;
  static_assert(kShared + kMost / (kStates * kLanes) * kWaiting <= kSharedBytes);
  const int bytes = kShared + (plan.state_groups > 1 ? plan.state_groups * kWaiting : 0);
  if (const Error error = AllowSharedBytes(kernel, bytes); error != kSuccess) return error;
  kernel<<<static_cast<unsigned>(plan.blocks * plan.spans), 2 * kWalkers, bytes, stream>>>(
      p, plan, PiecesIn<Number>(p, workspace));
  return LastError();
}

template <Elements kElements, Layout kLayout>
Error LaunchShape(const Forward& p, const Plan& plan, const ForwardWorkspace& workspace,
                  Stream stream) {
  const auto launch = [&](auto kernel) { return kernel(p, plan, workspace, stream); };
  if (!IsRegular(kElements) || p.has_segments) {
    if (plan.shape.lanes == 16)
      return launch(Launch<float, 4, 16, 2, 128, kElements, kLayout, true>);
    return launch(Launch<float, 4, 4, 1, 128, kElements, kLayout, true>);
  }
  if constexpr (IsRegular(kElements)) {
    if (plan.shape.lanes == 16) return launch(Launch<float, 4, 16, 2, 128, kElements, kLayout>);
    if (plan.shape.lanes == 2) return launch(Launch<float, 2, 2, 1, 128, kElements, kLayout>);
    if (plan.shape.channels == 2) {
      if constexpr (kElements == Elements::kFloat && kLayout == Layout::kTimeLast)
        if (QuadsAligned(p))
          return launch(Launch<float, 4, 4, 2, 128, kElements, kLayout, false, true>);
      return launch(Launch<float, 4, 4, 2, 128, kElements, kLayout>);
    }
    switch (plan.walkers) {
      case 96:
        return launch(Launch<float, 4, 4, 1, 96, kElements, kLayout>);
      case 160:
        return launch(Launch<float, 4, 4, 1, 160, kElements, kLayout>);
    }
  }
  return launch(Launch<float, 4, 4, 1, 128, kElements, kLayout>);
}

template <Elements kElements>
Error LaunchLayout(const Forward& p, const Plan& plan, const ForwardWorkspace& workspace,
                   Stream stream) {
  return p.channel_last ? LaunchShape<kElements, Layout::kChannelLast>(p, plan, workspace, stream)
                        : LaunchShape<kElements, Layout::kTimeLast>(p, plan, workspace, stream);
}

}  // namespace

Error LaunchForward(const Forward& p, Stream stream) {
  const Plan plan = Plan::Forward(p, ElementsOf(p));
  const ForwardWorkspace workspace(p, plan);
  if (plan.spans > 1) {
    char* base = static_cast<char*>(p.workspace.data);
    const Error error =
        LaunchPieces(p, plan, base + workspace.ends, base + workspace.sum_delta, stream);
    if (error != kSuccess) return error;
  }
  switch (plan.elements) {
    case Elements::kFloat:
      return LaunchLayout<Elements::kFloat>(p, plan, workspace, stream);
    case Elements::kBfloat:
      return LaunchLayout<Elements::kBfloat>(p, plan, workspace, stream);
    case Elements::kHalf:
      return LaunchLayout<Elements::kHalf>(p, plan, workspace, stream);
    case Elements::kMixed:
      return LaunchLayout<Elements::kMixed>(p, plan, workspace, stream);
    case Elements::kOdd:
      return LaunchLayout<Elements::kOdd>(p, plan, workspace, stream);
    default:
      return IsComplex(p) ? Launch<Complex, 2, 8, 1, 128, Elements::kGeneral, Layout::kAny>(
                                p, plan, workspace, stream)
                          : Launch<float, 2, 8, 1, 128, Elements::kGeneral, Layout::kAny>(
                                p, plan, workspace, stream);
  }
}

}  // namespace jax_sscan::gpu
