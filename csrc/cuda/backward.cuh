// The backward kernel.
//
// Computes, per batch row, channel and state, against processing order, with a_t = exp(delta_t A),
//     lambda_t = C_t dy_t + a_{t+1} lambda_{t+1},
// and from it and h_t, which is computed again from the states that the forward pass saved,
//     dC_t += h_t dy_t,  dB_t += lambda_t delta_t u_t            (summed over the channels of a
//     group) d(delta u)_t += lambda_t B_t,  d(delta)_t += x_t A  with  x_t = a_t lambda_t h_{t-1}
//     (over n) dA += x_t delta_t (over t)
//
// Work: a block takes one batch row, some channels of one group and one span, tile by tile from its
// end. kWalkers of its threads walk: a channel's states lie on kLanes lanes, kStates on each, and a
// lane serves kPerLane adjacent channels, which share the loads of B and C and half of the sums.
// For each tile: forward from the saved state, every state kept in registers, then back. kStagers
// more make ready what the next tile needs (softplus, gate, B and C, the saved states), and finish
// the gradients of elements that the last one left; that of z, which the output before the gate
// gives, they store at once. So walkers need few enough registers for one more warp to a scheduler,
// wait for no global memory, and one kind's waits are the other's time. All meet once a tile,
// before the walk, and walkers once more before its way back, which makes sums over channels anew:
// those of the last tile they have added up first, since stagers have more to do than they. More
// states than kStates * kLanes are taken in turn, tile by tile, and wait in the workspace.
//
// The more states a lane has the fewer are its instructions for each, and the more of them have to
// be kept: with 8, a tile is taken in halves, and the states of the first are put into shared
// memory on the way forward and fetched on the way back. For GPUs that have less of it, kStagers
// may be 0: then walkers stage and finish between their steps, on the way forward, where few states
// are kept yet, they finish, and in the second half of the way back they stage.
//
// Code has its price: what walkers and stagers go through for a tile is 35 to 45 KB, more than a
// multiprocessor's cache of instructions holds, and what it lacks comes from one that a dozen of
// them share. Unrolled as far as it could be it was 70 KB, and a fifth slower or not by where it
// happened to lie. Hence stagers' loops over pairs are rolled.
//
// Shared memory, twice, for the tile that is walked and for the one that is staged or finished:
// delta, delta * u and dy, B and C, the states on entering it, the sums over n, and what the
// gradients of elements need (where early states take its place, stagers keep that in registers);
// once: each warp's sums over channels. Sums across lanes halve what they sum with every shuffle.
// Which register holds which state or channel depends on the lane, so that what a lane keeps always
// comes first and needs no select. Nothing is added atomically: blocks write partial sums, and a
// second kernel adds them in order.
//
// Cost per (b, d, t, n): two exp2, 12 multiplies and FMAs, about 3 instructions of sums, and 5
// registers to and from shared memory, 23 instructions in all with 2 states and 2 channels to a
// lane, 21 with 4. Per (b, d, t): staging and finishing, about 100 instructions.
#pragma once

#include <type_traits>

#include "cuda/scan.h"
#include "cuda/tile.cuh"

