// The states that enter the spans of a sequence that was cut up, so that all its spans run at once.
//
// Computes, for every span but the last (the first, going back), piece by piece, the state that the
// piece would end with had it begun with 0, and the sum of its deltas, from which comes by how much
// the state it really begins with decays. The walk of a span then goes through those before it.
// Spans are cut into pieces since this pass is short: it needs several blocks to a multiprocessor,
// which hide each other's waits, where a walk for itself has one. Going back, the same
// holds for the adjoint, with C and the cotangent of y in the place of B and delta * u.
//
// Work, registers and shared memory are those of the forward kernel, less C and y; cost per
// (b, d, t, n): one exp2, two multiplies, one FMA. A span in which the state starts anew passes
// nothing on: its sum is marked by a NaN.
//
// A state forgets: where no decay can exceed 1 (softplus, and no A above 0), a long span is taken
// in stretches from its end backwards, and what a stretch leaves is scaled by the decay of those
// after it. Once that is below 2^-126 for the states of a lane, nothing before can show in them,
// and the lane is done; the block is when all are. The states of a channel mostly decay at rates as
// 1 to 16, so there a warp has the same quarter of the states of all channels, and three of four
// warps are done after a part of the slowest one's way. It costs an exponential a stretch and
// state.
#include <cfloat>
#include <type_traits>

#include "cuda/scan.h"
#include "cuda/tile.cuh"

