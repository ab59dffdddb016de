// The forward kernel.
//
// Computes, per batch row b, channel d and state n, in processing order t,
//     h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t,   out_t = (sum_n C_t h_t + D u_t) silu(z_t)
// (twice the real part of the sum where A is complex).
//
// Work: a block takes one batch row, some channels of one group and one span of the sequence, tile
// by tile. A channel's states lie on kLanes lanes, kStates on each, and stay in registers; time
// runs in order. More states than kStates * kLanes are taken in turn, tile by tile, and wait in
// shared memory. Shared memory: delta and delta * u of the tile (softplus and bias done), B and C
// of the tile, and y. Skip and gate are computed once per element, by the thread that stores it.
// Cost per (b, d, t, n): one exp2, two multiplies, two FMAs, and (with kStates 4) half a shared
// load instruction; per (b, d, t): staging, and the sum over lanes (3 shuffles per 4 steps at 4
// lanes).
#include "cuda/scan.h"
#include "cuda/tile.cuh"

namespace jax_sscan::gpu {
namespace {

// Adds up the 4 values of each lane over kLanes neighbours, 4 sums at once: with 4 lanes or more,
// lane i holds sum i % 4 in values[0], with 2 sums {2i, 2i + 1}, with 1 all.
template <int kLanes>
__device__ inline void SumOverLanes(float (&values)[4]) {
  const int lane = threadIdx.x;
  if constexpr (kLanes >= 2) {
    constexpr int kBit = kLanes >= 4 ? 2 : 1;
    const bool upper = lane & kBit;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float kept = upper ? values[i + 2] : values[i],
                  sent = upper ? values[i] : values[i + 2];
      values[i] = kept + ShuffleXor(sent, kBit);
    }
  }
  if constexpr (kLanes >= 4) {
    const bool upper = lane & 1;
    const float kept = upper ? values[1] : values[0], sent = upper ? values[0] : values[1];
    values[0] = kept + ShuffleXor(sent, 1);
  }
#pragma unroll
  for (int bit = 4; bit < kLanes; bit *= 2) values[0] += ShuffleXor(values[0], bit);
}

// kElements: kMixed for a kernel that takes everything; otherwise B and C vary along the sequence,
// all arrays but the weights have that dtype, and nothing restarts.
template <typename Number, int kStates, int kLanes, int kThreads, Elements kElements,
          Layout kLayout>
struct ForwardShared {
  static constexpr int kChannels = kThreads / kLanes, kGroup = kStates * kLanes;
  static constexpr bool kPlain = kElements != Elements::kMixed;
  using Sequences = Tile<kThreads, kChannels, 2, kElements, kLayout>;
  using Projections = Tile<kThreads, kGroup * NumberTraits<Number>::kParts, 4, kElements, kLayout>;
  static constexpr int kStep = Sequences::kRow;
  // Numbers of a row of B or C; rows are steps, or channels for a fixed one.
  static constexpr int kRow = Projections::kRow / NumberTraits<Number>::kParts;
  static constexpr int kRows = kPlain || kTile > kChannels ? kTile : kChannels;
  alignas(16) float2 steps[Sequences::kCells];  // delta, delta * u
  alignas(16) Number B[kRows * kRow];
  alignas(16) Number C[kRows * kRow];
  alignas(16) float y[Sequences::kCells];
  float2 vectors[kChannels];  // D, delta_bias
  uint32_t restarts;
};

template <typename Number, int kStates, int kLanes, int kThreads, Elements kElements,
          Layout kLayout>
__global__ void __launch_bounds__(kThreads, 4)
    ForwardKernel(const __grid_constant__ Forward p, const __grid_constant__ Plan plan,
                  const Number* __restrict__ carry) {
  using Shared = ForwardShared<Number, kStates, kLanes, kThreads, kElements, kLayout>;
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
  const Sequences sequences(SequenceLines(p, block), p.reverse);
  const Projections projections(ProjectionLines<kParts>(p, block), p.reverse);
  StageVectors<kThreads, kChannels>(p, block, shared.vectors);
  const int lane = threadIdx.x % kLanes, channel = threadIdx.x / kLanes;
  const bool is_channel = channel < block.channels;
  const bool B_varies = kPlain || p.B_varies, C_varies = kPlain || p.C_varies;
  constexpr int kPairs = Sequences::kCount;

  const int first_tile = static_cast<int>(block.span) * plan.span_tiles;
  const int last_tile =
      first_tile + plan.span_tiles < plan.tiles ? first_tile + plan.span_tiles : plan.tiles;

  Number rate[kStates], h[kStates];
  auto load_group = [&](int group) {
#pragma unroll
    for (int i = 0; i < kStates; ++i)
      rate[i] =
          Rate(LoadWeight<Number>(o.A, p, block, channel, group * kGroup + lane * kStates + i));
  };
  for (int group = 0; group < plan.state_groups; ++group) {
#pragma unroll
    for (int i = 0; i < kStates; ++i) {
      const int64_t n = group * kGroup + lane * kStates + i;
      h[i] = Number{};
      if (is_channel && n < p.dstate) {
        if (block.span)
          h[i] =
              carry[TransposedIndex(p, block, (block.span - 1) * p.batch + block.row, channel, n)];
        else if (o.initial_state.data)
          h[i] = static_cast<const Number*>(o.initial_state.data)[StateIndex(p, block, channel, n)];
      }
      if (plan.state_groups > 1) waiting[(group * kStates + i) * kThreads] = h[i];
    }
  }
  load_group(0);

  typename Sequences::Raw u, delta, z;
  typename Projections::Raw raw_B, raw_C;
  auto load_tile = [&](const Rows& rows) {
    sequences.Load(o.u, rows, &u);
    sequences.Load(o.delta, rows, &delta);
    if (o.z.data) sequences.Load(o.z, rows, &z);
  };
  auto load_projections = [&](const Rows& rows, int group) {
    if (B_varies) projections.Load(o.B, rows, &raw_B, group * kGroup * kParts);
    if (C_varies) projections.Load(o.C, rows, &raw_C, group * kGroup * kParts);
  };
  auto stage_projection = [&](const Array& from, bool varies, const typename Projections::Raw& raw,
                              int group, Number* to) {
    if (!varies)
      return StageFixed<Number, kThreads, kChannels, kGroup, kRow>(p, block, from, group * kGroup,
                                                                   to);
#pragma unroll
    for (int k = 0; k < Projections::kCount; ++k) {
      const float2 x = projections.Widen(raw.pair[k], from);
      projections.Put(reinterpret_cast<float*>(to), k, x.x, x.y);
    }
  };
  load_tile(Rows(p, plan, first_tile, p.reverse));
  load_projections(Rows(p, plan, first_tile, p.reverse), 0);
  __syncthreads();

  for (int tile = first_tile; tile < last_tile; ++tile) {
    const Rows rows(p, plan, tile, p.reverse);
    // out = y * gate + skip
    float2 gate[kPairs], skip[kPairs];
#pragma unroll
    for (int k = 0; k < kPairs; ++k) {
      if (!sequences.Mine(k)) continue;
      const float2 input = sequences.Widen(u.pair[k], o.u);
      const float2 first = shared.vectors[sequences.LineOf(k, 0)],
                   second = shared.vectors[sequences.LineOf(k, 1)];
      float2 value = sequences.Widen(delta.pair[k], o.delta);
      value = {value.x + first.y, value.y + second.y};
      if (p.delta_softplus) value = {Softplus(value.x).value, Softplus(value.y).value};
      // Steps that are not there have delta 0, whatever the bias.
      if (!sequences.Exists(k, 0, rows)) value.x = 0.0f;
      if (!sequences.Exists(k, 1, rows)) value.y = 0.0f;
      sequences.Put(shared.steps, k, {value.x, value.x * input.x}, {value.y, value.y * input.y});
      gate[k] = {1.0f, 1.0f};
      if (o.z.data) {
        const float2 x = sequences.Widen(z.pair[k], o.z);
        gate[k] = {x.x * Sigmoid(x.x), x.y * Sigmoid(x.y)};
      }
      skip[k] = {first.x * input.x * gate[k].x, second.x * input.y * gate[k].y};
      if constexpr (kParts == 2) gate[k] = {2.0f * gate[k].x, 2.0f * gate[k].y};
    }
    uint32_t restarts = 0;
    if (!kPlain && p.has_segments && threadIdx.x < kWarp) {
      restarts = Restarts(p, block.row, rows);
      if (threadIdx.x == 0) shared.restarts = restarts;
    }
    for (int group = 0; group < plan.state_groups; ++group) {
      if (group) __syncthreads();  // everyone is done with the projections of the group before
      stage_projection(o.B, B_varies, raw_B, group, shared.B);
      stage_projection(o.C, C_varies, raw_C, group, shared.C);
      __syncthreads();
      if (!kPlain && p.has_segments) restarts = shared.restarts;
      // Everything loaded before has been used by now: a wait for it would be a wait for this too.
      if (group + 1 < plan.state_groups) {
        load_projections(rows, group + 1);
      } else if (tile + 1 < last_tile) {
        const Rows next(p, plan, tile + 1, p.reverse);
        load_tile(next);
        load_projections(next, 0);
      }
      if (plan.state_groups > 1) {
        load_group(group);
#pragma unroll
        for (int i = 0; i < kStates; ++i) h[i] = waiting[(group * kStates + i) * kThreads];
      }
      if (p.states.data && tile) {
        const int saved = p.reverse ? plan.tiles - 1 - tile : tile - 1;
#pragma unroll
        for (int i = 0; i < kStates; ++i) {
          const int64_t n = group * kGroup + lane * kStates + i;
          if (is_channel && n < p.dstate)
            static_cast<Number*>(p.states.data)[TransposedIndex(
                p, block, block.row * (plan.tiles - 1) + saved, channel, n)] = h[i];
        }
      }

      const Number* at_B = shared.B + lane * kStates + (B_varies ? 0 : channel * kRow);
      const Number* at_C = shared.C + lane * kStates + (C_varies ? 0 : channel * kRow);
      const int step_B = B_varies ? kRow : 0, step_C = C_varies ? kRow : 0;
      // Summed and stored at the end, since the compiler moves no load across a store.
      float y[kTile / 4][4];
#pragma unroll
      for (int i = 0; i < kTile; ++i) {
        const float2 step = shared.steps[i * kStep + channel];
        Number b[kStates], c[kStates];
        LoadStates(at_B + i * step_B, b);
        LoadStates(at_C + i * step_C, c);
        if constexpr (!kPlain) {
#pragma unroll
          for (int n = 0; n < kStates; ++n) h[n] = Unless(restarts & 1u << i, h[n]);
        }
        float sum = 0.0f;
#pragma unroll
        for (int n = 0; n < kStates; ++n) {
          h[n] = MultiplyAdd(Decay(rate[n], step.x), h[n], b[n] * step.y);
          sum = RealMultiplyAdd(c[n], h[n], sum);
        }
        y[i / 4][i % 4] = sum;
      }
      constexpr int kHeld = kLanes >= 4 ? 1 : 4 / kLanes;
#pragma unroll
      for (int i = 0; i < kTile / 4; ++i) SumOverLanes<kLanes>(y[i]);
      if (lane < 4) {
#pragma unroll
        for (int i = 0; i < kTile / 4; ++i) {
#pragma unroll
          for (int k = 0; k < kHeld; ++k) {
            float& to = shared.y[(4 * i + lane * kHeld + k) * kStep + channel];
            to = group ? to + y[i][k] : y[i][k];
          }
        }
      }
      if (plan.state_groups > 1) {
#pragma unroll
        for (int i = 0; i < kStates; ++i) waiting[(group * kStates + i) * kThreads] = h[i];
      }
    }
    __syncthreads();

#pragma unroll
    for (int k = 0; k < kPairs; ++k) {
      if (!sequences.Mine(k)) continue;
      const float2 y = sequences.Get(shared.y, k);
      sequences.Store(p.out, rows, k, fmaf(y.x, gate[k].x, skip[k].x),
                      fmaf(y.y, gate[k].y, skip[k].y));
    }
  }

  if (p.last_state.data && block.span == plan.spans - 1) {
    for (int group = 0; group < plan.state_groups; ++group) {
#pragma unroll
      for (int i = 0; i < kStates; ++i) {
        const int64_t n = group * kGroup + lane * kStates + i;
        if (plan.state_groups > 1) h[i] = waiting[(group * kStates + i) * kThreads];
        if (is_channel && n < p.dstate)
          static_cast<Number*>(p.last_state.data)[StateIndex(p, block, channel, n)] = h[i];
      }
    }
  }
}

template <typename Number, int kStates, int kLanes, Elements kElements, Layout kLayout>
Error Launch(const Forward& p, const Plan& plan, const void* carry, Stream stream) {
  constexpr int kThreads = 128;
  const auto kernel = ForwardKernel<Number, kStates, kLanes, kThreads, kElements, kLayout>;
  int bytes = sizeof(ForwardShared<Number, kStates, kLanes, kThreads, kElements, kLayout>);
  if (plan.state_groups > 1) bytes += plan.state_groups * kStates * kThreads * sizeof(Number);
  if (const Error error = AllowSharedBytes(kernel, bytes); error != kSuccess) return error;
  kernel<<<static_cast<unsigned>(plan.blocks * plan.spans), kThreads, bytes, stream>>>(
      p, plan, static_cast<const Number*>(carry));
  return LastError();
}

template <Elements kElements, Layout kLayout>
Error LaunchRegular(const Forward& p, const Plan& plan, const void* carry, Stream stream) {
  switch (plan.shape.lanes) {
    case 2:
      return Launch<float, 2, 2, kElements, kLayout>(p, plan, carry, stream);
    case 4:
      return Launch<float, 4, 4, kElements, kLayout>(p, plan, carry, stream);
    default:
      return Launch<float, 4, 16, kElements, kLayout>(p, plan, carry, stream);
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
  const Plan plan = Plan::Forward(p, elements != Elements::kMixed);
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
                 ? Launch<Complex, 2, 8, Elements::kMixed, Layout::kAny>(p, plan, carry, stream)
                 : Launch<float, 2, 8, Elements::kMixed, Layout::kAny>(p, plan, carry, stream);
  }
}

}  // namespace jax_sscan::gpu