namespace jax_sscan::gpu {
namespace {

__host__ __device__ constexpr int Log2(int x) { return x <= 1 ? 0 : 1 + Log2(x / 2); }

// kWaits: states may be taken in turn. kQuads: as in Tile.
template <typename Number, int kStates, int kLanes, int kPerLane, int kWalkers, int kStagers,
          bool kWaits, Elements kElements, Layout kLayout, bool kQuads>
struct BackwardShared {
  static constexpr int kChannels = kWalkers / kLanes * kPerLane, kGroup = kStates * kLanes;
  static constexpr int kParts = NumberTraits<Number>::kParts;
  static constexpr bool kVary = kElements != Elements::kGeneral;
  // Those who stage are counted after those who walk, or are the same.
  static constexpr int kStaging = kStagers ? kStagers : kWalkers, kFirst = kStagers ? kWalkers : 0;
  // Warps are dealt to the four schedulers in turn. Where ten walk, two of the five that stage are
  // to be on either scheduler where two walk and not three, for which one more stands in a place.
  static constexpr int kIdle = kWalkers == 10 * kWarp && kStagers ? kWarp : 0;
  static constexpr int kThreads = kWalkers + kStagers + kIdle;
  // With many states to a lane, stagers have registers to spare and shared memory has no room.
  static constexpr bool kCrowded = kStagers && kStates * kPerLane > 4;
  using Sequences = Tile<kStaging, kChannels, 2, kElements, kLayout, kCrowded, kQuads>;
  static_assert(Sequences::template Skew<float>() == 0);
  using Projections = Tile<kStaging, kGroup * kParts, 4, kElements, kLayout>;
  static constexpr int kStep = Sequences::kRow, kRow = Projections::kRow / kParts;
  static constexpr int kRows = kVary || kTile > kChannels ? kTile : kChannels;
  // More, so that lanes that store different sums, of a warp's channels, use different banks.
  static constexpr int kSums = kTile * kStep + kWarp / kLanes * kPerLane;
  // One copy for each order in which lanes hold their states: state n is at n ^ i in copy i. A
  // fixed B or C has one copy.
  static constexpr int kCopies = kVary ? kStates : 1;
  // Lanes that read two copies use all banks: with 4 states, the first two lanes read copies 0
  // and 2.
  static constexpr int kCopy = kRows * kRow + (kStates == 4 ? 8 : 16);
  static constexpr int kPairs = Sequences::kCount * kStaging;
  // What spares stagers instructions for shared memory, whose queue they share with walkers. It
  // costs registers, and which kernels gain by it was measured: for delta_bias and D of a thread's
  // lines to be in registers, and for its sums of dD and d_bias to be there.
  static constexpr bool kLinesLast = kStagers && kLayout == Layout::kChannelLast;
  static constexpr bool kKeepsVectors = kLinesLast && !kCrowded && !kWaits;
  // Walkers may overwrite sums over channels a step later than they set out on their way back. Who
  // gains by meeting only then was measured, too.
  static constexpr bool kMeetsLate =
      kLinesLast && !kCrowded && (kIdle || (IsRegular(kElements) && kElements != Elements::kFloat));
  static constexpr bool kKeepsSums =
      kCrowded ||
      (kLinesLast && (IsRegular(kElements) || (kElements == Elements::kMixed && !kWaits)));
  struct Staged {
    alignas(16) float2 steps[Sequences::kCells];  // delta, delta * u
    alignas(16) float dy[Sequences::kCells];
    uint32_t restarts;
  };
  struct StagedProjections {
    alignas(16) Number B[kCopies * kCopy];
    alignas(16) Number C[kCopies * kCopy];
  };
  // One is walked, the other staged.
  Staged sequences[2];
  StagedProjections projections[2];
  // The states on entering either tile, saved by the forward pass. Rows, of channels, have some
  // more, and every eighth is moved on, so that a warp's are on different banks.
  static constexpr int kRowEntering = kChannels + (kStates == 4 ? 0 : 4);
  __device__ static int Entering(int state, int channel) {
    return state * kRowEntering + state / 8 * (4 * kStates) + channel;
  }
  alignas(16) Number entering[2][kGroup * kRowEntering + kGroup / 8 * (4 * kStates)];
  // Where a lane's states of all steps exceed the registers, it takes a tile in halves, by the same
  // code, and those of the first wait here while it takes the second.
  static constexpr int kHalves = kCrowded ? 2 : 1, kSteps = kTile / kHalves;
  alignas(16) float4 early[kCrowded ? kSteps - 1 : 1][kCrowded ? kStates * kPerLane / 4 : 1]
                          [kCrowded ? kWalkers : 1];
  // What the gradients of a pair need again: u and slopes. Stagers of crowded walkers have
  // registers for it.
  alignas(16) float4 kept[2][kCrowded ? 1 : kPairs];
  // d(delta u), d(delta): sums over n. Stagers finish one tile's while the next are made.
  static constexpr int kBuffers = kStagers ? 2 : 1;
  // Groups of states add to theirs in turn: where lanes hold the same sum, all but one have a cell
  // of their own for it, since a branch would keep steps apart.
  static constexpr int kAllSums = 2 * kSums + (kWaits ? kWalkers : 0);
  alignas(16) float sums[kBuffers][kAllSums];
  // Each warp's sums over its channels: state, (dB, dC), part. What a warp adds up at once lies on
  // different banks: the states of two steps, or, where time is last, sixteen steps of two.
  static constexpr int kValues = 2 * kGroup * kParts;
  static constexpr int kRowOfSums = kValues + (kLayout == Layout::kChannelLast ? 0 : 2);
  // Two where there is room: then walkers need not wait for those of the last tile to be used.
  static constexpr int kSetsOfSums = kWaits && kVary ? 2 : 1;
  alignas(16) float channel_sums[kSetsOfSums][kWalkers / kWarp][kTile][kRowOfSums];
  Vectors<kChannels> vectors;
  // Each staging thread's sums of dD and d_bias. Where channels are last, pairs that are kAcross
  // apart are of the same two; where time is last, a pair is of one channel.
  static constexpr int kVectorSums =
      kLayout == Layout::kChannelLast ? Sequences::kAcross : Sequences::kCount;
  using VectorSum = std::conditional_t<kLayout == Layout::kTimeLast, float2, float4>;
  alignas(16) VectorSum vector_sums[kKeepsSums ? 1 : kVectorSums * kStaging];
  // Pairs that a stager works on at once. The loops over the others are not unrolled, unless a
  // pair's registers have to be known.
  static constexpr int kBatch = Sequences::kCount % 2 || (kCrowded && kElements != Elements::kFloat)
                                    ? Sequences::kCount
                                    : Sequences::kCount / 2;
  static constexpr int kBatches = Sequences::kCount / kBatch;
  static_assert(kBatches * kBatch == Sequences::kCount);
  // What comes next, as it lies in memory: u, delta, z, cotangent of out, output before the gate;
  // B, C. For want of room it may be a batch instead of a tile.
  static constexpr bool kInBatches = kCrowded && kBatches > 1;
  // Regular sequences are copied 16 bytes at a time where there is a slot for all of a tile.
  static constexpr bool kSharesSlots = kStagers && IsRegular(kElements) && !kInBatches;
  static_assert(!kQuads || kBatch % 2 == 0);
  alignas(16) typename Sequences::Slot next_sequences[5][kInBatches ? kBatch * kStaging : kPairs];
  typename Projections::Slot next_projections[2][Projections::kCount * kStaging];
};

// What the gradients of a pair of elements need again: u, and the slope of softplus.
struct Kept {
  float2 input, slope;
};

__device__ inline void Split(float x, float* to) { to[0] = x; }
__device__ inline void Split(Complex x, float* to) { to[0] = x.re, to[1] = x.im; }

// kRestarts: the state may start anew along the sequence.
template <typename Number, int kStates, int kLanes, int kPerLane, int kWalkers, int kStagers,
          bool kWaits, Elements kElements, Layout kLayout, bool kRestarts, bool kQuads>
__global__ void __launch_bounds__(
    BackwardShared<Number, kStates, kLanes, kPerLane, kWalkers, kStagers, kWaits, kElements,
                   kLayout, kQuads>::kThreads)
    BackwardKernel(const __grid_constant__ Backward p, const __grid_constant__ Plan plan,
                   const __grid_constant__ BackwardWorkspace workspace) {
  using Shared = BackwardShared<Number, kStates, kLanes, kPerLane, kWalkers, kStagers, kWaits,
                                kElements, kLayout, kQuads>;
  using Sequences = typename Shared::Sequences;
  using Projections = typename Shared::Projections;
  using Staged = typename Shared::Staged;
  using StagedProjections = typename Shared::StagedProjections;
  constexpr int kChannels = Shared::kChannels, kGroup = Shared::kGroup, kParts = Shared::kParts;
  constexpr bool kVary = Shared::kVary;
  constexpr int kStep = Shared::kStep, kRow = Shared::kRow;
  extern __shared__ char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  static_assert(kStagers || !kWaits);
  const int groups = kWaits ? plan.state_groups : 1;
  const bool waits = groups > 1;

  const Operands& o = p.operands;
  const Block block(p, plan);
  constexpr int kPairs = Sequences::kCount, kProjectionPairs = Projections::kCount;
  // Schedulers prefer the older of their warps. Those who stage are to be done when those who walk
  // are, and so are the older ones; beside an idle warp, which counts as the last, they are not.
  int thread = static_cast<int>(threadIdx.x);
  if (kStagers && !Shared::kIdle) thread = (thread + kWalkers) % Shared::kThreads;
  if (Shared::kIdle && thread >= kWalkers + 2 * kWarp && thread / kWarp % 2) thread ^= 2 * kWarp;
  const int stager = thread - Shared::kFirst;  // of those who stage
  const Operands& ct = p.cotangents;
  const Sequences sequences(SequenceLines(p, block), p.reverse, stager);
  const Projections projections(ProjectionLines<kParts>(p, block), p.reverse, stager);
  // The pass before spans has waited for what came before, and walkers wait for that pass.
  if (plan.spans == 1) WaitForBefore();
  // Stagers have more urgent loads to send for.
  if (thread < kWalkers) StageVectors<kWalkers, kChannels>(p, block, thread, shared.vectors);
  const bool B_varies = kVary || p.B_varies, C_varies = kVary || p.C_varies;
  const bool has_z = o.z.data != nullptr;
  const int first_tile = static_cast<int>(block.span) * plan.span_tiles;
  const int last_tile =
      first_tile + plan.span_tiles < plan.tiles ? first_tile + plan.span_tiles : plan.tiles;
  char* const base = static_cast<char*>(p.workspace.data);

  auto rows_of = [&](int tile) {
    return Rows(p, plan, tile, p.reverse, first_tile <= tile && tile < last_tile);
  };
  int64_t next_sequences = sequences.At(rows_of(last_tile - 1));
  using Place = typename Sequences::Place;
  constexpr int kBatch = Shared::kBatch, kBatches = Shared::kBatches;
  auto slot_of = [&](int batch, int i) {
    return Place::template InGroup<kBatch>(Shared::kInBatches ? 0 : batch, i);
  };
  auto load_pair = [&](const Rows& rows, Place k, Place slot) {
    auto load = [&](const Array& from, int i, bool wanted = true) {
      auto& to = shared.next_sequences[i];
      if constexpr (kQuads)
        sequences.PrefetchQuad(from, next_sequences, rows, to, k, slot, wanted);
      else
        sequences.PrefetchPair(from, next_sequences, rows, to, k, slot, wanted);
    };
    load(o.u, 0);
    load(o.delta, 1);
    load(o.z, 2, has_z);
    load(p.out_cotangent, 3);
    load(p.ungated, 4, has_z);
  };
  // Batches are loaded in order, tile by tile.
  auto load_batch = [&](const Rows& rows, int batch) {
#pragma unroll(Shared::kCrowded ? 1 : kBatch)
    for (int i = 0; i < kBatch; i += kQuads ? 2 : 1)
      load_pair(rows, Place::template InGroup<kBatch>(batch, i), slot_of(batch, i));
    if (batch + 1 == kBatches) next_sequences -= sequences.Stride();
  };
  int64_t next_projections = projections.At(rows_of(last_tile - 1));
  auto load_projections = [&](const Rows& rows, int group) {
    const int line = group * kGroup * kParts;
    const int64_t at = waits ? projections.At(rows, line) : next_projections;
    projections.Prefetch(o.B, at, rows, shared.next_projections[0], line, B_varies);
    projections.Prefetch(o.C, at, rows, shared.next_projections[1], line, C_varies);
    SendCopies();
    next_projections -= projections.Stride();
  };
  // The states on entering a tile, by stagers and as copies: loads of walkers into registers share
  // one of six scoreboards with other loads, so that these waited for global memory, too.
  constexpr int kWide = 16 / sizeof(Number);
  // Whether channels are aligned to so many numbers, which are then copied at once.
  const bool wide = kStagers && p.dim % kWide == 0 && block.first_channel % kWide == 0 &&
                    block.channels % kWide == 0;
  auto saved_before = [&](int tile, int group) {
    const int64_t slot =
        block.row * (plan.tiles - 1) + (p.reverse ? plan.tiles - 1 - tile : tile - 1);
    return TransposedIndex(p, block, slot, 0, group * kGroup);
  };
  int64_t next_states = saved_before(last_tile - 1, 0);
  auto load_states = [&](int tile, int group, int turn) {
    const bool first = tile == 0;
    const Array& array = first ? o.initial_state : p.states;
    const int states_there =
        tile >= 0 && array.data ? static_cast<int>(p.dstate) - group * kGroup : 0;
    auto copy = [&](auto numbers, int n, int channel, int64_t from) {
      constexpr int kBytes = decltype(numbers)::value * sizeof(Number);
      const bool exists = n < states_there && channel < block.channels;
      CopyAsync<kBytes>(&shared.entering[turn][Shared::Entering(n, channel)],
                        static_cast<const Number*>(array.data) + from, exists ? kBytes : 0);
    };
    if (wide && !first) {
      // So many threads to a state, each with quads that are evenly spaced.
      constexpr int kAbreast = kStagers ? Shared::kStaging / kGroup : 1, kSpace = kAbreast * kWide;
      const int n = stager / kAbreast, channel = stager % kAbreast * kWide;
      const int64_t from = (waits ? saved_before(tile, group) : next_states) + n * p.dim + channel;
#pragma unroll
      for (int more = 0; more < kChannels; more += kSpace)
        if (kChannels % kSpace == 0 || channel + more < kChannels)
          copy(std::integral_constant<int, kWide>(), n, channel + more, from + more);
    } else {
      const int64_t at =
          first ? StateIndex(p, block, 0, group * kGroup) : saved_before(tile, group);
      const int64_t of_state = first ? 1 : p.dim, of_channel = first ? p.dstate : 1;
#pragma unroll 1
      for (int i = stager; i < kGroup * kChannels; i += Shared::kStaging) {
        const int n = i / kChannels, channel = i % kChannels;
        copy(std::integral_constant<int, 1>(), n, channel,
             at + n * of_state + channel * of_channel);
      }
    }
    next_states -= p.reverse ? -p.dstate * p.dim : p.dstate * p.dim;
  };
  // No branches in what follows: they would keep steps and staging apart.
  struct Pair {
    uint2 u, delta, z, out_cotangent, ungated;
  };
  auto take_sequences = [&](Place slot) {
    auto take = [&](int i) { return sequences.Take(shared.next_sequences[i], slot); };
    return Pair{take(0), take(1), take(2), take(3), take(4)};
  };
  struct ProjectionPair {
    uint2 B, C;
  };
  auto take_projections = [&](int k) {
    auto take = [&](int i) { return projections.Take(shared.next_projections[i], k); };
    return ProjectionPair{take(0), take(1)};
  };
  // delta_bias and D of a stager's lines, which are the same in every tile.
  constexpr bool kKeepsVectors = Shared::kKeepsVectors;
  [[maybe_unused]] float2 kept_bias[kKeepsVectors ? Sequences::kAcross : 1] = {};
  [[maybe_unused]] float2 kept_D[kKeepsVectors ? Sequences::kAcross : 1] = {};
  auto of_lines = [&](const float* lines, const float2* kept, Place k) {
    if constexpr (kKeepsVectors)
      return kept[k.across];
    else
      return sequences.OfLines(lines, k);
  };
  // Where the tile that is finished next begins.
  int64_t finished = sequences.At(rows_of(last_tile - 1)) + sequences.Stride();
  // at: where the tile begins. The gradient of z needs nothing of the walk.
  auto stage_sequences = [&](const Rows& rows, int64_t at, Place k, const Pair& pair,
                             Staged& to) -> Kept {
    if (!sequences.Mine(k)) return {};
    const float2 input = sequences.Widen(pair.u, k, o.u);
    float2 dy = sequences.Widen(pair.out_cotangent, k, p.out_cotangent);
    const float2 x = sequences.Widen(pair.z, k, o.z);
    const float2 ungated = sequences.Widen(pair.ungated, k, p.ungated);
    const float2 sigmoid{Sigmoid<kExact<kElements>>(x.x), Sigmoid<kExact<kElements>>(x.y)};
    // By the derivative of silu.
    const float2 d_gate{dy.x * (sigmoid.x * fmaf(x.x, 1.0f - sigmoid.x, 1.0f)),
                        dy.y * (sigmoid.y * fmaf(x.y, 1.0f - sigmoid.y, 1.0f))};
    sequences.Store(ct.z, at, rows, k, d_gate.x * ungated.x, d_gate.y * ungated.y, has_z);
    dy = {has_z ? dy.x * (x.x * sigmoid.x) : dy.x, has_z ? dy.y * (x.y * sigmoid.y) : dy.y};
    float2 delta = sequences.Widen(pair.delta, k, o.delta);
    const float2 bias = of_lines(shared.vectors.delta_bias, kept_bias, k);
    delta = {delta.x + bias.x, delta.y + bias.y};
    const Softplus<kExact<kElements>> first(delta.x), second(delta.y);
    delta = p.delta_softplus ? float2{first.value, second.value} : delta;
    float2 slope = p.delta_softplus ? float2{first.slope, second.slope} : float2{1.0f, 1.0f};
    // Steps that are not there have delta 0, whatever the bias.
    const bool has_first = sequences.Exists(k, 0, rows), has_second = sequences.Exists(k, 1, rows);
    delta = {has_first ? delta.x : 0.0f, has_second ? delta.y : 0.0f};
    slope = {has_first ? slope.x : 0.0f, has_second ? slope.y : 0.0f};
    sequences.Put(to.steps, k, {delta.x, delta.x * input.x}, {delta.y, delta.y * input.y});
    // y = 2 Re sum C h for complex numbers: the walk sees its cotangent doubled.
    sequences.Put(to.dy, k, dy.x * kParts, dy.y * kParts);
    return {input, slope};
  };
  // In registers: of the tile that was staged last, and of the one before.
  [[maybe_unused]] Kept kept_of_staged[kPairs] = {}, kept_of_walked[kPairs] = {};
  auto keep = [&](int buffer, Place k, const Kept& kept) {
    if constexpr (Shared::kCrowded) {
      kept_of_staged[k.Number()] = kept;
    } else if (sequences.Mine(k)) {
      const int place = sequences.Index(k);
      shared.kept[buffer][place] = {kept.input.x, kept.input.y, kept.slope.x, kept.slope.y};
    }
  };
  auto kept = [&](int buffer, Place k) {
    if constexpr (Shared::kCrowded) return kept_of_walked[k.Number()];
    const int place = sequences.Mine(k) ? sequences.Index(k) : 0;
    const float4 x = shared.kept[buffer][place];
    return Kept{{x.x, x.y}, {x.z, x.w}};
  };
  auto stage_varying = [&](int k, const ProjectionPair& pair, StagedProjections& to) {
    auto stage = [&](const Array& from, uint2 raw, Number* at) {
      const float2 x = projections.Widen(raw, k, from);
      if constexpr (kVary) {
        if (!projections.Mine(k)) return;
        const int first = projections.LineOf(k, 0), second = projections.LineOf(k, 1);
#pragma unroll
        for (int i = 0; i < Shared::kCopies; ++i) {
          at[i * Shared::kCopy + projections.Cell(k, 0) + (first ^ i) - first] = x.x;
          at[i * Shared::kCopy + projections.Cell(k, 1) + (second ^ i) - second] = x.y;
        }
      } else {
        projections.Put(reinterpret_cast<float*>(at), k, x.x, x.y);
      }
    };
    if (B_varies) stage(o.B, pair.B, to.B);
    if (C_varies) stage(o.C, pair.C, to.C);
  };
  auto stage_fixed = [&](int group, StagedProjections& to) {
    auto stage = [&](const Array& from, Number* at) {
      StageFixed<Number, Shared::kStaging, kChannels, kGroup, kRow>(p, block, from, group * kGroup,
                                                                    stager, at);
    };
    if (!B_varies) stage(o.B, to.B);
    if (!C_varies) stage(o.C, to.C);
  };
  // Where the state starts anew in a tile: one warp loads segment ids, and finds it by them later.
  [[maybe_unused]] SegmentIds segments;
  const bool finds_restarts = kRestarts && p.has_segments && sequences.Index(0) < kWarp;
  auto load_segments = [&](const Rows& rows) {
    if (finds_restarts) segments = SegmentIds(p, block.row, rows);
  };
  auto stage_restarts = [&](Staged& to) {
    if (!finds_restarts) return;
    const uint32_t restarts = segments.Restarts();
    if (sequences.Index(0) == 0) to.restarts = restarts;
  };
  // The block's sums over channels, into its own part of the workspace.
  auto finish_projections = [&](const Rows& rows, int group, int turn) {
    constexpr int kSums = kTile * kGroup;
#pragma unroll
    for (int i0 = 0; i0 < kSums; i0 += kWalkers) {
      const int i = i0 + thread;
      const int offset = p.channel_last ? i / kGroup : i % kTile;
      const int n = p.channel_last ? i % kGroup : i / kTile;
      if (i >= kSums || offset >= rows.steps || group * kGroup + n >= p.dstate) continue;
      const int64_t t = rows.t0 + offset, state = group * kGroup + n;
      const int64_t block_index =
          (block.row * p.groups + block.group) * plan.blocks_per_group + block.index_in_group;
      const int64_t to = block_index * p.length * p.dstate +
                         (p.channel_last ? t * p.dstate + state : state * p.length + t);
      float sums[2][kParts] = {};
      const int row = rows.Row(offset);
#pragma unroll
      for (int warp = 0; warp < kWalkers / kWarp; ++warp) {
        const float* sums_of_warp = shared.channel_sums[turn % Shared::kSetsOfSums][warp][row];
#pragma unroll
        for (int k = 0; k < kParts; ++k) {
          const float2 x = reinterpret_cast<const float2*>(sums_of_warp)[n * kParts + k];
          // Values 2 * k and 2 * k + 1 of a state: dB and dC, or both parts of either.
          sums[2 * k / kParts][2 * k % kParts] += x.x;
          sums[(2 * k + 1) / kParts][(2 * k + 1) % kParts] += x.y;
        }
      }
      float* to_B = reinterpret_cast<float*>(base + workspace.dB) + to * kParts;
      float* to_C = reinterpret_cast<float*>(base + workspace.dC) + to * kParts;
#pragma unroll
      for (int k = 0; k < kParts; ++k) {
        if (kVary || B_varies) StoreForLater(to_B + k, sums[0][k]);
        if (kVary || C_varies) StoreForLater(to_C + k, sums[1][k]);
      }
    }
  };
  using VectorSum = typename Shared::VectorSum;
  [[maybe_unused]] VectorSum vector_sums[Shared::kVectorSums] = {};
  auto vector_sum = [&](Place k) -> VectorSum& {
    const Place first = kLayout == Layout::kChannelLast ? Place(k.across) : k;
    if constexpr (Shared::kKeepsSums)
      return vector_sums[first.Number()];
    else
      return shared.vector_sums[sequences.Index(first)];
  };
  auto finish = [&](const Rows& rows, Place k, const Staged& from, const Kept& kept,
                    const float* sums) {
    if (!sequences.Mine(k)) return;
    const float2 D = of_lines(shared.vectors.D, kept_D, k);
    const float2 slope = kept.slope;
    const float2 delta{from.steps[sequences.WideCell(k, 0)].x,
                       from.steps[sequences.WideCell(k, 1)].x};
    const float2 input = kept.input;
    float2 dy = sequences.Get(from.dy, k);
    dy = {dy.x * (1.0f / kParts), dy.y * (1.0f / kParts)};
    const float2 d_input = sequences.Get(sums, k);
    float2 d_delta = sequences.Get(sums + Shared::kSums, k);
    sequences.Store(ct.u, finished, rows, k, fmaf(d_input.x, delta.x, D.x * dy.x),
                    fmaf(d_input.y, delta.y, D.y * dy.y));
    d_delta = {fmaf(d_input.x, input.x, d_delta.x * kRateUnit) * slope.x,
               fmaf(d_input.y, input.y, d_delta.y * kRateUnit) * slope.y};
    sequences.Store(ct.delta, finished, rows, k, d_delta.x, d_delta.y);
    // Nothing was walked yet before the first tile; stagers do not come here then.
    if (!kStagers && rows.steps == 0) return;
    auto& sum = vector_sum(k);
    if constexpr (kLayout == Layout::kTimeLast)
      sum = {fmaf(dy.x, input.x, fmaf(dy.y, input.y, sum.x)), sum.y + (d_delta.x + d_delta.y)};
    else
      sum = {fmaf(dy.x, input.x, sum.x), fmaf(dy.y, input.y, sum.y), sum.z + d_delta.x,
             sum.w + d_delta.y};
  };
  const int64_t slot = block.span * p.batch + block.row;
  auto finish_vectors = [&] {
    // Each channel's sums of dD and d_bias: every thread writes its own, then one thread per
    // channel adds those of its channel in the order of the steps.
    Meet<Shared::kStaging, 3>();
    float* sum_D = shared.sums[0];
    float* sum_bias = shared.sums[0] + Shared::kSums;
#pragma unroll
    for (int k = 0; k < kPairs; ++k) {
      VectorSum sum{};
      if (k < Shared::kVectorSums) sum = vector_sum(k);
      if constexpr (kLayout == Layout::kTimeLast) {
        sequences.Put(sum_D, k, sum.x, 0.0f);
        sequences.Put(sum_bias, k, sum.y, 0.0f);
      } else {
        sequences.Put(sum_D, k, sum.x, sum.y);
        sequences.Put(sum_bias, k, sum.z, sum.w);
      }
    }
    Meet<Shared::kStaging, 3>();
    for (int channel = sequences.Index(0); channel < block.channels; channel += Shared::kStaging) {
      float D = 0.0f, bias = 0.0f;
#pragma unroll
      for (int t = 0; t < kTile; ++t) {
        D += sum_D[t * kStep + channel];
        bias += sum_bias[t * kStep + channel];
      }
      const int64_t to = slot * p.dim + block.first_channel + channel;
      reinterpret_cast<float*>(base + workspace.dD)[to] = D;
      reinterpret_cast<float*>(base + workspace.d_bias)[to] = bias;
    }
  };
  auto begin_staging = [&] {
#pragma unroll
    for (int k = 0; k < Shared::kVectorSums; ++k) vector_sum(k) = {};
    for (int batch = 0; batch < (Shared::kInBatches ? 1 : kBatches); ++batch)
      if (!Shared::kSharesSlots) load_batch(rows_of(last_tile - 1), batch);
    load_states(last_tile - 1, 0, 0);
    load_projections(rows_of(last_tile - 1), 0);
  };
  if (!kStagers) begin_staging();
  if constexpr (kStagers > 0) {
    if (thread >= kWalkers + kStagers) {
      __syncthreads();
      return;
    }
    if (thread >= kWalkers) {
      // Copies of 16 bytes are of whoever comes first, not of those who stage them: they are sent
      // when all are done with the last ones, while walkers are on their way forward and stagers
      // have time, and stagers meet before they take them.
      constexpr bool kSharesSlots = Shared::kSharesSlots;
      auto quads = [&] {
        if constexpr (kSharesSlots)
          return EvenCopies<Sequences>(SequenceLines(p, block), rows_of(last_tile - 1).t0, stager);
        else
          return 0;
      }();
      [[maybe_unused]] auto send_sequences = [&](const Rows& rows) {
        if constexpr (kSharesSlots) {
          if (plan.in_quads && rows.steps == kTile) {
            auto& to = shared.next_sequences;
            quads.Send(o.u, to[0]), quads.Send(o.delta, to[1]), quads.Send(o.z, to[2], has_z);
            quads.Send(p.out_cotangent, to[3]), quads.Send(p.ungated, to[4], has_z);
            next_sequences -= sequences.Stride();
          } else {
            for (int batch = 0; batch < kBatches; ++batch) load_batch(rows, batch);
          }
          quads.Advance(-sequences.Stride());
        }
        SendCopies();
      };
      if (kSharesSlots) send_sequences(rows_of(last_tile - 1));
      begin_staging();
      __syncthreads();
      int turn = 0;  // of the projections that are staged
      if constexpr (kKeepsVectors)
#pragma unroll
        for (int across = 0; across < Sequences::kAcross; ++across) {
          kept_bias[across] = sequences.OfLines(shared.vectors.delta_bias, across);
          kept_D[across] = sequences.OfLines(shared.vectors.D, across);
        }
      load_segments(rows_of(last_tile - 1));
      auto stage = [&](int tile, int group, int parity) {
        Staged& to = shared.sequences[parity];
        const bool last_group = group + 1 == groups;
        const Rows rows = rows_of(tile), next = rows_of(last_group ? tile - 1 : tile);
        const int64_t staged = finished - sequences.Stride();
        WaitForCopies();
        Meet<kStagers, 3>();
        // Taken into registers before the next ones are sent to the same place.
        ProjectionPair raw_projections[kProjectionPairs];
#pragma unroll
        for (int k = 0; k < kProjectionPairs; ++k) raw_projections[k] = take_projections(k);
        load_projections(next, last_group ? 0 : group + 1);
#pragma unroll
        for (int k = 0; k < kProjectionPairs; ++k)
          stage_varying(k, raw_projections[k], shared.projections[turn]);
        if (group == 0 || last_group) {
#pragma unroll(Shared::kCrowded ? kBatches : 1)
          for (int batch = 0; batch < kBatches; ++batch) {
            Pair raw[kBatch];
            if (Shared::kInBatches && batch) {
              WaitForCopies();
              sequences.MeetForCopies();
            }
            // Those of crowded walkers have no registers for all, and need not hurry where what
            // comes next is sent later.
            constexpr bool kTakesLate = Shared::kCrowded && kSharesSlots;
            auto take = [&](int i) { raw[i] = take_sequences(slot_of(batch, i)); };
            if (!kTakesLate && group == 0)
#pragma unroll
              for (int i = 0; i < kBatch; ++i) take(i);
            if (!kSharesSlots && last_group) {
              sequences.MeetForCopies();
              const bool later = Shared::kInBatches && batch + 1 < kBatches;
              load_batch(later ? rows : next, Shared::kInBatches ? (batch + 1) % kBatches : batch);
              SendCopies();
            }
            if (group == 0)
#pragma unroll
              for (int i = 0; i < kBatch; ++i) {
                const Place k = Place::template InGroup<kBatch>(batch, i);
                if (kTakesLate) take(i);
                keep(parity, k, stage_sequences(rows, staged, k, raw[i], to));
              }
          }
          if (group == 0) {
            stage_restarts(to);
            load_segments(rows_of(tile - 1));
          }
        }
        if (!kVary) stage_fixed(group, shared.projections[turn]);
        turn ^= 1;
      };
      auto finish_pairs = [&](const Rows& rows, int parity) {
        if (rows.steps == 0) return;
#pragma unroll(Shared::kCrowded ? kBatches : 1)
        for (int batch = 0; batch < kBatches; ++batch) {
#pragma unroll
          for (int i = 0; i < kBatch; ++i) {
            const Place k = Place::template InGroup<kBatch>(batch, i);
            finish(rows, k, shared.sequences[parity], kept(parity, k), shared.sums[parity]);
          }
        }
      };
      // Stages a tile, and finishes the one before, whose buffers are next to be filled.
      auto take_turns = [&](int tile, int parity) {
        for (int group = 0; group < groups; ++group) {
          stage(tile, group, parity);
          Meet<kWalkers + kStagers>();
          const bool last_group = group + 1 == groups;
          load_states(last_group ? tile - 1 : tile, last_group ? 0 : group + 1, turn);
          if (kSharesSlots && last_group)
            send_sequences(rows_of(tile - 1));
          else
            SendCopies();
          if (group > 0) continue;
          finish_pairs(rows_of(tile + 1), 1 - parity);
          finished -= sequences.Stride();
#pragma unroll
          for (int k = 0; k < kPairs; ++k) kept_of_walked[k] = kept_of_staged[k];
        }
      };
      int parity = 0;
      for (int tile = last_tile - 1; tile >= first_tile; --tile, parity ^= 1)
        take_turns(tile, parity);
      Meet<kStagers, 3>();
      Meet<kWalkers + kStagers>();
      finish_pairs(rows_of(first_tile), parity ^ 1);
      finish_vectors();
      return;
    }
  }

  __syncthreads();
  // For racecheck alone, which tells by counting what was before and what after: stagers meet by
  // themselves before they stage a tile, and before the last of all meetings, and walkers as often.
  if (kStagers) Meet<kWalkers, 2>();
  const int walker = LanePlace(thread), lane = walker % kLanes;
  // Lanes that differ in their channels, and how many of those bits serve to swap states.
  constexpr int kAcross = kWarp / kLanes;
  constexpr int kStateBits = Log2(kStates) < Log2(kAcross) ? Log2(kStates) : Log2(kAcross);
  const int across = walker % kWarp / kLanes;
  int state_swap = 0;  // the first halving parts the states by their highest bit
#pragma unroll
  for (int bit = 0; bit < kStateBits; ++bit)
    if (across >> bit & 1) state_swap |= kStates >> (bit + 1);
  constexpr bool kSwapsChannels = kPerLane == 2 && kLanes > 1;
  const int channel_swap = kSwapsChannels ? lane & 1 : 0;
  // The bit of a lane's place by which the sums over states part: d_input from d_delta.
  constexpr int kSecond = kSwapsChannels ? 2 : 1;
  static_assert(kSecond < kLanes);
  const bool second = lane & kSecond;
  // Where this lane's sum of the first row goes. Other lanes may hold the same.
  float* const sums_of_lane =
      shared.sums[0] + second * Shared::kSums + walker / kLanes * kPerLane + channel_swap;
  [[maybe_unused]] const bool adds = lane < 2 * kSecond;
  auto channel_of = [&](int j) { return walker / kLanes * kPerLane + (j ^ channel_swap); };
  auto state_of = [&](int group, int i) {
    return static_cast<int64_t>(group) * kGroup + lane * kStates + (i ^ state_swap);
  };

  // Of a lane's states and channels. A fixed B or C has its gradient summed over time here.
  Number rate[kStates][kPerLane] = {}, adjoint[kStates][kPerLane] = {}, dA[kStates][kPerLane] = {};
  [[maybe_unused]] Number dB[kStates][kPerLane] = {}, dC[kStates][kPerLane] = {};
  auto each = [&](auto body) {
#pragma unroll
    for (int i = 0; i < kStates; ++i)
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) body(i, j);
  };
  // What groups of states have come to while they wait their turn: (blocks, groups, kArrays,
  // kStates, kPerLane, walkers). Every lane writes and reads its own.
  enum { kRate, kAdjoint, kDA, kDB, kDC, kArrays };
  static_assert(kArrays == BackwardWorkspace::kWaitingArrays);
  [[maybe_unused]] Number* const waiting =
      reinterpret_cast<Number*>(base + workspace.waiting) +
      blockIdx.x * int64_t{groups} * (kArrays * kStates * kPerLane * kWalkers) + walker;
  [[maybe_unused]] auto waiting_of = [&](int group, int array, int i, int j) -> Number& {
    return waiting[(((group * kArrays + array) * kStates + i) * kPerLane + j) * kWalkers];
  };
  auto set_aside = [&](int group) {
    each([&](int i, int j) {
      waiting_of(group, kAdjoint, i, j) = adjoint[i][j];
      waiting_of(group, kDA, i, j) = dA[i][j];
      if constexpr (!kVary) {
        waiting_of(group, kDB, i, j) = dB[i][j];
        waiting_of(group, kDC, i, j) = dC[i][j];
      }
    });
  };
  const Pieces<Number> pieces = PiecesIn<Number>(p, workspace);
  if (block.span + 1 < plan.spans) WaitForBefore();  // for pieces
  for (int group = 0; group < groups; ++group) {
    auto exists = [&](int i, int j) {
      return channel_of(j) < block.channels && state_of(group, i) < p.dstate;
    };
    each([&](int i, int j) {
      const int64_t n = state_of(group, i);
      const int channel = channel_of(j);
      rate[i][j] = Rate(LoadWeight<Number>(o.A, p, block, channel, n));
      adjoint[i][j] = exists(i, j) && p.last_state_cotangent.data
                          ? static_cast<const Number*>(
                                p.last_state_cotangent.data)[StateIndex(p, block, channel, n)]
                          : Number{};
      dA[i][j] = Number{};
      if constexpr (!kVary) dB[i][j] = dC[i][j] = Number{};
    });
#pragma unroll 4
    for (int64_t piece = 0; piece < (plan.spans - 1 - block.span) * plan.pieces; ++piece) {
      each([&](int i, int j) {
        adjoint[i][j] = pieces.After(piece, adjoint[i][j], p, block, channel_of(j),
                                     state_of(group, i), rate[i][j]);
      });
    }
    if (waits) {
      each([&](int i, int j) { waiting_of(group, kRate, i, j) = rate[i][j]; });
      set_aside(group);
    }
  }

