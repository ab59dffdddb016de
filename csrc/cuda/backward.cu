// The backward kernel, and the sums of what its blocks leave behind.
//
// Computes, per batch row, channel and state, against processing order, with a_t = exp(delta_t A),
//     lambda_t = C_t dy_t + a_{t+1} lambda_{t+1},
// and from it and h_t, which is computed again from the states that the forward pass saved,
//     dC_t += h_t dy_t,  dB_t += lambda_t delta_t u_t            (summed over the channels of a
//     group) d(delta u)_t += lambda_t B_t,  d(delta)_t += x_t A  with  x_t = a_t lambda_t h_{t-1}
//     (over n) dA += x_t delta_t (over t)
//
// Work: a block takes one batch row, some channels of one group and one span, tile by tile from its
// end. A channel's states lie on kLanes lanes, kStates on each, and a lane serves kChannels
// adjacent channels, which share the loads of B and C and half of the sums. For each tile: forward
// from the saved state, every state kept in registers, then back. Shared memory: delta, delta * u
// and dy of the tile, B and C, the sums over n, and each warp's sums over channels. Sums across
// lanes halve what they sum with every shuffle. Which register holds which state or channel depends
// on the lane, so that what a lane keeps always comes first and needs no select. Nothing is added
// atomically: blocks write partial sums, and a second kernel adds them in order. Cost per (b, d, t,
// n): two exp2, 13 multiplies and FMAs, and about 4 instructions of sums.
#include <type_traits>

#include "cuda/scan.h"
#include "cuda/tile.cuh"