namespace jax_sscan::gpu {
namespace {

constexpr int kWalkers = 128, kStagers = 64, kThreads = kWalkers + kStagers;
// Tiles after which a block asks itself whether it has forgotten what came before: all wait for the
// answer.
constexpr int kStretch = 8;

// On as few lanes as registers allow.
template <typename Number>
struct SpanShape {
  static constexpr int kStates = 4 / NumberTraits<Number>::kParts, kLanes = kPassStates / kStates;
  static constexpr int kChannels = kWalkers / kLanes, kGroup = kStates * kLanes;
};

template <typename Number, Elements kElements, Layout kLayout, bool kForgets>
struct SpanShared : SpanShape<Number> {
  using SpanShape<Number>::kChannels, SpanShape<Number>::kGroup;
  static constexpr bool kVary = kElements != Elements::kGeneral;
  static constexpr bool kRestarts = !IsRegular(kElements);
  using Sequences = Tile<kStagers, kChannels, 2, kElements, kLayout, true>;
  using Projections =
      Tile<kStagers, kGroup * NumberTraits<Number>::kParts, 4, kElements, kLayout, true>;
  static constexpr int kRow = Projections::kRow / NumberTraits<Number>::kParts;
  static constexpr int kRows = kVary || kTile > kChannels ? kTile : kChannels;
  // One is walked, the other staged.
  alignas(16) float2 steps[2][Sequences::kCells];  // delta, input
  alignas(16) Number B[2][kRows * kRow];
  uint32_t restarts[2];
  // What comes next, as it lies in memory. One is taken from, the other is on its way.
  struct Next {
    // delta, input and z
    alignas(16) typename Sequences::Slot sequences[3][Sequences::kCount * kStagers];
    typename Projections::Slot B[Projections::kCount * kStagers];
  };
  Next next[2];
  Vectors<kChannels> vectors;
  // Which lane of a channel walked furthest, and so knows the sum of its deltas.
  struct Walked {
    float sum_delta;
    int tiles;
  };
  Walked walked[kForgets ? SpanShape<Number>::kLanes : 1][kChannels];
};

template <typename Pass, typename Number, Elements kElements, Layout kLayout, bool kForgets>
__global__ void __launch_bounds__(kThreads)
    SpanKernel(const __grid_constant__ Pass p, const __grid_constant__ Plan plan,
               Number* __restrict__ ends, float* __restrict__ sum_delta) {
  constexpr bool kBackward = std::is_same_v<Pass, Backward>;
  using Shared = SpanShared<Number, kElements, kLayout, kForgets>;
  using Sequences = typename Shared::Sequences;
  using Projections = typename Shared::Projections;
  constexpr bool kVary = Shared::kVary, kRestarts = Shared::kRestarts;
  constexpr int kStates = Shared::kStates, kLanes = Shared::kLanes;
  constexpr int kChannels = Shared::kChannels, kGroup = Shared::kGroup;
  constexpr int kRow = Shared::kRow, kParts = NumberTraits<Number>::kParts;
  extern __shared__ char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const Operands& o = p.operands;
  const Block block(p, plan, blockIdx.x);
  const bool reversed = p.reverse != kBackward;
  // The walk after this one takes for granted that what came before has ended.
  WaitForBefore();
  LetNextBegin();
  const Array& from_B = kBackward ? o.C : o.B;
  const bool varies = kVary || (kBackward ? p.C_varies : p.B_varies);
  const int groups = plan.state_groups;

  // A piece of the span-th in the order of this pass; its tiles in that order.
  const int pieces = (plan.spans - 1) * plan.pieces, number = static_cast<int>(block.span);
  const int from_start = kBackward ? pieces + plan.pieces - 1 - number : number;
  const int span = from_start / plan.pieces;
  const int first_tile = span * plan.span_tiles + from_start % plan.pieces * plan.piece_tiles;
  const int span_end = min((span + 1) * plan.span_tiles, plan.tiles);
  const int tiles = max(min(first_tile + plan.piece_tiles, span_end) - first_tile, 0);

  const int thread = static_cast<int>(threadIdx.x) - kStagers;
  const int walker = kForgets ? thread : LanePlace(thread);
  const int lane = kForgets ? walker / kChannels : walker % kLanes;
  const int channel = kForgets ? walker % kChannels : walker / kLanes;
  Number rate[kStates];
  auto load_group = [&](int group) {
#pragma unroll
    for (int i = 0; i < kStates; ++i)
      rate[i] =
          Rate(LoadWeight<Number>(o.A, p, block, channel, group * kGroup + lane * kStates + i));
  };
  if (walker >= 0) {
    StageVectors<kWalkers, kChannels>(p, block, walker, shared.vectors);
    load_group(0);
  }
  bool forgets = kForgets;
  if constexpr (kForgets) {
    bool grows = false;
    if (walker >= 0)
#pragma unroll
      for (int i = 0; i < kStates; ++i) grows |= !(rate[i] <= 0.0f);
    forgets = !MeetAny<kThreads>(grows);
  }
  const int turns = forgets ? (tiles + kStretch - 1) / kStretch * kStretch : tiles;

  if (walker < 0) {
    const int stager = static_cast<int>(threadIdx.x);
    const bool has_z = kBackward && o.z.data != nullptr;
    const Array& from_input = [&]() -> const Array& {
      if constexpr (kBackward)
        return p.out_cotangent;
      else
        return o.u;
    }();
    const Lines lines = SequenceLines(p, block);
    const Sequences sequences(lines, reversed, stager);
    const Projections projections(ProjectionLines<kParts>(p, block), reversed, stager);
    auto rows_of = [&](int i) {
      // The last stretch may begin before the span.
      if (forgets) i = tiles - (i / kStretch + 1) * kStretch + i % kStretch;
      Rows rows(p, plan, first_tile + (kBackward ? tiles - 1 - i : i), p.reverse,
                0 <= i && i < tiles);
      rows.reversed = reversed;
      return rows;
    };
    [[maybe_unused]] auto quads = [&] {
      if constexpr (!Sequences::kRegular)
        return 0;
      else if constexpr (kBackward)
        return QuadCopies<Sequences, 3>(lines, rows_of(0).t0, stager, o.delta, from_input, o.z);
      else
        return QuadCopies<Sequences, 2>(lines, rows_of(0).t0, stager, o.delta, from_input);
    }();
    // What is sent for and staged next: tiles, and groups of states of them.
    int sent_tile = 0, sent_group = 0, staged_tile = 0, staged_group = 0;
    auto send = [&](int slot) {
      if (sent_tile < turns) {
        typename Shared::Next& to = shared.next[slot];
        const Rows rows = rows_of(sent_tile);
        if (sent_group == 0) {
          if constexpr (Sequences::kRegular) {
            quads.Send(to.sequences[0], rows.steps,
                       sequences.At(rows_of(sent_tile + 1)) - sequences.At(rows), plan.in_quads);
          } else {
            const int64_t at = sequences.At(rows);
            sequences.Prefetch(o.delta, at, rows, to.sequences[0]);
            sequences.Prefetch(from_input, at, rows, to.sequences[1]);
            sequences.Prefetch(o.z, at, rows, to.sequences[2], 0, has_z);
          }
        }
        const int line = sent_group * kGroup * kParts;
        projections.Prefetch(from_B, projections.At(rows, line), rows, to.B, line, varies);
        Advance(sent_tile, sent_group, groups);
      }
      SendCopies();
    };
    auto stage = [&](int slot) {
      const typename Shared::Next& next = shared.next[slot];
      if (staged_group == 0) {
        const Rows rows = rows_of(staged_tile);
        const int to = staged_tile & 1;
#pragma unroll
        for (int k = 0; k < Sequences::kCount; ++k) {
          if (!sequences.Mine(k)) continue;
          auto take = [&](int array) { return sequences.Take(next.sequences[array], k); };
          float2 value = sequences.Widen(take(0), k, o.delta);
          const float2 bias = sequences.OfLines(shared.vectors.delta_bias, k);
          value = {value.x + bias.x, value.y + bias.y};
          if (p.delta_softplus)
            value = {Softplus<kExact<kElements>>(value.x).value,
                     Softplus<kExact<kElements>>(value.y).value};
          // Steps that are not there have delta 0, whatever the bias.
          if (!sequences.Exists(k, 0, rows)) value.x = 0.0f;
          if (!sequences.Exists(k, 1, rows)) value.y = 0.0f;
          float2 in = sequences.Widen(take(1), k, from_input);
          if constexpr (!kBackward) in = {in.x * value.x, in.y * value.y};
          if (has_z) {
            const float2 x = sequences.Widen(take(2), k, o.z);
            in = {in.x * x.x * Sigmoid<kExact<kElements>>(x.x),
                  in.y * x.y * Sigmoid<kExact<kElements>>(x.y)};
          }
          // y = 2 Re sum C h for complex numbers: the walk sees its cotangent doubled.
          if constexpr (kBackward) in = {in.x * kParts, in.y * kParts};
          sequences.Put(shared.steps[to], k, {value.x, in.x}, {value.y, in.y});
        }
        if (kRestarts && p.has_segments && stager < kWarp) {
          const uint32_t restarts = SegmentIds(p, block.row, rows).Restarts();
          if (stager == 0) shared.restarts[to] = restarts;
        }
      }
      Number* const to = shared.B[(staged_tile * groups + staged_group) & 1];
      if (varies) {
#pragma unroll
        for (int k = 0; k < Projections::kCount; ++k) {
          const float2 x = projections.Widen(projections.Take(next.B, k), k, from_B);
          projections.Put(reinterpret_cast<float*>(to), k, x.x, x.y);
        }
      } else {
        StageFixed<Number, kStagers, kChannels, kGroup, kRow>(p, block, from_B,
                                                              staged_group * kGroup, stager, to);
      }
      Advance(staged_tile, staged_group, groups);
    };
    // What others copied is there after waiting and meeting.
    send(0);
    WaitForCopies();
    Meet<kThreads>();
    send(1);
    stage(0);
    WaitForCopies();
    for (int i = 0; i < turns * groups; ++i) {
      if (kForgets && i % kStretch == 0) {
        if (!MeetAny<kThreads>(false)) break;
      } else {
        Meet<kThreads>();
      }
      send(i & 1);
      stage(~i & 1);
      WaitForCopies();
    }
    return;
  }
  Meet<kThreads>();

  // h: the state at the end of all tiles so far, or of those of a stretch.
  Number h[kStates];
  // Only where there are several groups of states: (groups, kStates, walkers).
  Number* waiting = reinterpret_cast<Number*>(memory + sizeof(Shared)) + walker;
#pragma unroll
  for (int i = 0; i < kStates; ++i) h[i] = Number{};
  if (groups > 1)
    for (int i = 0; i < groups * kStates; ++i) waiting[i * kWalkers] = Number{};
  float sum = 0.0f;
  [[maybe_unused]] float stretch_sum = 0.0f;
  [[maybe_unused]] int walked = 0;
  bool restarted = false, remembers = true, done = false;
  [[maybe_unused]] Number total[kStates], weight[kStates];
  if constexpr (kForgets) {
#pragma unroll
    for (int i = 0; i < kStates; ++i) {
      const bool exists = channel < block.channels && lane * kStates + i < p.dstate;
      weight[i] = exists ? 1.0f : 0.0f;
      total[i] = 0.0f;
    }
  }
  int turn = 0;  // of B's buffers
  for (int tile = 0; tile < turns && !done; ++tile) {
    const float2* steps = shared.steps[tile & 1];
    uint32_t restarts = 0;
    float tile_sum = 0.0f;
    for (int group = 0; group < groups; ++group, turn ^= 1) {
      if (groups > 1) {
        load_group(group);
#pragma unroll
        for (int i = 0; i < kStates; ++i) h[i] = waiting[(group * kStates + i) * kWalkers];
      }
      if (kForgets && tile % kStretch == 0) {
        done = !MeetAny<kThreads>(remembers);
        if (done) break;
      } else {
        Meet<kThreads>();
      }
      if (!remembers) continue;  // done, and here to meet those who are not
      if (kRestarts && p.has_segments) restarts = shared.restarts[tile & 1];
      const Number* at_B = shared.B[turn] + lane * kStates + (varies ? 0 : channel * kRow);
      auto start_B = [&](int i) {
        return varies ? Projections::template RowStart<float>(i) / kParts : 0;
      };
#pragma unroll
      for (int i = 0; i < kTile; ++i) {
        const float2 step = steps[Sequences::template RowStart<float2>(i) + channel];
        Number b[kStates];
        LoadStates(at_B + start_B(i), b);
        if (!group) tile_sum += step.x;
        [[maybe_unused]] const bool restart = restarts & 1u << i;
#pragma unroll
        for (int n = 0; n < kStates; ++n) {
          if constexpr (kRestarts && !kBackward) h[n] = Unless(restart, h[n]);
          if constexpr (kBackward)
            h[n] = Decay(rate[n], step.x) * MultiplyAdd(b[n], step.y, h[n]);
          else
            h[n] = MultiplyAdd(Decay(rate[n], step.x), h[n], b[n] * step.y);
          if constexpr (kRestarts && kBackward) h[n] = Unless(restart, h[n]);
        }
      }
      if (groups > 1) {
#pragma unroll
        for (int i = 0; i < kStates; ++i) waiting[(group * kStates + i) * kWalkers] = h[i];
      }
    }
    sum += tile_sum;
    restarted |= restarts != 0;
    if constexpr (kForgets) {
      if (!remembers) continue;
      stretch_sum += tile_sum;
      ++walked;
      if (forgets && (tile + 1) % kStretch == 0) {
        remembers = false;
#pragma unroll
        for (int i = 0; i < kStates; ++i) {
          total[i] = fmaf(weight[i], h[i], total[i]);
          weight[i] *= Decay(rate[i], stretch_sum);
          // Not 0: a product of smaller numbers may round back up for ever. A NaN remembers.
          remembers |= !(weight[i] < FLT_MIN);
          h[i] = 0.0f;
        }
        stretch_sum = 0.0f;
      }
    }
  }
  if constexpr (kForgets) {
    if (forgets)
#pragma unroll
      for (int i = 0; i < kStates; ++i) h[i] = total[i];
    shared.walked[lane][channel] = {sum, walked};
    Meet<kWalkers, 2>();
#pragma unroll
    for (int i = 1; i < kLanes; ++i) {
      const typename Shared::Walked other = shared.walked[i][channel];
      if (other.tiles > walked) sum = other.sum_delta, walked = other.tiles;
    }
  }

  if (channel >= block.channels) return;
  const int64_t slot = block.span * p.batch + block.row;
  for (int group = 0; group < groups; ++group) {
#pragma unroll
    for (int i = 0; i < kStates; ++i) {
      const int64_t n = group * kGroup + lane * kStates + i;
      if (groups > 1) h[i] = waiting[(group * kStates + i) * kWalkers];
      if (n < p.dstate) ends[TransposedIndex(p, block, slot, channel, n)] = h[i];
    }
  }
  if (lane == 0)
    sum_delta[slot * p.dim + block.first_channel + channel] =
        restarted ? __int_as_float(0x7fffffff) : sum;
}

template <typename Number, typename Pass>
Error Launch(const Pass& p, Plan plan, Number* ends, float* sum_delta, Stream stream) {
  constexpr int kStates = SpanShape<Number>::kStates, kChannels = SpanShape<Number>::kChannels;
  constexpr int kGroup = SpanShape<Number>::kGroup;
  plan.shape = {kStates, SpanShape<Number>::kLanes, 1};
  plan.walkers = kWalkers;
  plan.block_channels = kChannels;
  plan.blocks_per_group = static_cast<int>((p.group_dim() + kChannels - 1) / kChannels);
  plan.blocks = p.batch * p.groups * plan.blocks_per_group;
  plan.state_groups = static_cast<int>((p.dstate + kGroup - 1) / kGroup);
  auto launch = [&](auto storage, auto forgets) {
    constexpr Elements kElements = storage.kElements;
    constexpr Layout kLayout = storage.kLayout;
    constexpr bool kForgets = decltype(forgets)::value;
    int bytes = sizeof(SpanShared<Number, kElements, kLayout, kForgets>);
    if (plan.state_groups > 1) bytes += plan.state_groups * kStates * kWalkers * sizeof(Number);
    return LaunchKernel(SpanKernel<Pass, Number, kElements, kLayout, kForgets>,
                        plan.blocks * (plan.spans - 1) * plan.pieces, kThreads, bytes, stream, true,
                        p, plan, ends, sum_delta);
  };
  if constexpr (std::is_same_v<Number, float>) {
    // Irregular kernels restart.
    const bool restarts = IsRegular(plan.elements) && p.has_segments;
    const Elements elements = restarts ? Elements::kMixed : plan.elements;
    const bool forgets = plan.HasLongSpans(p) && p.delta_softplus;
    if (elements != Elements::kGeneral)
      return ForPlain(elements, p.channel_last, [&](auto storage) {
        if constexpr (IsRegular(storage.kElements))
          if (forgets) return launch(storage, std::true_type{});
        return launch(storage, std::false_type{});
      });
  }
  return launch(Storage<Elements::kGeneral, Layout::kAny>{}, std::false_type{});
}

template <typename Pass>
Error LaunchAny(const Pass& p, const Plan& plan, void* ends, void* sum_delta, Stream stream) {
  float* sums = static_cast<float*>(sum_delta);
  return IsComplex(p) ? Launch(p, plan, static_cast<Complex*>(ends), sums, stream)
                      : Launch(p, plan, static_cast<float*>(ends), sums, stream);
}

}  // namespace

Error LaunchPieces(const Forward& p, const Plan& plan, void* ends, void* sum_delta, Stream stream) {
  return LaunchAny(p, plan, ends, sum_delta, stream);
}

Error LaunchPieces(const Backward& p, const Plan& plan, void* ends, void* sum_delta,
                   Stream stream) {
  return LaunchAny(p, plan, ends, sum_delta, stream);
}

}  // namespace jax_sscan::gpu
