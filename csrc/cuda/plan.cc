#include "cuda/plan.h"

#include <algorithm>
#include <initializer_list>
#include <vector>

namespace jax_sscan::gpu {
namespace {

// What the choice is made for, an H100 or H200. On another GPU it is as right, and a little less
// fast.
constexpr int64_t kMultiprocessors = 132;
// Shorter spans spend their time on entering and leaving.
constexpr int kShortestSpan = 8;
// The pass before spans, in microseconds: per state and step, and for its launch. It takes so many
// channels to a block, and pieces of spans that are not too short.
constexpr double kPassTime = 0.39e-6, kPassLaunch = 5.0;
constexpr int64_t kPassChannels = 32;
constexpr int kShortestPiece = 8;
// Microseconds by which a block that is alone begins later: one warp sends for its first tiles.
constexpr double kAloneStart = 1.2;

// Blocks of that pass that find room on a multiprocessor, by their registers.
int64_t PassBlocks(const Problem& p, Elements elements) {
  if (elements == Elements::kGeneral) return 2;
  if (elements == Elements::kOdd) return 3;
  return elements == Elements::kMixed || elements == Elements::kFloat || p.has_segments ? 4 : 5;
}

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether sizes let neighbours along the sequence, or channels side by side, be moved so many at a
// time.
bool MovableBySize(const Problem& p, int count) {
  return (p.channel_last ? p.group_dim() : p.length) % count == 0;
}

// A kernel that could run, and how long it takes.
struct Candidate {
  Shape shape;
  int walkers;
  int slots;  // blocks that fit a multiprocessor
  // Microseconds a tile takes (kTile steps of a block's channels, one group of states) where k
  // blocks (or teams) share a multiprocessor: alone + (k - 1) * another. Measured on H100s and
  // H200s.
  double alone, another;
  bool only_alone = false;  // this and thin: see Plan
  int thin = 0;
};

// The pass before long spans, and tiles after which it stops where a step is 0.03 on average and no
// state decays more slowly than by exp(-0.03) in it. (Whether it does stop depends on flags that a
// plan does not know, and on the data.)
constexpr Candidate kEarlyPass = {{4, 4, 1}, 128, 4, 0.45, 0.29};
constexpr int kEarlyTiles = 300;

double TileTime(const Candidate& c, int64_t blocks) {
  const int64_t each = CeilDiv(blocks, kMultiprocessors);
  auto together = [&](int64_t k) {
    return k ? c.alone + static_cast<double>(k - 1) * c.another : 0.0;
  };
  return static_cast<double>(each / c.slots) * together(c.slots) + together(each % c.slots);
}

// The fastest way to cut a problem up, according to the measured times.
Plan Cut(const Problem& p, Elements elements, std::initializer_list<Candidate> candidates) {
  Plan best{};
  double best_time = 0.0;
  for (const Candidate& c : candidates) {
    // One warp sends for all of a block that is alone: it has no time for less than 16 bytes each.
    if (c.only_alone && !MovableBySize(p, elements == Elements::kFloat ? 4 : 8)) continue;
    Plan plan{};
    plan.elements = elements;
    plan.shape = c.shape;
    plan.walkers = c.walkers;
    plan.alone = c.only_alone;
    plan.thin = c.thin;
    plan.block_channels =
        c.walkers / c.shape.lanes * c.shape.channels + c.thin * kThinStates / c.shape.group();
    plan.blocks_per_group = static_cast<int>(CeilDiv(p.group_dim(), plan.block_channels));
    plan.blocks = p.batch * p.groups * plan.blocks_per_group;
    plan.tiles = static_cast<int>(CeilDiv(p.length, kTile));
    plan.last_steps = static_cast<int>(p.length - (plan.tiles - 1) * int64_t{kTile});
    plan.state_groups = static_cast<int>(CeilDiv(p.dstate, c.shape.group()));
    // What the pass before spans goes through.
    const double states = static_cast<double>(p.batch * p.dim * p.length) *
                          static_cast<double>(CeilDiv(p.dstate, kPassStates) * kPassStates);
    const int64_t most = std::clamp<int64_t>(c.slots * kMultiprocessors / plan.blocks, 1,
                                             std::max(plan.tiles / kShortestSpan, 1));
    for (int64_t spans = 1; spans <= most; ++spans) {
      plan.span_tiles = static_cast<int>(CeilDiv(plan.tiles, spans));
      plan.spans = static_cast<int>(CeilDiv(plan.tiles, plan.span_tiles));
      double time = TileTime(c, plan.blocks * plan.spans) * plan.span_tiles * plan.state_groups +
                    (c.only_alone ? kAloneStart : 0.0);
      const bool early = plan.HasLongSpans(p);
      const int64_t blocks =
          p.batch * p.groups * CeilDiv(p.group_dim(), kPassChannels) * (plan.spans - 1);
      const int64_t pieces =
          early || blocks == 0
              ? 1
              : std::clamp<int64_t>(PassBlocks(p, elements) * kMultiprocessors / blocks, 1,
                                    std::max(plan.span_tiles / kShortestPiece, 1));
      plan.piece_tiles = static_cast<int>(CeilDiv(plan.span_tiles, pieces));
      plan.pieces = static_cast<int>(CeilDiv(plan.span_tiles, plan.piece_tiles));
      if (plan.spans > 1)
        time += kPassLaunch +
                (early ? TileTime(kEarlyPass, blocks) * std::min(kEarlyTiles, plan.span_tiles)
                       : states * (plan.spans - 1) / plan.spans * kPassTime);
      if (best.walkers && time >= best_time) continue;
      best = plan;
      best_time = time;
    }
  }
  return best;
}

struct Layout {
  int64_t bytes = 0;
  int64_t Take(int64_t count, int64_t size) {
    const int64_t first = bytes;
    bytes += (count * size + 255) / 256 * 256;
    return first;
  }
};

bool IsGeneral(const Problem& p) {
  // Offsets within a tile, in bytes, must fit 32 bits.
  const int64_t widest =
      p.channel_last ? kTile * std::max(p.dim, p.groups * p.dstate) : kMostPlainLines * p.length;
  return !p.B_varies || !p.C_varies || IsComplex(p) || p.dstate > kMostPlainStates ||
         widest >= int64_t{1} << 30;
}

// What ElementsOf may say where arrays are known. Plans for either dtype of 16 bits are the same.
std::vector<Elements> Possible(const Problem& p) {
  if (IsGeneral(p)) return {Elements::kGeneral};
  return {Elements::kOdd, Elements::kMixed, Elements::kFloat, Elements::kBfloat};
}

}  // namespace

Plan Plan::Forward(const Problem& p, Elements elements) {
  auto cut = [&](std::initializer_list<Candidate> candidates) {
    return Cut(p, elements, candidates);
  };
  if (elements == Elements::kGeneral) return cut({{{2, 8, 1}, 128, 3, 1.6, 0.75}});
  const bool regular = IsRegular(elements);
  if (!regular || p.has_segments) {
    if (p.dstate > 16) return cut({{{4, 16, 2}, 128, 2, 1.6, 0.8}});
    if (!regular) return cut({{{4, 4, 1}, 128, 3, 0.9, 0.6}});
    return cut({{{4, 4, 1}, 128, 3, 0.75, 0.36},
                {{4, 4, 1}, 128, 1, 0.66, 0.0, true},
                {{4, 4, 1}, 128, 1, 0.80, 0.0, true, 64},
                {{4, 4, 1}, 128, 1, 0.88, 0.0, true, 128}});
  }
  if (p.dstate > 16) return cut({{{4, 16, 2}, 128, 3, 1.1, 0.65}});
  if (p.dstate <= 4) return cut({{{2, 2, 1}, 128, 3, 0.94, 0.28}});
  return cut({{{4, 4, 1}, 96, 4, 0.63, 0.286},
              {{4, 4, 1}, 128, 3, 0.63, 0.34},
              {{4, 4, 1}, 160, 2, 0.76, 0.51},
              {{4, 4, 1}, 128, 1, 0.56, 0.0, true},
              {{4, 4, 1}, 128, 1, 0.70, 0.0, true, 64},
              {{4, 4, 1}, 128, 1, 0.81, 0.0, true, 128},
              {{4, 4, 2}, 128, 3, 1.20, 0.615}});
}

Plan Plan::Backward(const Problem& p, Elements elements, bool little_shared) {
  // 16 states or fewer are one group.
  if (little_shared && (!IsRegular(elements) || p.has_segments || p.dstate > 16))
    elements = Elements::kGeneral;
  auto cut = [&](std::initializer_list<Candidate> candidates) {
    return Cut(p, elements, candidates);
  };
  if (elements == Elements::kGeneral) {
    const Shape shape = IsComplex(p) ? Shape{1, 16, 1} : Shape{2, 8, 1};
    if (p.dstate <= shape.group()) return cut({{shape, 416, 1, 9.0, 0.0}});
    return cut({{shape, 384, 1, 12.0, 0.0}});
  }
  if (!IsRegular(elements) || p.has_segments || p.dstate > 16)
    return cut({{{2, 8, 2}, 384, 1, IsRegular(elements) ? 4.2 : 6.0, 0.0}});
  if (little_shared) return cut({{{4, 4, 2}, 128, 1, 6.1, 0.0}});
  return cut({{{2, 8, 2}, 384, 1, 4.1, 0.0},
              {{2, 8, 2}, 320, 1, 3.85, 0.0},
              {{4, 4, 2}, 256, 1, 5.6, 0.0}});
}

int64_t ForwardWorkspace::Enough(const Problem& p) {
  int64_t enough = 0;
  for (Elements elements : Possible(p))
    enough = std::max(enough, ForwardWorkspace(p, Plan::Forward(p, elements)).bytes);
  return enough;
}

int64_t BackwardWorkspace::Enough(const Problem& p) {
  int64_t enough = 0;
  for (Elements elements : Possible(p))
    for (bool little_shared : {false, true})
      enough =
          std::max(enough, BackwardWorkspace(p, Plan::Backward(p, elements, little_shared)).bytes);
  return enough;
}

ForwardWorkspace::ForwardWorkspace(const Problem& p, const Plan& plan) {
  Layout layout;
  const int64_t number = IsComplex(p) ? 8 : 4, rows = (plan.spans - 1) * plan.pieces * p.batch;
  ends = layout.Take(rows * p.dim * p.dstate, number);
  sum_delta = layout.Take(rows * p.dim, 4);
  bytes = layout.bytes;
}

BackwardWorkspace::BackwardWorkspace(const Problem& p, const Plan& plan) {
  Layout layout;
  const int64_t number = IsComplex(p) ? 8 : 4, rows = (plan.spans - 1) * plan.pieces * p.batch;
  ends = layout.Take(rows * p.dim * p.dstate, number);
  sum_delta = layout.Take(rows * p.dim, 4);
  const int64_t weight = plan.spans * p.batch * p.dim * p.dstate;
  const int64_t varying = plan.blocks * p.length * p.dstate;
  dA = layout.Take(weight, number);
  dB = layout.Take(p.B_varies ? varying : weight, number);
  dC = layout.Take(p.C_varies ? varying : weight, number);
  const int64_t blocks = plan.state_groups > 1 ? plan.spans * plan.blocks : 0;
  waiting = layout.Take(blocks * plan.block_channels * plan.state_groups * plan.shape.group(),
                        kWaitingArrays * number);
  dD = layout.Take(plan.spans * p.batch * p.dim, 4);
  d_bias = layout.Take(plan.spans * p.batch * p.dim, 4);
  bytes = layout.bytes;
}

namespace {

// Arrays that are not there say nothing.
Elements RegularOrMixed(std::initializer_list<Array> arrays) {
  DataType dtype = DataType::INVALID;
  for (const Array& x : arrays) {
    if (!x) continue;
    if (dtype != DataType::INVALID && dtype != x.dtype) return Elements::kMixed;
    dtype = x.dtype;
  }
  switch (dtype) {
    case DataType::F32:
      return Elements::kFloat;
    case DataType::BF16:
      return Elements::kBfloat;
    case DataType::F16:
      return Elements::kHalf;
    default:
      return Elements::kMixed;
  }
}

bool Aligned(std::initializer_list<Array> arrays, int count) {
  for (const Array& x : arrays) {
    if (x && reinterpret_cast<uintptr_t>(x.data) % (count * ffi::ByteWidth(x.dtype))) return false;
  }
  return true;
}

// Whether pointers let them, too.
bool Movable(const Problem& p, int count, std::initializer_list<Array> sequences) {
  return MovableBySize(p, count) && Aligned(sequences, count);
}

// The same for 16 bytes, if all are of the dtype of u.
bool MovableInQuads(const Problem& p, std::initializer_list<Array> sequences) {
  return Movable(p, static_cast<int>(16 / ffi::ByteWidth(p.operands.u.dtype)), sequences);
}

Elements ElementsOf(const Problem& p, std::initializer_list<Array> arrays) {
  if (IsGeneral(p)) return Elements::kGeneral;
  const bool projections_even = (p.channel_last ? p.dstate : p.length) % 2 == 0;
  if (!projections_even || !Movable(p, 2, arrays)) return Elements::kOdd;
  return RegularOrMixed(arrays);
}

}  // namespace

Elements ElementsOf(const Forward& p) {
  const Operands& o = p.operands;
  return ElementsOf(p, {o.u, o.delta, o.B, o.C, o.z, p.out, p.ungated});
}

Elements ElementsOf(const Backward& p) {
  const Operands &o = p.operands, &ct = p.cotangents;
  return ElementsOf(p, {o.u, o.delta, o.B, o.C, o.z, p.ungated, p.out_cotangent, ct.u, ct.delta,
                        ct.B, ct.C, ct.z});
}

bool InQuads(const Forward& p) {
  const Operands& o = p.operands;
  return MovableInQuads(p, {o.u, o.delta, o.z});
}

bool InQuads(const Backward& p) {
  const Operands& o = p.operands;
  return MovableInQuads(p, {o.u, o.delta, o.z, p.ungated, p.out_cotangent});
}

}  // namespace jax_sscan::gpu