namespace jax_sscan::gpu {
namespace {

__host__ __device__ constexpr int Log2(int x) { return x <= 1 ? 0 : 1 + Log2(x / 2); }

// Warps to a multiprocessor: 12 leave each thread 168 registers, 8 leave it 255, which the history
// of 8 states needs.
template <int kStates, int kPerLane, int kThreads>
constexpr int kMinBlocks = (kStates * kPerLane > 4 ? 256 : 384) / kThreads;

template <typename Number, int kStates, int kLanes, int kPerLane, int kThreads, Elements kElements,
          Layout kLayout>
struct BackwardShared {
  static constexpr int kChannels = kThreads / kLanes * kPerLane, kGroup = kStates * kLanes;
  static constexpr int kParts = NumberTraits<Number>::kParts;
  static constexpr bool kPlain = kElements != Elements::kMixed;
  using Sequences = Tile<kThreads, kChannels, 2, kElements, kLayout>;
  using Projections = Tile<kThreads, kGroup * kParts, 4, kElements, kLayout>;
  static constexpr int kStep = Sequences::kRow, kRow = Projections::kRow / kParts;
  static constexpr int kRows = kPlain || kTile > kChannels ? kTile : kChannels;
  // 8 more, so that lanes that store different sums use different banks.
  static constexpr int kSums = Sequences::kCells + 8;
  alignas(16) float2 steps[Sequences::kCells];  // delta, delta * u
  alignas(16) float dy[Sequences::kCells];
  // For the thread that computes the gradients of an element: u, the slope of softplus, and the
  // cotangent of out times the slope of silu.
  alignas(16) float input[Sequences::kCells];
  alignas(16) float slope[Sequences::kCells];
  alignas(16) float d_gate[Sequences::kCells];
  // One copy for each order in which lanes hold their states: state n is at n ^ i in copy i. A
  // fixed B or C has one copy.
  static constexpr int kCopies = kPlain ? kStates : 1;
  static constexpr int kCopy =
      kRows * kRow + 16;  // so that lanes that read two copies use all banks
  alignas(16) Number B[kCopies * kCopy];
  alignas(16) Number C[kCopies * kCopy];
  // d(delta u), d(delta), y, and y again: sums over n
  alignas(16) float sums[4 * kSums];
  // Each warp's sums over its channels: by lane, state, (dB, dC), part.
  // The odd length of a row spreads the steps of a state over the banks.
  alignas(16) float projections[kThreads / kWarp][kTile][kGroup * 2 * kParts + 1];
  float2 vectors[kChannels];  // D, delta_bias
  // Each thread's sums of dD and d_bias, of its pairs.
  alignas(16) float4 vector_sums[Sequences::kCount * kThreads];
  // What comes next, as it lies in memory: u, delta, z, cotangent of out; B, C.
  uint2 next_sequences[4][Sequences::kCount * kThreads];
  uint2 next_projections[2][Projections::kCount * kThreads];
  uint32_t restarts;
};

// The sum over the lanes that differ in the bits of kMask, of kCount values at once, halved at each
// bit, the lowest first: the upper lane keeps the second half. A lane ends with values[0 .. held).
// The first kFree halvings need no select, since upper lanes hold their halves the other way round.
template <int kCount, int kFree, int kBit, int kEnd>
__device__ inline void SumHalves(float* values) {
  if constexpr (kBit < kEnd) {
    if constexpr (kCount > 1) {
      constexpr int kHalf = kCount / 2;
      const bool upper = kFree > 0 ? false : (threadIdx.x & kBit) != 0;
#pragma unroll
      for (int i = 0; i < kHalf; ++i) {
        const float kept = upper ? values[i + kHalf] : values[i];
        const float sent = upper ? values[i] : values[i + kHalf];
        values[i] = kept + ShuffleXor(sent, kBit);
      }
      SumHalves<kHalf, kFree - 1, kBit * 2, kEnd>(values);
    } else {
      values[0] += ShuffleXor(values[0], kBit);
      SumHalves<1, 0, kBit * 2, kEnd>(values);
    }
  }
}

__device__ inline void Split(float x, float* to) { to[0] = x; }
__device__ inline void Split(Complex x, float* to) { to[0] = x.re, to[1] = x.im; }

template <typename Number, int kStates, int kLanes, int kPerLane, int kThreads, Elements kElements,
          Layout kLayout>
__global__ void __launch_bounds__(kThreads, kMinBlocks<kStates, kPerLane, kThreads>)
    BackwardKernel(const __grid_constant__ Backward p, const __grid_constant__ Plan plan,
                   const __grid_constant__ BackwardWorkspace workspace) {
  using Shared = BackwardShared<Number, kStates, kLanes, kPerLane, kThreads, kElements, kLayout>;
  using Sequences = typename Shared::Sequences;
  using Projections = typename Shared::Projections;
  constexpr int kChannels = Shared::kChannels, kGroup = Shared::kGroup, kParts = Shared::kParts;
  constexpr bool kPlain = Shared::kPlain;
  constexpr int kStep = Shared::kStep, kRow = Shared::kRow;
  extern __shared__ char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  // Only where there are several groups of states: (groups, kStates * kPerLane, threads) of each.
  const int waiting_count = plan.state_groups * kStates * kPerLane * kThreads;
  Number* waiting_adjoint = reinterpret_cast<Number*>(memory + sizeof(Shared)) + threadIdx.x;
  Number* waiting_dA = waiting_adjoint + waiting_count;
  Number* waiting_dB = waiting_dA + waiting_count;
  Number* waiting_dC = waiting_dB + waiting_count;
  const bool waits = plan.state_groups > 1;

  const Operands& o = p.operands;
  const Block block(p, plan);
  constexpr int kPairs = Sequences::kCount;
  const Sequences sequences(SequenceLines(p, block), p.reverse);
  const Projections projections(ProjectionLines<kParts>(p, block), p.reverse);
  StageVectors<kThreads, kChannels>(p, block, shared.vectors);
  const bool B_varies = kPlain || p.B_varies, C_varies = kPlain || p.C_varies;

  const int lane = threadIdx.x % kLanes;
  // Lanes that differ in their channels, and how many of those bits serve to swap states.
  constexpr int kAcross = kWarp / kLanes;
  constexpr int kStateBits = Log2(kStates) < Log2(kAcross) ? Log2(kStates) : Log2(kAcross);
  const int across = threadIdx.x % kWarp / kLanes;
  int state_swap = 0;  // the first halving parts the states by their highest bit
#pragma unroll
  for (int bit = 0; bit < kStateBits; ++bit)
    if (across >> bit & 1) state_swap |= kStates >> (bit + 1);
  constexpr bool kSwapsChannels = kPerLane == 2 && kLanes > 1;
  const int channel_swap = kSwapsChannels ? lane & 1 : 0;
  auto channel_of = [&](int j) { return threadIdx.x / kLanes * kPerLane + (j ^ channel_swap); };
  auto state_of = [&](int group, int i) {
    return static_cast<int64_t>(group) * kGroup + lane * kStates + (i ^ state_swap);
  };

  const int first_tile = static_cast<int>(block.span) * plan.span_tiles;
  const int last_tile =
      first_tile + plan.span_tiles < plan.tiles ? first_tile + plan.span_tiles : plan.tiles;
  char* const base = static_cast<char*>(p.workspace.data);

  // Of a lane's states and channels. A fixed B or C has its gradient summed over time here.
  Number rate[kStates][kPerLane], adjoint[kStates][kPerLane], dA[kStates][kPerLane];
  [[maybe_unused]] Number dB[kStates][kPerLane], dC[kStates][kPerLane];
  auto each = [&](auto body) {
#pragma unroll
    for (int i = 0; i < kStates; ++i)
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) body(i, j);
  };
  auto load_group = [&](int group) {
    each([&](int i, int j) {
      rate[i][j] = Rate(LoadWeight<Number>(o.A, p, block, channel_of(j), state_of(group, i)));
    });
  };
  // The lane's place among the threads is part of the pointers.
  auto place_of = [&](int group, int i, int j) {
    return ((group * kStates + i) * kPerLane + j) * kThreads;
  };
  for (int group = 0; group < plan.state_groups; ++group) {
    each([&](int i, int j) {
      const int64_t n = state_of(group, i);
      const int channel = channel_of(j);
      Number x{};
      if (channel < block.channels && n < p.dstate) {
        if (block.span < plan.spans - 1)
          x = reinterpret_cast<const Number*>(base + workspace.carry)[TransposedIndex(
              p, block, (plan.spans - 2 - block.span) * p.batch + block.row, channel, n)];
        else if (p.last_state_cotangent.data)
          x = static_cast<const Number*>(
              p.last_state_cotangent.data)[StateIndex(p, block, channel, n)];
      }
      adjoint[i][j] = x;
      dA[i][j] = Number{};
      if constexpr (!kPlain) dB[i][j] = dC[i][j] = Number{};
      if (waits) {
        const int place = place_of(group, i, j);
        waiting_adjoint[place] = x;
        waiting_dA[place] = Number{};
        if constexpr (!kPlain) waiting_dB[place] = waiting_dC[place] = Number{};
      }
    });
  }
  load_group(0);