  if constexpr (!kStagers) {
    WaitForCopies();
    Staged& to = shared.sequences[0];
#pragma unroll
    for (int k = 0; k < kPairs; ++k)
      keep(0, k,
           stage_sequences(rows_of(last_tile - 1), finished - sequences.Stride(), k,
                           take_sequences(k), to));
#pragma unroll
    for (int k = 0; k < kProjectionPairs; ++k)
      stage_varying(k, take_projections(k), shared.projections[0]);
    stage_fixed(0, shared.projections[0]);
    load_segments(rows_of(last_tile - 1));
    stage_restarts(to);
  }

  int parity = 0, turn = 0;  // of the sequences; of the projections and sums over channels
  for (int tile = last_tile - 1; tile >= first_tile; --tile, parity ^= 1) {
    // Without stagers, what is finished and what is staged between the steps; their states are one
    // group.
    [[maybe_unused]] const Rows previous = rows_of(tile + 1), next = rows_of(tile - 1);
    const Staged& staged = shared.sequences[parity];
    [[maybe_unused]] Staged& staging = shared.sequences[parity ^ 1];
    float* const to_sums = sums_of_lane + (kStagers ? parity * Shared::kAllSums : 0);
    [[maybe_unused]] float* const sums_of_tile = shared.sums[kStagers ? parity : 0];
    for (int group = 0; group < groups; ++group, turn ^= 1) {
      const StagedProjections& staged_projections = shared.projections[turn];
      auto& channel_sums = shared.channel_sums[turn % Shared::kSetsOfSums][walker / kWarp];
      [[maybe_unused]] StagedProjections& staging_projections = shared.projections[turn ^ 1];
      constexpr int kSteps = Shared::kSteps;
      Number history[kSteps + 1][kStates][kPerLane];
      auto entering = [&](int i, int j) {
        return shared.entering[turn][Shared::Entering(lane * kStates, channel_of(j)) +
                                     (i ^ state_swap) * Shared::kRowEntering];
      };
      // Of step t of a half, in the first of which they wait in shared memory.
      constexpr int kQuarters = kStates * kPerLane / 4;
      auto put_early = [&](int half, int t) {
        if constexpr (Shared::kCrowded) {
          if (!t || half) return;
          const Number* h = &history[t][0][0];
#pragma unroll
          for (int k = 0; k < kQuarters; ++k)
            shared.early[t - 1][k][thread] = {h[4 * k], h[4 * k + 1], h[4 * k + 2], h[4 * k + 3]};
        }
      };
      auto get_early = [&](int half, int t) {
        if (!t && !half) each([&](int i, int j) { history[0][i][j] = entering(i, j); });
        if constexpr (Shared::kCrowded) {
          if (!t || half) return;
          Number* h = &history[t][0][0];
#pragma unroll
          for (int k = 0; k < kQuarters; ++k) {
            const float4 x = shared.early[t - 1][k][thread];
            h[4 * k] = x.x, h[4 * k + 1] = x.y, h[4 * k + 2] = x.z, h[4 * k + 3] = x.w;
          }
        }
      };
      if (waits) {
        each([&](int i, int j) {
          rate[i][j] = waiting_of(group, kRate, i, j);
          adjoint[i][j] = waiting_of(group, kAdjoint, i, j);
          dA[i][j] = waiting_of(group, kDA, i, j);
          if constexpr (!kVary) {
            dB[i][j] = waiting_of(group, kDB, i, j);
            dC[i][j] = waiting_of(group, kDC, i, j);
          }
        });
      }
      // What was staged is there, and so are all sums of the walk before; everyone is done with
      // what lay where now is staged.
      Meet<kWalkers + kStagers>();
      const uint32_t restarts = kRestarts && p.has_segments ? staged.restarts : 0;
      if constexpr (!kStagers) {
        // Loaded here, staged in the second half of the walk back.
        for (int batch = 0; batch < kBatches; ++batch) load_batch(next, batch);
        load_states(tile - 1, 0, turn ^ 1);
        load_projections(next, 0);
        if (!kVary) {
          stage_fixed(0, staging_projections);
          load_segments(next);
          stage_restarts(staging);
        }
      }
      finish_projections(group ? rows_of(tile) : rows_of(tile + 1), group ? group - 1 : groups - 1,
                         turn ^ 1);

      auto step_start = [](int half, int t) {
        constexpr int kHalf = Sequences::template RowStart<float2>(Shared::kSteps % kTile);
        return half * kHalf + Sequences::template RowStart<float2>(t);
      };
      // B or C of a row, for a lane's states and channels; a fixed one differs between channels.
      auto load = [&](const Number* from, bool varies, int row, Number(&to)[kStates][kPerLane]) {
        if constexpr (kVary) {
          Number states[kStates];
          LoadStates(from + state_swap * Shared::kCopy + row * kRow + lane * kStates, states);
          each([&](int i, int j) { to[i][j] = states[i]; });
        } else {
          each([&](int i, int j) {
            to[i][j] =
                from[(varies ? row : channel_of(j)) * kRow + lane * kStates + (i ^ state_swap)];
          });
        }
      };

      each([&](int i, int j) { history[0][i][j] = entering(i, j); });
      // The tile before is finished on the way, as long as there are registers without a history.
#pragma unroll 1
      for (int half = 0; half < Shared::kHalves; ++half) {
        if (half) each([&](int i, int j) { history[0][i][j] = history[kSteps][i][j]; });
#pragma unroll
        for (int t = 0; t < kSteps; ++t) {
          const int row = half * kSteps + t;
          float2 step[kPerLane];
#pragma unroll
          for (int j = 0; j < kPerLane; ++j)
            step[j] = staged.steps[step_start(half, t) + channel_of(j)];
          Number b[kStates][kPerLane];
          load(staged_projections.B, B_varies, row, b);
          if constexpr (!kStagers)
            if (t % 2 && t / 2 < kPairs)
              finish(previous, t / 2, staging, kept(parity ^ 1, t / 2), shared.sums[0]);
          put_early(half, t);
          each([&](int i, int j) {
            Number h = history[t][i][j];
            if constexpr (kRestarts) h = Unless(restarts & 1u << row, h);
            history[t + 1][i][j] =
                MultiplyAdd(Decay(rate[i][j], step[j].x), h, b[i][j] * step[j].y);
          });
        }
      }

      // What a step leaves to be summed over lanes.
      struct Partial {
        float projections[kStates][2][kParts];  // dB, dC
        float d_input[kPerLane], d_delta[kPerLane];
      };
      auto sum_over_lanes = [&](int t, Partial& partial) {
        // Over channels.
        constexpr int kValues = kStates * 2 * kParts;
        float* values = &partial.projections[0][0][0];
        SumHalves<kValues, kStateBits, kLanes, kWarp>(values);
        constexpr int kHalvings = Log2(kValues) < Log2(kAcross) ? Log2(kValues) : Log2(kAcross);
        constexpr int kHeld = kValues >> kHalvings;
        // Which of the values this lane has come to hold.
        int first = state_swap * 2 * kParts;
#pragma unroll
        for (int bit = kStateBits; bit < kHalvings; ++bit)
          if (across >> bit & 1) first += kValues >> (bit + 1);
        if (kHalvings == Log2(kAcross) || across >> kHalvings == 0) {
#pragma unroll
          for (int i = 0; i < kHeld; ++i) {
            channel_sums[t][lane * (kStates * 2 * kParts) + first + i] = values[i];
          }
        }

        // Over states: first the channels part, then d_input and d_delta.
        if constexpr (kSwapsChannels) {
          partial.d_input[0] += ExchangePlaces(partial.d_input[kPerLane - 1], 1);
          partial.d_delta[0] += ExchangePlaces(partial.d_delta[kPerLane - 1], 1);
        }
        auto store = [&](float* to, float x) {
          to += t * kStep;
          if constexpr (kWaits) {
            float& own = adds ? *to : sums_of_tile[2 * Shared::kSums + walker];
            own = group ? own + x : x;
          } else {
            *to = x;
          }
        };
        float x = (second ? partial.d_delta[0] : partial.d_input[0]) +
                  ExchangePlaces(second ? partial.d_input[0] : partial.d_delta[0], kSecond);
#pragma unroll
        for (int rest = 2 * kSecond; rest < kLanes; rest *= 2) x += ExchangePlaces(x, rest);
        store(to_sums, x);
      };

      // The sums of the walk before that are made anew now have been used. Where there are two sets
      // a warp meets itself: what the compiler would bring forward from here has no registers.
      auto meet_for_sums = [&] {
        if constexpr (Shared::kSetsOfSums == 1)
          Meet<kWalkers, 2>();
        else
          MeetWarp(thread / kWarp + 4);
      };
      if (!Shared::kMeetsLate) meet_for_sums();

      // A step is summed while the next is computed: the loads of the next come first, since the
      // compiler moves no load across the stores of the sums. The next tile is staged on the way,
      // as soon as the history is half used up.
      constexpr int kJobs = kPairs + kProjectionPairs;
      static_assert(kStagers || kJobs <= kTile / 2);
      auto job = [&](int t) {
        const int i = kTile / 2 - 1 - t;
        if (i < 0) return;
        if constexpr (!kStagers) {
          if (i == 0) WaitForCopies();
          if (i < kPairs)
            keep(parity ^ 1, i,
                 stage_sequences(next, finished - 2 * sequences.Stride(), i, take_sequences(i),
                                 staging));
          if (i >= kPairs && i < kJobs)
            stage_varying(i - kPairs, take_projections(i - kPairs), staging_projections);
        }
      };
#pragma unroll 1
      for (int half = Shared::kHalves - 1; half >= 0; --half) {
        if (half + 1 < Shared::kHalves)
          each([&](int i, int j) { history[kSteps][i][j] = history[0][i][j]; });
        Partial pending;
#pragma unroll
        for (int t = kSteps - 1; t >= 0; --t) {
          const int row = half * kSteps + t;
          float2 step[kPerLane];
          float dy[kPerLane];
          Partial partial;
#pragma unroll
          for (int j = 0; j < kPerLane; ++j) {
            step[j] = staged.steps[step_start(half, t) + channel_of(j)];
            dy[j] = staged.dy[row * kStep + channel_of(j)];
            partial.d_input[j] = partial.d_delta[j] = 0.0f;
          }
          Number b[kStates][kPerLane], c[kStates][kPerLane];
          load(staged_projections.B, B_varies, row, b);
          load(staged_projections.C, C_varies, row, c);
          get_early(half, t);
          if (Shared::kMeetsLate && t == kSteps - 2) meet_for_sums();
          if (t + 1 < kSteps) sum_over_lanes(row + 1, pending);
          job(t);
          const bool restart = kRestarts && restarts & 1u << row;
#pragma unroll
          for (int i = 0; i < kStates; ++i) {
            Number dB_t{}, dC_t{};
#pragma unroll
            for (int j = 0; j < kPerLane; ++j) {
              const Number lambda = MultiplyAdd(c[i][j], dy[j], adjoint[i][j]);
              const Number after = history[t + 1][i][j];
              Number before = history[t][i][j];
              partial.d_input[j] = RealMultiplyAdd(lambda, b[i][j], partial.d_input[j]);
              if constexpr (kVary) {
                dC_t = j ? MultiplyAdd(after, dy[j], dC_t) : after * dy[j];
                dB_t = j ? MultiplyAdd(lambda, step[j].y, dB_t) : lambda * step[j].y;
              } else {
                if (C_varies)
                  dC_t = MultiplyAdd(after, dy[j], dC_t);
                else
                  dC[i][j] = MultiplyAdd(after, dy[j], dC[i][j]);
                if (B_varies)
                  dB_t = MultiplyAdd(lambda, step[j].y, dB_t);
                else
                  dB[i][j] = MultiplyAdd(lambda, step[j].y, dB[i][j]);
              }
              Number carried = Decay(rate[i][j], step[j].x) * lambda;
              if constexpr (kRestarts) {
                carried = Unless(restart, carried);
                before = Unless(restart, before);
              }
              adjoint[i][j] = carried;
              const Number x = carried * before;
              partial.d_delta[j] = RateMultiplyAdd(x, rate[i][j], partial.d_delta[j]);
              dA[i][j] = MultiplyAdd(x, step[j].x, dA[i][j]);
            }
            Split(dB_t, partial.projections[i][0]);
            Split(dC_t, partial.projections[i][1]);
          }
          pending = partial;
        }
        sum_over_lanes(half * kSteps, pending);
      }
      if (waits) set_aside(group);
    }
    if constexpr (!kStagers) finished -= sequences.Stride();
  }
  Meet<kWalkers + kStagers>();
  finish_projections(rows_of(first_tile), groups - 1, turn ^ 1);
  if constexpr (!kStagers) {
#pragma unroll
    for (int k = 0; k < kPairs; ++k)
      finish(rows_of(first_tile), k, shared.sequences[parity ^ 1], kept(parity ^ 1, k),
             shared.sums[0]);
    finish_vectors();
  }

