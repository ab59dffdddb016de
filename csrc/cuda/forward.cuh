// The forward kernel.
//
// Computes, per batch row b, channel d and state n, in processing order t,
//     h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t,   out_t = (sum_n C_t h_t + D u_t) silu(z_t)
// (twice the real part of the sum where A is complex).
//
// Work: a team takes one batch row, some channels of one group and one span of the sequence, tile
// by tile. Half of its threads walk, half stage. Walkers compute the states: a channel's lie on
// kLanes lanes, kStates on each, and stay in registers; a lane serves kPerLane adjacent channels,
// which share the loads of B and C; time runs in order. More states than kStates * kLanes are taken
// in turn, tile by tile, and wait in shared memory. Stagers meanwhile make ready what the next tile
// needs, and put skip and gate on what the last one left. They meet once a tile. So the warps of a
// scheduler are twice as many as there are channels for, and one kind's waits are the other's time.
//
// Where all teams find room at once, a multiprocessor's are one block and wait for each other now
// and then. Schedulers prefer the older of their warps: by itself one team would be done when the
// last has hardly begun, and that would have too few warps to fill its time.
//
// Where there is but one team to a multiprocessor, each scheduler has one walker and little else,
// and latencies are what it waits for. So a team that is alone has a warp that only sends for what
// comes next, three tiles ahead, for stagers to have the time; stagers make the sums over lanes;
// and what channels it has beyond a walker to a scheduler lie on more lanes, two states on each,
// with thin walkers: a fifth walker would have the one beside it wait for exponentials. Where there
// are some, all meet every other tile.
//
// Shared memory, twice, for the tile that is walked and for the one that is staged: delta and
// delta * u (softplus and bias done), B and C, y, and, where stagers lack the registers, what makes
// out of y. Twice or three times: what is on its way from global memory, 16 bytes at a time where
// elements are regular and sizes allow.
//
// Cost per (b, d, t, n): one exp2, two multiplies, two FMAs, and (with 4 states) 2.5 registers from
// shared memory, 1.5 with two channels to a lane, at two such registers of a warp per cycle and
// multiprocessor (see LanePlace). Per (b, d, t): staging, about 45 instructions, and the sum over
// lanes (3 shuffles per 4 steps at 4 lanes; half of it is the stagers' where there is room).
#pragma once

#include <type_traits>

#include "cuda/scan.h"
#include "cuda/tile.cuh"