  auto load_tile = [&](const Rows& rows) {
    sequences.Prefetch(o.u, rows, shared.next_sequences[0]);
    sequences.Prefetch(o.delta, rows, shared.next_sequences[1]);
    if (o.z.data) sequences.Prefetch(o.z, rows, shared.next_sequences[2]);
    sequences.Prefetch(p.out_cotangent, rows, shared.next_sequences[3]);
  };
  auto load_projections = [&](const Rows& rows, int group) {
    const int line = group * kGroup * kParts;
    if (B_varies) projections.Prefetch(o.B, rows, shared.next_projections[0], line);
    if (C_varies) projections.Prefetch(o.C, rows, shared.next_projections[1], line);
  };
  auto stage_projection = [&](const Array& from, bool varies, const uint2* slots, int group,
                              Number* to) {
    if (!varies)
      return StageFixed<Number, kThreads, kChannels, kGroup, kRow>(p, block, from, group * kGroup,
                                                                   to);
#pragma unroll
    for (int k = 0; k < Projections::kCount; ++k) {
      const float2 x = projections.Widen(projections.Take(slots, k), from);
      if constexpr (kPlain) {
        if (!projections.Mine(k)) continue;
        const int first = projections.LineOf(k, 0), second = projections.LineOf(k, 1);
#pragma unroll
        for (int i = 0; i < Shared::kCopies; ++i) {
          to[i * Shared::kCopy + projections.Cell(k, 0) + (first ^ i) - first] = x.x;
          to[i * Shared::kCopy + projections.Cell(k, 1) + (second ^ i) - second] = x.y;
        }
      } else {
        projections.Put(reinterpret_cast<float*>(to), k, x.x, x.y);
      }
    }
  };
  load_tile(Rows(p, plan, last_tile - 1, p.reverse));
  load_projections(Rows(p, plan, last_tile - 1, p.reverse), 0);
  __syncthreads();

  float4* const vector_sums = shared.vector_sums + threadIdx.x;
#pragma unroll
  for (int k = 0; k < kPairs; ++k) vector_sums[k * kThreads] = {0.0f, 0.0f, 0.0f, 0.0f};