  LetNextBegin();
  for (int group = 0; group < groups; ++group) {
    each([&](int i, int j) {
      const int64_t n = state_of(group, i);
      const int channel = channel_of(j);
      if (channel >= block.channels || n >= p.dstate) return;
      const int64_t to = (slot * p.dim + block.first_channel + channel) * p.dstate + n;
      auto part = [&](int64_t at) { return reinterpret_cast<Number*>(base + at); };
      auto last = [&](int array, const Number& x) {
        return waits ? waiting_of(group, array, i, j) : x;
      };
      part(workspace.dA)[to] = last(kDA, dA[i][j]);
      if constexpr (!kVary) {
        if (!B_varies) part(workspace.dB)[to] = last(kDB, dB[i][j]);
        if (!C_varies) part(workspace.dC)[to] = last(kDC, dC[i][j]);
      }
      if (ct.initial_state.data && block.span == 0)
        static_cast<Number*>(ct.initial_state.data)[StateIndex(p, block, channel, n)] =
            last(kAdjoint, adjoint[i][j]);
    });
  }
}

template <typename Number, int kStates, int kLanes, int kPerLane, int kWalkers, int kStagers,
          bool kWaits, Elements kElements, Layout kLayout, bool kRestarts = !IsRegular(kElements),
          bool kQuads = false>
Error Launch(const Backward& p, const Plan& plan, const BackwardWorkspace& workspace,
             Stream stream) {
  const auto kernel = BackwardKernel<Number, kStates, kLanes, kPerLane, kWalkers, kStagers, kWaits,
                                     kElements, kLayout, kRestarts, kQuads>;
  using Shared = BackwardShared<Number, kStates, kLanes, kPerLane, kWalkers, kStagers, kWaits,
                                kElements, kLayout, kQuads>;
  constexpr int kShared = sizeof(Shared);
  constexpr bool kHungry = kStagers && kElements != Elements::kGeneral;
  static_assert(kShared <= (kHungry ? kSharedBytes : kLittleSharedBytes));
  return LaunchKernel(kernel, plan.blocks * plan.spans, Shared::kThreads, kShared, stream, true, p,
                      plan, workspace);
}

// Which of those a plan wants.
using BackwardLauncher = Error (*)(const Backward&, const Plan&, const BackwardWorkspace&, Stream);

}  // namespace

// What is not in backward.cu.
Error LaunchBackwardRest(const Backward& p, const Plan& plan, const BackwardWorkspace& workspace,
                         Stream stream);

}  // namespace jax_sscan::gpu