namespace jax_sscan::gpu {
namespace {

// kRestarts: the state may start anew along the sequence. kAlone: the team has a multiprocessor to
// itself. kThin: walkers of further channels, kThinStates each.
template <typename NumberOf, int kStates, int kLanes, int kPerLane, int kWalkers,
          Elements kElements, Layout kLayout, bool kRestartsOf, bool kAloneOf, int kThinOf>
struct ForwardShared {
  using Number = NumberOf;
  static constexpr bool kRestarts = kRestartsOf;
  static constexpr bool kAlone = kAloneOf;
  static constexpr int kGroup = kStates * kLanes, kThin = kThinOf;
  static constexpr int kThinLanes = kGroup / kThinStates;
  // Those of thin walkers come after the others.
  static constexpr int kPlainChannels = kWalkers / kLanes * kPerLane;
  static constexpr int kChannels = kPlainChannels + kThin / kThinLanes;
  static constexpr int kStagers = kWalkers / kPlainChannels * kChannels;
  static constexpr int kSenders = kAlone ? kWarp : 0;
  static constexpr int kThreads = kStagers + kWalkers + kThin + kSenders;
  // Who of a team is what. Schedulers prefer the older of their warps. Those are the stagers, or,
  // in a team that is alone, the thin walkers: whoever is done last holds up the rest.
  static constexpr int kFirstWalker = kAlone ? kThin : kStagers;
  static constexpr int kFirstSender = kFirstWalker + kWalkers;
  static constexpr int kFirstStager = kAlone ? kFirstSender + kSenders : 0;
  static constexpr bool kVary = kElements != Elements::kGeneral;
  // 16 states or fewer are always one group.
  static constexpr bool kOneGroup = kVary && kGroup <= 16;
  // Of a multiprocessor: 768 threads leave each 80 registers, 512 leave 128.
  static constexpr int kThreadsAtOnce = kRestarts && kGroup > 16 ? 512 : 768;
  static constexpr int kTeamsAtOnce = kAlone ? 1 : kThreadsAtOnce / kThreads;
  // Of a block; one where states that wait need the memory.
  static constexpr int kMostTeams = kOneGroup ? kTeamsAtOnce : 1;
  static constexpr int kMostThreads = kMostTeams * kThreads;
  static constexpr int kBlocks = kTeamsAtOnce / kMostTeams;  // of a multiprocessor
  // Against bank conflicts: of y's stores, 4 rows of 8 channels (of 16 they cannot be helped); of
  // pairs of steps.
  static constexpr int kPad = kPerLane == 2                     ? 2
                              : kLayout == Layout::kChannelLast ? (kChannels % 32 ? 16 : 8)
                              : kLayout == Layout::kTimeLast    ? 1
                                                                : 2;
  using Sequences = Tile<kStagers, kChannels, kPad, kElements, kLayout, true>;
  template <int kMovers>
  using ProjectionsOf =
      Tile<kMovers, kGroup * NumberTraits<Number>::kParts, 4, kElements, kLayout, true>;
  using Projections = ProjectionsOf<kStagers>;
  static constexpr int kStep = Sequences::kRow;
  static_assert(Sequences::template Skew<float>() == 0);
  // Numbers of a row of B or C; rows are steps, or channels for a fixed one.
  static constexpr int kRow = Projections::kRow / NumberTraits<Number>::kParts;
  static constexpr int kRows = kVary || kTile > kChannels ? kTile : kChannels;
  // The gate and D u for the two elements of a stager's pair, which has registers for few of them.
  static constexpr bool kKeepsGates = kOneGroup && Sequences::kCount <= 2;
  // y, which walkers leave in so many parts where there is room, for stagers to add up: they wait
  // for what they exchange between lanes, most of all in a team that is alone. A row has one part
  // of all channels after another, so far apart that what a warp stores at once lies on different
  // banks.
  static constexpr bool kRoomForParts = kOneGroup && kPerLane == 2 && Sequences::kUnit == 2;
  static constexpr int kPartsOfY = kAlone ? 4 : kRoomForParts ? 2 : 1;
  static constexpr int kPart =
      kPartsOfY > 1 ? kChannels + (kChannels % 16 ? 0 : 32 / kPartsOfY) : kStep;
  static constexpr int kRowOfY =
      kPartsOfY > 1 ? kPartsOfY * kPart + (kLayout == Layout::kTimeLast ? 2 : 4) : kStep;
  struct Staged {
    alignas(16) float2 steps[Sequences::kCells];  // delta, delta * u
    alignas(16) float y[kPartsOfY > 1 ? kTile * kRowOfY : Sequences::kCells];
    alignas(16) float4 gates[kKeepsGates ? 1 : Sequences::kCount * kStagers];
    uint32_t restarts;
  };
  struct StagedProjections {
    alignas(16) Number B[kRows * kRow];
    alignas(16) Number C[kRows * kRow];
  };
  // Tiles from one meeting to the next: thin walkers and the others wait less for each other if
  // there are two. So many are walked, as many staged.
  static constexpr int kTiles = kThin ? 2 : 1;
  static constexpr int kBuffers = 2 * kTiles;
  Staged sequences[kBuffers];
  StagedProjections projections[kBuffers];
  // What comes next, as it lies in memory. Sent for a tile ahead, or two: of float32, which takes
  // longer to come, if there is room, and where tiles take less time; or more, by a team alone.
  static constexpr bool kTakesLong = kElements == Elements::kFloat || kWalkers == 160;
  static constexpr int kAhead = kThin                                        ? 2 * kTiles
                                : kAlone                                     ? 3
                                : kTakesLong && kChannels <= 40 && kOneGroup ? 2
                                                                             : 1;
  struct Next {
    // u, delta and z
    alignas(16) typename Sequences::Slot sequences[3][Sequences::kCount * kStagers];
    typename Projections::Slot B[Projections::kCount * kStagers];
    typename Projections::Slot C[Projections::kCount * kStagers];
  };
  // One is taken from, the others are on their way.
  static constexpr int kSlots = kAhead + kTiles;
  Next next[kSlots];
  Vectors<kChannels> vectors;
};

// What a team's walkers do, those who take its channels from first_channel on.
template <typename Shared, int kStates, int kLanes, int kPerLane, int kWalkers, typename MeetTeam,
          typename MeetTeams>
__device__ __forceinline__ void Walk(const Forward& p, const Plan& plan,
                                     const Pieces<typename Shared::Number>& pieces,
                                     const Block& block, Shared& shared, int thread,
                                     int first_channel, const MeetTeam& meet_team,
                                     const MeetTeams& meet_teams) {
  using Number = typename Shared::Number;
  using Sequences = typename Shared::Sequences;
  using Projections = typename Shared::Projections;
  constexpr int kGroup = Shared::kGroup, kRow = Shared::kRow;
  constexpr int kParts = NumberTraits<Number>::kParts;
  constexpr bool kVary = Shared::kVary, kRestarts = Shared::kRestarts;
  const Operands& o = p.operands;
  const bool B_varies = kVary || p.B_varies, C_varies = kVary || p.C_varies;
  const int groups = Shared::kOneGroup ? 1 : plan.state_groups;
  const int first_tile = static_cast<int>(block.span) * plan.span_tiles;
  const int last_tile = min(first_tile + plan.span_tiles, plan.tiles);
  const int walker = LanePlace(thread);
  const int lane = walker % kLanes, channel = first_channel + walker / kLanes * kPerLane;
  // Only where there are several groups of states: (groups, kPerLane, kStates, kWalkers).
  Number* waiting = reinterpret_cast<Number*>(&shared + 1) + walker;
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
  meet_team();
  if (block.span) WaitForBefore();  // for pieces
  for (int group = 0; group < groups; ++group) {
    load_group(group);
    each(group, [&](int j, int i, int64_t n) {
      h[j][i] = exists(j, n) && o.initial_state.data
                    ? static_cast<const Number*>(
                          o.initial_state.data)[StateIndex(p, block, channel + j, n)]
                    : Number{};
    });
#pragma unroll 2
    for (int64_t piece = 0; piece < block.span * plan.pieces; ++piece) {
      each(group, [&](int j, int i, int64_t n) {
        h[j][i] = pieces.After(piece, h[j][i], p, block, channel + j, n, rate[j][i]);
      });
    }
    if (groups > 1)
      each(group, [&](int j, int i, int64_t) { waiting[place_of(group, j, i)] = h[j][i]; });
  }

  // Sums of y over kSummed lanes are made for kSum steps at once; this lane comes to hold kHeld of
  // them, from first_row on.
  constexpr int kSummed = kLanes / Shared::kPartsOfY;
  constexpr int kSum = kSummed < kLanes ? kSummed : kLanes <= 4 ? 4 : kLanes;
  constexpr int kHeld = kSum / kSummed;
  int first_row = 0;
#pragma unroll
  for (int bit = 1, half = kSum / 2; bit < kSummed; bit *= 2, half /= 2)
    first_row += lane & bit ? half : 0;
  // Of this lane's first state among the saved ones, where those that enter a tile go.
  int64_t saved = TransposedIndex(
      p, block,
      block.row * (plan.tiles - 1) + (p.reverse ? plan.tiles - 1 - first_tile : first_tile - 1),
      channel, lane * kStates);
  // Two channels of a lane are stored at once where they may be.
  const bool pairs = p.dim % 2 == 0 && block.first_channel % 2 == 0 && block.channels % 2 == 0;
  // Beside thin walkers by pointers that move: the compiler would reckon each address anew, for
  // which the whole team waits.
  [[maybe_unused]] Number* save_to = static_cast<Number*>(p.states.data) + saved;
  [[maybe_unused]] const int64_t next_saved = (p.reverse ? -p.dstate : p.dstate) * p.dim;
  auto save = [&](int group) {
    if constexpr (Shared::kThin > 0) {
      Number* to = save_to;
#pragma unroll
      for (int i = 0; i < kStates; ++i, to += p.dim)
        if (exists(0, lane * kStates + i)) *to = h[0][i];
      return;
    }
    Number* to = static_cast<Number*>(p.states.data) + saved + group * kGroup * p.dim;
    if constexpr (kPerLane == 2) {
      if (pairs) {
#pragma unroll
        for (int i = 0; i < kStates; ++i)
          if (exists(0, group * kGroup + lane * kStates + i))
            StoreTogether(to + i * p.dim, h[0][i], h[1][i]);
        return;
      }
    }
    each(group, [&](int j, int i, int64_t n) {
      if (exists(j, n)) to[i * p.dim + j] = h[j][i];
    });
  };
  int turn = 0;  // of the projections' buffers
  for (int tile = first_tile; tile < last_tile; ++tile) {
    meet_teams(tile - first_tile, false);
    const int buffer = (tile - first_tile) & (Shared::kBuffers - 1);
    typename Shared::Staged& staged = shared.sequences[buffer];
    for (int group = 0; group < groups; ++group, turn = (turn + 1) & (Shared::kBuffers - 1)) {
      const typename Shared::StagedProjections& staged_projections = shared.projections[turn];
      if (groups > 1) {
        load_group(group);
        each(group, [&](int j, int i, int64_t) { h[j][i] = waiting[place_of(group, j, i)]; });
      }
      if (p.states.data && tile) save(group);
      if (buffer % Shared::kTiles == 0) meet_team();
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
          SumHalves<kSum, 0, 1, kSummed>(y[j]);
#pragma unroll
          for (int k = 0; k < kHeld; ++k) sums[first / kSum][j][k] = y[j][k];
        }
      };
      auto store = [&](int first) {
#pragma unroll
        for (int k = 0; k < kHeld; ++k) {
          const auto& sum = sums[first / kSum];
          float* to = staged.y + (first + first_row + k) * Shared::kRowOfY +
                      lane / kSummed * Shared::kPart + channel;
          if constexpr (kPerLane == 2) {
            float2 all{sum[0][k], sum[1][k]};
            if (group) {
              const float2 before = *reinterpret_cast<const float2*>(to);
              all = {all.x + before.x, all.y + before.y};
            }
            *reinterpret_cast<float2*>(to) = all;
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
    if constexpr (Shared::kThin > 0)
      save_to += next_saved;
    else
      saved += (p.reverse ? -p.dstate : p.dstate) * p.dim;
  }
  for (int tile = last_tile; tile < first_tile + plan.span_tiles; ++tile)
    meet_teams(tile - first_tile, false);
  meet_team();

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

template <typename Shared, int kStates, int kLanes, int kPerLane, int kWalkers, Elements kElements,
          Layout kLayout>
__global__ void __launch_bounds__(Shared::kMostThreads, Shared::kBlocks)
    ForwardKernel(const __grid_constant__ Forward p, const __grid_constant__ Plan plan,
                  const __grid_constant__ Pieces<typename Shared::Number> pieces) {
  using Number = typename Shared::Number;
  using Sequences = typename Shared::Sequences;
  using Projections = typename Shared::Projections;
  constexpr int kChannels = Shared::kChannels, kGroup = Shared::kGroup, kRow = Shared::kRow;
  constexpr bool kVary = Shared::kVary, kOneGroup = Shared::kOneGroup;
  constexpr bool kRestarts = Shared::kRestarts;
  constexpr int kParts = NumberTraits<Number>::kParts;
  constexpr int kStagers = Shared::kStagers, kThreads = Shared::kThreads;
  // Teams of one block are far apart, so that they are of different spans.
  constexpr bool kTeams = Shared::kMostTeams > 1;
  const int team = kTeams ? threadIdx.x / kThreads : 0, most = kTeams ? blockDim.x / kThreads : 1;
  const int64_t all = plan.blocks * plan.spans;
  auto index_of = [&](int team) { return static_cast<int64_t>(team) * gridDim.x + blockIdx.x; };
  if (kTeams && index_of(team) >= all) return;
  const int teams = index_of(most - 1) < all ? most : most - 1;
  auto meet_team = [&] { kTeams ? Meet(kThreads, 1 + team) : Meet<kThreads>(); };

  extern __shared__ char memory[];
  Shared& shared = reinterpret_cast<Shared*>(memory)[team];
  const Operands& o = p.operands;
  using Count = std::conditional_t<Shared::kThin != 0, uint32_t, int64_t>;
  const Block block(p, plan, static_cast<Count>(index_of(team)));
  const bool has_z = o.z.data != nullptr;
  const bool B_varies = kVary || p.B_varies, C_varies = kVary || p.C_varies;
  const int groups = kOneGroup ? 1 : plan.state_groups;
  const int first_tile = static_cast<int>(block.span) * plan.span_tiles;
  const int tiles = min(plan.span_tiles, plan.tiles - first_tile);

  // Warps are dealt to the four schedulers in turn; where there are five of a kind, the two walkers
  // on one scheduler are to have it for themselves, for which the fourth warp takes the place of
  // the sixth.
  int thread = static_cast<int>(threadIdx.x) - team * kThreads;
  if (kWalkers == 5 * kWarp && (thread / kWarp == 3 || thread / kWarp == 5)) thread ^= 6 * kWarp;
  // The sender has less to do than a stager: beside a thin walker, with one of these less there.
  if (Shared::kThin == 2 * kWarp && (thread / kWarp == 6 || thread / kWarp == 8))
    thread ^= 14 * kWarp;
  const int stager = thread - Shared::kFirstStager;
  StageVectors<kThreads, kChannels>(p, block, thread, shared.vectors);
  // Before the tile-th of a span, also where others have more; not before the first, for later
  // spans take longer to begin. It is for stagers, but walkers meet as often: it is by counting
  // barriers that racecheck tells what was before and what after.
  auto meet_teams = [&](int tile, bool stages) {
    constexpr int kTogether = 8;
    if (kTeams && teams > 1 && tile && tile % kTogether == 0)
      stages ? Meet(teams * kStagers, 0)
             : Meet(kWalkers, 1 + Shared::kMostTeams + ThreadAnew() / kThreads);
  };

  // A turn is for a tile and a group of states. Tiles count from the first of the span.
  struct Turn {
    int tile, group;
  };
  const int turns = tiles * groups;
  // All are gone through in order.
  auto next_turn = [&](Turn& turn, int i) -> Turn {
    if (kOneGroup) return {i, 0};
    const Turn now = turn;
    Advance(turn.tile, turn.group, groups);
    return now;
  };
  // The last tile of the sequence may have fewer steps.
  const int partial = (p.reverse ? 0 : plan.tiles - 1) - first_tile;
  auto rows_of = [&](int tile) {
    Rows rows(p, plan, first_tile + tile, p.reverse);
    rows.steps = tile == partial ? plan.last_steps : kTile;
    return rows;
  };
  // odd: whether i is. The code knows it where it calls this, and so which buffers are meant.
  auto slots_of = [&](int i, int odd) -> typename Shared::Next& {
    return shared.next[Shared::kSlots == 2 ? odd : static_cast<unsigned>(i) % Shared::kSlots];
  };
  constexpr int kAhead = Shared::kAhead, kTiles = Shared::kTiles;
  constexpr bool kRegular = Sequences::kRegular;
  // What sends for turn i: the work of a thread of those who move projections.
  auto sends = [&](const Lines& lines, const Sequences& sequences, const auto& projections,
                   int thread) {
    using Projections = std::decay_t<decltype(projections)>;
    const Rows first_rows = rows_of(0);
    auto quads = [&] {
      if constexpr (kRegular)
        return QuadCopies<Sequences, 3, Projections::kThreadCount>(lines, first_rows.t0, thread,
                                                                   o.u, o.delta, o.z);
      else
        return 0;
    }();
    return [&, quads, to_send = Turn{}, sent_sequences = sequences.At(first_rows),
            sent_projections = projections.At(first_rows)](int i, int odd) mutable {
      if (i < turns) {
        const Turn turn = next_turn(to_send, i);
        const Rows rows = rows_of(turn.tile);
        auto& to = slots_of(i, odd);
        if (turn.group == 0) {
          if constexpr (kRegular) {
            quads.Send(to.sequences[0], rows.steps, sequences.Stride(), plan.in_quads);
          } else {
            sequences.Prefetch(o.u, sent_sequences, rows, to.sequences[0]);
            sequences.Prefetch(o.delta, sent_sequences, rows, to.sequences[1]);
            sequences.Prefetch(o.z, sent_sequences, rows, to.sequences[2], 0, has_z);
            sent_sequences += sequences.Stride();
          }
        }
        const int line = turn.group * kGroup * kParts;
        const int64_t at = groups > 1 ? projections.At(rows, line) : sent_projections;
        projections.Prefetch(o.B, at, rows, to.B, line, B_varies);
        projections.Prefetch(o.C, at, rows, to.C, line, C_varies);
        sent_projections += projections.Stride();
      }
      SendCopies();
    };
  };
  // Where the state starts anew in a tile: the work of one warp, which loads segment ids a tile
  // ahead.
  [[maybe_unused]] SegmentIds segments;
  auto load_segments = [&](int tile) {
    if (kRestarts && p.has_segments && tile < tiles)
      segments = SegmentIds(p, block.row, rows_of(tile));
  };
  auto put_restarts = [&](int tile, int lane) {
    if (!kRestarts || !p.has_segments) return;
    const uint32_t restarts = segments.Restarts();
    if (lane == 0) shared.sequences[tile & (Shared::kBuffers - 1)].restarts = restarts;
    load_segments(tile + 1);
  };
  const int sender = thread - Shared::kFirstSender;
  if (0 <= sender && sender < Shared::kSenders) {
    const Lines lines = SequenceLines(p, block);
    const Sequences sequences(lines, p.reverse, sender);
    const typename Shared::template ProjectionsOf<kWarp> projections(
        ProjectionLines<kParts>(p, block), p.reverse, sender);
    auto send = sends(lines, sequences, projections, sender);
    load_segments(0);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) send(i, i);
    WaitForCopies<kAhead - kTiles>();
    meet_team();
    for (int first = 0; first < turns; first += kTiles) {
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        put_restarts(first + i, sender);
        send(first + i + kAhead, 0);
      }
      WaitForCopies<kAhead - kTiles>();
      meet_team();
    }
    meet_team();
    return;
  }

  if (0 <= stager && stager < kStagers) {
    const Lines lines = SequenceLines(p, block);
    const Sequences sequences(lines, p.reverse, stager);
    const Projections projections(ProjectionLines<kParts>(p, block), p.reverse, stager);
    constexpr int kPairs = Sequences::kCount;
    constexpr bool kKeepsGates = Shared::kKeepsGates;
    Turn to_stage{}, to_take{};
    if (!Shared::kAlone && stager < kWarp) load_segments(0);
    // Where the next tile of out begins, as an index and as an array of its own: stagers gain by
    // the second, but not those of a team that is alone.
    int64_t finished = sequences.At(rows_of(0));
    Array out = sequences.From(p.out, finished);
    const bool saves_ungated = p.ungated.data != nullptr;
    // Unless there is a sender.
    [[maybe_unused]] auto send_turn = sends(lines, sequences, projections, stager);
    auto send = [&](int i, int odd) {
      if constexpr (!Shared::kAlone) send_turn(i, odd);
    };
    auto wait_for_copies = [&] {
      if constexpr (!Shared::kAlone) WaitForCopies<kAhead - 1>();
    };
#pragma unroll
    for (int i = 0; i < kAhead; ++i) send(i, i);
    wait_for_copies();
    meet_team();

    // D and delta_bias of the elements that this thread stages.
    float2 D[kPairs] = {}, delta_bias[kPairs] = {};
#pragma unroll
    for (int k = 0; k < kPairs; ++k) {
      if (!sequences.Mine(k)) continue;
      D[k] = sequences.OfLines(shared.vectors.D, k);
      delta_bias[k] = sequences.OfLines(shared.vectors.delta_bias, k);
    }
    [[maybe_unused]] float4 gates[Shared::kBuffers][kPairs];
    auto stage_pair = [&](const Rows& rows, int k, uint2 u, uint2 delta, uint2 z,
                          typename Shared::Staged& to) -> float4 {
      if (!sequences.Mine(k)) return {};
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
      return {gate.x, D[k].x * input.x, gate.y, D[k].y * input.y};
    };
    // buffer: of turn i.
    auto stage = [&](int i, int buffer) {
      const Turn turn = next_turn(to_stage, i);
      const auto& from = slots_of(i, buffer);
      if (turn.group == 0) {
        const Rows rows = rows_of(turn.tile);
        const int to_buffer = kOneGroup ? buffer : turn.tile & 1;
        typename Shared::Staged& to = shared.sequences[to_buffer];
#pragma unroll
        for (int k = 0; k < kPairs; ++k) {
          auto take = [&](int array) { return sequences.Take(from.sequences[array], k); };
          const float4 gate = stage_pair(rows, k, take(0), take(1), take(2), to);
          if constexpr (kKeepsGates)
            gates[to_buffer][k] = gate;
          else if (sequences.Mine(k))
            to.gates[sequences.Index(k)] = gate;
        }
        if (!Shared::kAlone && stager < kWarp && turn.tile < tiles) put_restarts(turn.tile, stager);
      }
      auto stage_projection = [&](const Array& array, bool varies,
                                  const typename Projections::Slot* slots, Number* to) {
        if (varies) {
#pragma unroll
          for (int k = 0; k < Projections::kCount; ++k) {
            const float2 x = projections.Widen(projections.Take(slots, k), k, array);
            projections.Put(reinterpret_cast<float*>(to), k, x.x, x.y);
          }
        } else {
          StageFixed<Number, kStagers, kChannels, kGroup, kRow>(p, block, array,
                                                                turn.group * kGroup, stager, to);
        }
      };
      typename Shared::StagedProjections& to = shared.projections[buffer];
      stage_projection(o.B, B_varies, from.B, to.B);
      stage_projection(o.C, C_varies, from.C, to.C);
    };
    auto y_of = [&](const typename Shared::Staged& from, int k) -> float2 {
      if constexpr (Shared::kPartsOfY == 1) {
        return sequences.Get(from.y, k);
      } else {
        auto part = [&](int i) {
          return sequences.template GetFromRows<Shared::kRowOfY>(from.y + i * Shared::kPart, k);
        };
        auto sum = [](float2 a, float2 b) -> float2 { return {a.x + b.x, a.y + b.y}; };
        if constexpr (Shared::kPartsOfY == 2)
          return sum(part(0), part(1));
        else
          return sum(sum(part(0), part(1)), sum(part(2), part(3)));
      }
    };
    auto finish = [&](int tile, int buffer) {
      const Rows rows = rows_of(tile);
      const typename Shared::Staged& from = shared.sequences[buffer];
#pragma unroll
      for (int k = 0; k < kPairs; ++k) {
        if (!sequences.Mine(k)) continue;
        const float2 y = y_of(from, k);
        const float4 gate = kKeepsGates ? gates[buffer][k] : from.gates[sequences.Index(k)];
        const float2 ungated{fmaf(y.x, kParts, gate.y), fmaf(y.y, kParts, gate.w)};
        const float first = ungated.x * gate.x, second = ungated.y * gate.z;
        if (saves_ungated) sequences.Store(p.ungated, finished, rows, k, ungated.x, ungated.y);
        if constexpr (Shared::kAlone)
          sequences.Store(p.out, finished, rows, k, first, second);
        else
          sequences.Store(out, 0, rows, k, first, second);
      }
      finished += sequences.Stride();
      out = sequences.From(out, sequences.Stride());
    };
    // Walkers take the i-th kTiles turns. The code knows which buffers are meant.
    auto take_turns = [&](int i, int odd) {
      meet_team();
      send(i + 1 + kAhead, kAhead % 2 ? odd : 1 - odd);
#pragma unroll
      for (int k = 0; k < kTiles; ++k) {
        const Turn turn = next_turn(to_take, i * kTiles + k);
        const int tile = turn.tile - kTiles;
        if (tile >= 0 && turn.group == 0)
          finish(tile, kOneGroup ? (1 - odd) * kTiles + k : ~turn.tile & 1);
      }
#pragma unroll
      for (int k = 0; k < kTiles; ++k) stage((i + 1) * kTiles + k, (1 - odd) * kTiles + k);
      wait_for_copies();
    };
    auto finish_last = [&](int first, int odd) {
#pragma unroll
      for (int k = 0; k < kTiles; ++k)
        if (kTiles == 1 || first + k < tiles) finish(first + k, odd * kTiles + k);
    };
    send(kAhead, kAhead % 2);
#pragma unroll
    for (int k = 0; k < kTiles; ++k) stage(k, k);
    wait_for_copies();
    const int meetings = (turns + kTiles - 1) / kTiles;
    int i = 0;
#pragma unroll 1
    for (; i < meetings; i += 2) {
      meet_teams(i, true);
      take_turns(i, 0);
      if (i + 1 < meetings) take_turns(i + 1, 1);
    }
    for (; i < plan.span_tiles; i += 2) meet_teams(i, true);
    meet_team();
    const int last = (tiles - 1) / kTiles * kTiles;
    if (last / kTiles % 2 == 0)
      finish_last(last, 0);
    else
      finish_last(last, 1);
    return;
  }

  if constexpr (Shared::kThin > 0) {
    if (thread < Shared::kThin) {
      Walk<Shared, kThinStates, Shared::kThinLanes, 1, Shared::kThin>(
          p, plan, pieces, block, shared, thread, Shared::kPlainChannels, meet_team, meet_teams);
      return;
    }
  }
  Walk<Shared, kStates, kLanes, kPerLane, kWalkers>(
      p, plan, pieces, block, shared, thread - Shared::kFirstWalker, 0, meet_team, meet_teams);
}

template <typename Number, int kStates, int kLanes, int kPerLane, int kWalkers, Elements kElements,
          Layout kLayout, bool kRestarts = !IsRegular(kElements), bool kAlone = false,
          int kThin = 0>
Error Launch(const Forward& p, const Plan& plan, const ForwardWorkspace& workspace, Stream stream) {
  using Shared = ForwardShared<Number, kStates, kLanes, kPerLane, kWalkers, kElements, kLayout,
                               kRestarts, kAlone, kThin>;
  const auto kernel =
      ForwardKernel<Shared, kStates, kLanes, kPerLane, kWalkers, kElements, kLayout>;
  constexpr int kShared = sizeof(Shared);
  constexpr int kWaiting = kStates * kPerLane * kWalkers * sizeof(Number);
  constexpr int kMost = kElements == Elements::kGeneral ? kMostStates : kMostPlainStates;
  static_assert(Shared::kOneGroup ||
                kShared + kMost / (kStates * kLanes) * kWaiting <= kSharedBytes);
  static_assert(Shared::kMostTeams * kShared <= kSharedBytes);
  // Those that share a multiprocessor, if all find room at once, are the teams of a block.
  // Otherwise they come one by one, wherever there is room next.
  const int64_t all = plan.blocks * plan.spans, multiprocessors = Multiprocessors();
  const int64_t each = (all + multiprocessors - 1) / multiprocessors;
  const bool together = each <= Shared::kMostTeams && each * kShared <= SharedBytesOfBlock();
  const int teams = together ? static_cast<int>(each) : 1;
  const int bytes = teams * kShared + (plan.state_groups > 1 ? plan.state_groups * kWaiting : 0);
  return LaunchKernel(kernel, (all + teams - 1) / teams, teams * Shared::kThreads, bytes, stream,
                      plan.spans > 1, p, plan, PiecesIn<Number>(p, workspace));
}

// Which of those a plan wants.
using ForwardLauncher = Error (*)(const Forward&, const Plan&, const ForwardWorkspace&, Stream);

// Where teams have a multiprocessor each to themselves.
template <Elements kElements, Layout kLayout, bool kRestarts>
ForwardLauncher AloneLauncher(const Plan& plan) {
  switch (plan.thin) {
    case 64:
      return Launch<float, 4, 4, 1, 128, kElements, kLayout, kRestarts, true, 64>;
    case 128:
      return Launch<float, 4, 4, 1, 128, kElements, kLayout, kRestarts, true, 128>;
    default:
      return Launch<float, 4, 4, 1, 128, kElements, kLayout, kRestarts, true>;
  }
}

}  // namespace

// What is not in forward.cu.
Error LaunchForwardRest(const Forward& p, const Plan& plan, const ForwardWorkspace& workspace,
                        Stream stream);

}  // namespace jax_sscan::gpu