  for (int tile = last_tile - 1; tile >= first_tile; --tile) {
    const Rows rows(p, plan, tile, p.reverse);
    WaitForCopies();
#pragma unroll
    for (int k = 0; k < kPairs; ++k) {
      if (!sequences.Mine(k)) continue;
      const float2 input = sequences.Widen(sequences.Take(shared.next_sequences[0], k), o.u);
      float2 dy = sequences.Widen(sequences.Take(shared.next_sequences[3], k), p.out_cotangent);
      if (o.z.data) {
        const float2 x = sequences.Widen(sequences.Take(shared.next_sequences[2], k), o.z);
        const float2 sigmoid{Sigmoid(x.x), Sigmoid(x.y)};
        // The derivative of silu.
        sequences.Put(shared.d_gate, k, dy.x * (sigmoid.x * fmaf(x.x, 1.0f - sigmoid.x, 1.0f)),
                      dy.y * (sigmoid.y * fmaf(x.y, 1.0f - sigmoid.y, 1.0f)));
        dy = {dy.x * (x.x * sigmoid.x), dy.y * (x.y * sigmoid.y)};
      }
      float2 value = sequences.Widen(sequences.Take(shared.next_sequences[1], k), o.delta),
             slope{1.0f, 1.0f};
      value = {value.x + shared.vectors[sequences.LineOf(k, 0)].y,
               value.y + shared.vectors[sequences.LineOf(k, 1)].y};
      if (p.delta_softplus) {
        const Softplus first(value.x), second(value.y);
        value = {first.value, second.value};
        slope = {first.slope, second.slope};
      }
      // Steps that are not there have delta 0, whatever the bias.
      if (!sequences.Exists(k, 0, rows)) value.x = slope.x = 0.0f;
      if (!sequences.Exists(k, 1, rows)) value.y = slope.y = 0.0f;
      sequences.Put(shared.steps, k, {value.x, value.x * input.x}, {value.y, value.y * input.y});
      // y = 2 Re sum C h for complex numbers: the walk sees its cotangent doubled.
      sequences.Put(shared.dy, k, dy.x * kParts, dy.y * kParts);
      sequences.Put(shared.input, k, input.x, input.y);
      sequences.Put(shared.slope, k, slope.x, slope.y);
    }
    uint32_t restarts = 0;
    if (!kPlain && p.has_segments && threadIdx.x < kWarp) {
      restarts = Restarts(p, block.row, rows);
      if (threadIdx.x == 0) shared.restarts = restarts;
    }

    for (int group = 0; group < plan.state_groups; ++group) {
      if (group) {
        WaitForCopies();
        __syncthreads();
      }
      // The state on entering the tile.
      Number history[kTile + 1][kStates][kPerLane];
      each([&](int i, int j) {
        const int64_t n = state_of(group, i);
        const int channel = channel_of(j);
        Number x{};
        if (channel < block.channels && n < p.dstate) {
          if (tile) {
            const int saved = p.reverse ? plan.tiles - 1 - tile : tile - 1;
            x = static_cast<const Number*>(p.states.data)[TransposedIndex(
                p, block, block.row * (plan.tiles - 1) + saved, channel, n)];
          } else if (o.initial_state.data) {
            x = static_cast<const Number*>(o.initial_state.data)[StateIndex(p, block, channel, n)];
          }
        }
        history[0][i][j] = x;
      });
      stage_projection(o.B, B_varies, shared.next_projections[0], group, shared.B);
      stage_projection(o.C, C_varies, shared.next_projections[1], group, shared.C);
      __syncthreads();
      if (!kPlain && p.has_segments) restarts = shared.restarts;
      if (group + 1 < plan.state_groups) {
        load_projections(rows, group + 1);
      } else if (tile > first_tile) {
        load_tile(Rows(p, plan, tile - 1, p.reverse));
        load_projections(Rows(p, plan, tile - 1, p.reverse), 0);
      }
      if (waits) {
        load_group(group);
        each([&](int i, int j) {
          const int place = place_of(group, i, j);
          adjoint[i][j] = waiting_adjoint[place];
          dA[i][j] = waiting_dA[place];
          if constexpr (!kPlain) dB[i][j] = waiting_dB[place], dC[i][j] = waiting_dC[place];
        });
      }

      // B or C of a row, for a lane's states and channels; a fixed one differs between channels.
      auto load = [&](const Number* from, bool varies, int row, Number(&to)[kStates][kPerLane]) {
        if constexpr (kPlain) {
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

#pragma unroll
      for (int t = 0; t < kTile; ++t) {
        float2 step[kPerLane];
#pragma unroll
        for (int j = 0; j < kPerLane; ++j) step[j] = shared.steps[t * kStep + channel_of(j)];
        Number b[kStates][kPerLane];
        load(shared.B, B_varies, t, b);
        each([&](int i, int j) {
          Number h = history[t][i][j];
          if constexpr (!kPlain) h = Unless(restarts & 1u << t, h);
          history[t + 1][i][j] = MultiplyAdd(Decay(rate[i][j], step[j].x), h, b[i][j] * step[j].y);
        });
      }

      // What a step leaves to be summed over lanes.
      struct Partial {
        float projections[kStates][2][kParts];  // dB, dC
        float d_input[kPerLane], d_delta[kPerLane], y[kPerLane];
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
          for (int i = 0; i < kHeld; ++i)
            shared.projections[threadIdx.x / kWarp][t][lane * kValues + first + i] = values[i];
        }

        // Over states: first the channels part, then d_input and d_delta, then those and y.
        int bit = 1, channel = 0;
        if constexpr (kSwapsChannels) {
          partial.d_input[0] += ShuffleXor(partial.d_input[kPerLane - 1], 1);
          partial.d_delta[0] += ShuffleXor(partial.d_delta[kPerLane - 1], 1);
          partial.y[0] += ShuffleXor(partial.y[kPerLane - 1], 1);
          bit = 2;
          channel = channel_swap;
        }
        channel += threadIdx.x / kLanes * kPerLane;
        auto store = [&](int sum, float x) {
          float& to = shared.sums[sum * Shared::kSums + t * kStep + channel];
          to = waits && group ? to + x : x;
        };
        constexpr int kFirstBit = kSwapsChannels ? 2 : 1;
        if constexpr (2 * kFirstBit < kLanes) {
          const bool second = lane & bit, third = lane & (2 * bit);
          float x = (second ? partial.d_delta[0] : partial.d_input[0]) +
                    ShuffleXor(second ? partial.d_input[0] : partial.d_delta[0], bit);
          const float sum_y = partial.y[0] + ShuffleXor(partial.y[0], bit);
          x = (third ? sum_y : x) + ShuffleXor(third ? x : sum_y, 2 * bit);
#pragma unroll
          for (int rest = 4 * kFirstBit; rest < kLanes; rest *= 2) x += ShuffleXor(x, rest);
          // y is there twice. Storing it twice takes no branch, and so lets steps overlap.
          if (kLanes <= 4 * kFirstBit || lane < 4 * kFirstBit) store(second + 2 * third, x);
        } else {
#pragma unroll
          for (int rest = kFirstBit; rest < kLanes; rest *= 2) {
            partial.d_input[0] += ShuffleXor(partial.d_input[0], rest);
            partial.d_delta[0] += ShuffleXor(partial.d_delta[0], rest);
            partial.y[0] += ShuffleXor(partial.y[0], rest);
          }
          if (lane < kFirstBit) {
            store(0, partial.d_input[0]);
            store(1, partial.d_delta[0]);
            store(2, partial.y[0]);
          }
        }
      };

      // A step is summed while the next is computed: the loads of the next come first, since the
      // compiler moves no load across the stores of the sums.
      Partial pending;
#pragma unroll
      for (int t = kTile - 1; t >= 0; --t) {
        float2 step[kPerLane];
        float dy[kPerLane];
        Partial partial;
#pragma unroll
        for (int j = 0; j < kPerLane; ++j) {
          step[j] = shared.steps[t * kStep + channel_of(j)];
          dy[j] = shared.dy[t * kStep + channel_of(j)];
          partial.d_input[j] = partial.d_delta[j] = partial.y[j] = 0.0f;
        }
        Number b[kStates][kPerLane], c[kStates][kPerLane];
        load(shared.B, B_varies, t, b);
        load(shared.C, C_varies, t, c);
        if (t + 1 < kTile) sum_over_lanes(t + 1, pending);
        const bool restart = !kPlain && restarts & 1u << t;
#pragma unroll
        for (int i = 0; i < kStates; ++i) {
          Number dB_t{}, dC_t{};
#pragma unroll
          for (int j = 0; j < kPerLane; ++j) {
            const Number lambda = MultiplyAdd(c[i][j], dy[j], adjoint[i][j]);
            const Number after = history[t + 1][i][j];
            Number before = history[t][i][j];
            partial.y[j] = RealMultiplyAdd(c[i][j], after, partial.y[j]);
            partial.d_input[j] = RealMultiplyAdd(lambda, b[i][j], partial.d_input[j]);
            if constexpr (kPlain) {
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
            if constexpr (!kPlain) {
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
      sum_over_lanes(0, pending);
      if (waits) {
        each([&](int i, int j) {
          const int place = place_of(group, i, j);
          waiting_adjoint[place] = adjoint[i][j];
          waiting_dA[place] = dA[i][j];
          if constexpr (!kPlain) waiting_dB[place] = dB[i][j], waiting_dC[place] = dC[i][j];
        });
      }
      __syncthreads();

      // The block's sums over channels, into its own part of the workspace.
      constexpr int kSums = kTile * kGroup;
#pragma unroll
      for (int i0 = 0; i0 < kSums; i0 += kThreads) {
        const int i = i0 + threadIdx.x;
        const int offset = p.channel_last ? i / kGroup : i % kTile;
        const int n = p.channel_last ? i % kGroup : i / kTile;
        if (i >= kSums || offset >= rows.steps || group * kGroup + n >= p.dstate) continue;
        const int64_t t = rows.t0 + offset, state = group * kGroup + n;
        const int64_t block_index =
            (block.row * p.groups + block.group) * plan.blocks_per_group + block.index_in_group;
        const int64_t to = block_index * p.length * p.dstate +
                           (p.channel_last ? t * p.dstate + state : state * p.length + t);
        float sums[2 * kParts] = {};
#pragma unroll
        for (int warp = 0; warp < kThreads / kWarp; ++warp)
#pragma unroll
          for (int k = 0; k < 2 * kParts; ++k)
            sums[k] += shared.projections[warp][rows.Row(offset)][n * 2 * kParts + k];
        float* to_B = reinterpret_cast<float*>(base + workspace.dB) + to * kParts;
        float* to_C = reinterpret_cast<float*>(base + workspace.dC) + to * kParts;
#pragma unroll
        for (int k = 0; k < kParts; ++k) {
          if (kPlain || B_varies) to_B[k] = sums[k];
          if (kPlain || C_varies) to_C[k] = sums[kParts + k];
        }
      }
    }

#pragma unroll
    for (int k = 0; k < kPairs; ++k) {
      if (!sequences.Mine(k)) continue;
      const float2 D{shared.vectors[sequences.LineOf(k, 0)].x,
                     shared.vectors[sequences.LineOf(k, 1)].x};
      const float2 input = sequences.Get(shared.input, k), slope = sequences.Get(shared.slope, k);
      const float2 d_input = sequences.Get(shared.sums, k);
      float2 dy = sequences.Get(shared.dy, k),
             d_delta = sequences.Get(shared.sums + Shared::kSums, k);
      dy = {dy.x * (1.0f / kParts), dy.y * (1.0f / kParts)};
      const float first = shared.steps[sequences.Cell(k, 0)].x,
                  second = shared.steps[sequences.Cell(k, 1)].x;
      sequences.Store(p.cotangents.u, rows, k, fmaf(d_input.x, first, D.x * dy.x),
                      fmaf(d_input.y, second, D.y * dy.y));
      d_delta = {fmaf(d_input.x, input.x, d_delta.x * kRateUnit) * slope.x,
                 fmaf(d_input.y, input.y, d_delta.y * kRateUnit) * slope.y};
      sequences.Store(p.cotangents.delta, rows, k, d_delta.x, d_delta.y);
      if (o.z.data) {
        const float2 y = sequences.Get(shared.sums + 2 * Shared::kSums, k);
        const float2 d_gate = sequences.Get(shared.d_gate, k);
        sequences.Store(p.cotangents.z, rows, k, d_gate.x * fmaf(kParts, y.x, D.x * input.x),
                        d_gate.y * fmaf(kParts, y.y, D.y * input.y));
      }
      const float4 sum = vector_sums[k * kThreads];
      vector_sums[k * kThreads] = {fmaf(dy.x, input.x, sum.x), fmaf(dy.y, input.y, sum.y),
                                   sum.z + d_delta.x, sum.w + d_delta.y};
    }
  }

  const int64_t slot = block.span * p.batch + block.row;
  for (int group = 0; group < plan.state_groups; ++group) {
    each([&](int i, int j) {
      const int64_t n = state_of(group, i);
      const int channel = channel_of(j), place = place_of(group, i, j);
      if (channel >= block.channels || n >= p.dstate) return;
      const int64_t to = (slot * p.dim + block.first_channel + channel) * p.dstate + n;
      auto part = [&](int64_t at) { return reinterpret_cast<Number*>(base + at); };
      part(workspace.dA)[to] = waits ? waiting_dA[place] : dA[i][j];
      if constexpr (!kPlain) {
        if (!B_varies) part(workspace.dB)[to] = waits ? waiting_dB[place] : dB[i][j];
        if (!C_varies) part(workspace.dC)[to] = waits ? waiting_dC[place] : dC[i][j];
      }
      if (p.cotangents.initial_state.data && block.span == 0)
        static_cast<Number*>(p.cotangents.initial_state.data)[StateIndex(p, block, channel, n)] =
            waits ? waiting_adjoint[place] : adjoint[i][j];
    });
  }

  // Each channel's sums of dD and d_bias: every thread writes its own, then one thread per channel
  // adds those of its channel in the order of the steps.
  __syncthreads();
  float* sum_D = shared.sums;
  float* sum_bias = shared.sums + Shared::kSums;
#pragma unroll
  for (int k = 0; k < kPairs; ++k) {
    const float4 sum = vector_sums[k * kThreads];
    sequences.Put(sum_D, k, sum.x, sum.y);
    sequences.Put(sum_bias, k, sum.z, sum.w);
  }
  __syncthreads();
  for (int channel = threadIdx.x; channel < block.channels; channel += kThreads) {
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
}

// Varying dB and dC: the sum over the blocks of a group. One thread per number (part of one).
__global__ void ProjectionSumKernel(const __grid_constant__ Backward p, int blocks_per_group,
                                    int parts, const float* __restrict__ partial, Array to) {
  const int64_t count = p.length * p.dstate * parts;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= count * p.batch * p.groups) return;
  const int64_t at = i % count, group = i / count % p.groups, row = i / (count * p.groups);
  const float* from = partial + (row * p.groups + group) * blocks_per_group * count + at;
  float sum = 0.0f;
  for (int block = 0; block < blocks_per_group; ++block) sum += __ldg(from + block * count);
  int64_t index = i;
  if (p.channel_last) {
    const int64_t width = p.dstate * parts, t = at / width;
    index = ((row * p.length + t) * p.groups + group) * width + at % width;
  }
  if (parts == 2 || to.dtype == DataType::F32)
    static_cast<float*>(to.data)[index] = sum;
  else
    static_cast<uint16_t*>(to.data)[index] = static_cast<uint16_t>(Narrow(sum, 0.0f, to.dtype).x);
}

// Gradients of weights: the sum over the spans and batch rows of an instance. One thread per
// number.
__global__ void WeightSumKernel(int64_t spans, int64_t batch, int64_t instances, int64_t count,
                                const float* __restrict__ partial, float* __restrict__ to) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= instances * count) return;
  const int64_t instance = i / count, rows = batch / instances;
  float sum = 0.0f;
  for (int64_t span = 0; span < spans; ++span)
    for (int64_t row = 0; row < rows; ++row)
      sum += partial[(span * batch + instance * rows + row) * count + i % count];
  to[i] = sum;
}

template <typename Number, int kStates, int kLanes, int kPerLane, int kThreads, Elements kElements,
          Layout kLayout>
Error Launch(const Backward& p, const Plan& plan, const BackwardWorkspace& workspace,
             Stream stream) {
  const auto kernel =
      BackwardKernel<Number, kStates, kLanes, kPerLane, kThreads, kElements, kLayout>;
  int bytes =
      sizeof(BackwardShared<Number, kStates, kLanes, kPerLane, kThreads, kElements, kLayout>);
  if (plan.state_groups > 1)
    bytes += plan.state_groups * kStates * kPerLane * kThreads * sizeof(Number) *
             (kElements == Elements::kMixed ? 4 : 2);
  if (const Error error = AllowSharedBytes(kernel, bytes); error != kSuccess) return error;
  kernel<<<static_cast<unsigned>(plan.blocks * plan.spans), kThreads, bytes, stream>>>(p, plan,
                                                                                       workspace);
  return LastError();
}

template <Elements kElements, Layout kLayout>
Error LaunchRegular(const Backward& p, const Plan& plan, const BackwardWorkspace& workspace,
                    Stream stream) {
  if (plan.shape.lanes == 32)
    return Launch<float, 2, 32, 2, 384, kElements, kLayout>(p, plan, workspace, stream);
  if (plan.shape.lanes == 4)
    return Launch<float, 4, 4, 2, 128, kElements, kLayout>(p, plan, workspace, stream);
  return Launch<float, 2, 8, 2, 384, kElements, kLayout>(p, plan, workspace, stream);
}

template <Elements kElements>
Error LaunchLayout(const Backward& p, const Plan& plan, const BackwardWorkspace& workspace,
                   Stream stream) {
  return p.channel_last ? LaunchRegular<kElements, Layout::kChannelLast>(p, plan, workspace, stream)
                        : LaunchRegular<kElements, Layout::kTimeLast>(p, plan, workspace, stream);
}

Error LaunchWalk(const Backward& p, const Plan& plan, const BackwardWorkspace& workspace,
                 Elements elements, Stream stream) {
  switch (elements) {
    case Elements::kFloat:
      return LaunchLayout<Elements::kFloat>(p, plan, workspace, stream);
    case Elements::kBfloat:
      return LaunchLayout<Elements::kBfloat>(p, plan, workspace, stream);
    case Elements::kHalf:
      return LaunchLayout<Elements::kHalf>(p, plan, workspace, stream);
    default:
      if (plan.shape.lanes == 32)
        return IsComplex(p) ? Launch<Complex, 1, 32, 1, 128, Elements::kMixed, Layout::kAny>(
                                  p, plan, workspace, stream)
                            : Launch<float, 2, 32, 1, 128, Elements::kMixed, Layout::kAny>(
                                  p, plan, workspace, stream);
      return IsComplex(p) ? Launch<Complex, 1, 16, 1, 384, Elements::kMixed, Layout::kAny>(
                                p, plan, workspace, stream)
                          : Launch<float, 2, 8, 1, 384, Elements::kMixed, Layout::kAny>(
                                p, plan, workspace, stream);
  }
}

Error LaunchSums(const Backward& p, const Plan& plan, const BackwardWorkspace& workspace,
                 Stream stream) {
  const char* base = static_cast<const char*>(p.workspace.data);
  const int parts = IsComplex(p) ? 2 : 1;
  auto blocks = [](int64_t count) { return static_cast<unsigned>((count + 127) / 128); };
  auto weight = [&](int64_t at, const Array& to, int64_t width) {
    if (!to) return;
    WeightSumKernel<<<blocks(p.instances * p.dim * width), 128, 0, stream>>>(
        plan.spans, p.batch, p.instances, p.dim * width, reinterpret_cast<const float*>(base + at),
        static_cast<float*>(to.data));
  };
  auto matrix = [&](int64_t at, const Array& to, bool varies) {
    if (!varies) return weight(at, to, p.dstate * parts);
    ProjectionSumKernel<<<blocks(p.batch * p.groups * p.length * p.dstate * parts), 128, 0,
                          stream>>>(p, plan.blocks_per_group, parts,
                                    reinterpret_cast<const float*>(base + at), to);
  };
  weight(workspace.dA, p.cotangents.A, p.dstate * parts);
  matrix(workspace.dB, p.cotangents.B, p.B_varies);
  matrix(workspace.dC, p.cotangents.C, p.C_varies);
  weight(workspace.dD, p.cotangents.D, 1);
  weight(workspace.d_bias, p.cotangents.delta_bias, 1);
  return LastError();
}

}  // namespace

Error LaunchBackward(const Backward& p, Stream stream) {
  const Elements elements = PlainElements(p);
  const Plan plan = Plan::Backward(p, elements != Elements::kMixed);
  const BackwardWorkspace workspace(p, plan);
  char* base = static_cast<char*>(p.workspace.data);
  if (plan.spans > 1) {
    const Error error =
        LaunchCarries(p, plan, base + workspace.carry, base + workspace.sum_delta, stream);
    if (error != kSuccess) return error;
  }
  if (const Error error = LaunchWalk(p, plan, workspace, elements, stream); error != kSuccess)
    return error;
  return LaunchSums(p, plan, workspace, stream);
}

}  // namespace jax_sscan::gpu
