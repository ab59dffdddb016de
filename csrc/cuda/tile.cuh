// Tiles: kTile steps of some lines, between global and shared memory. Lines are channels for
// sequences (u, delta, z, out and their cotangents) and states for B and C.
//
// A tile's rows are in processing order, whichever way time runs: row i is step t0 + i, or, when
// reversed, step t0 + kTile - 1 - i. Rows without a step (at the end of the sequence) and lines
// that are not there are 0.
//
// Each thread moves the same few pairs of neighbours in memory of every tile: two lines of a step,
// or two steps of a line. The next tile's are on their way to shared memory while the block
// computes, so that no one waits for memory.
#pragma once

#include <numeric>
#include <type_traits>

#include "cuda/number.cuh"
#include "cuda/plan.h"

namespace jax_sscan::gpu {

// Where a block works.
struct Block {
  int64_t span, row, group, instance;
  int64_t index_in_group;
  int64_t first_channel;  // of dim
  int channels;           // at most plan.block_channels

  // i: of plan.blocks * plan.spans. 32 bits hold it, and divide in a fraction of the time; but in
  // kernels whose registers are all taken the compiler then makes less of their loops.
  template <typename Count = int64_t>
  __device__ Block(const Problem& p, const Plan& plan, Count i = blockIdx.x) {
    auto count = [](int64_t x) { return static_cast<Count>(x); };
    index_in_group = i % count(plan.blocks_per_group);
    i /= count(plan.blocks_per_group);
    group = i % count(p.groups);
    i /= count(p.groups);
    row = i % count(p.batch);
    span = i / count(p.batch);
    instance = count(row) / (count(p.batch) / count(p.instances));
    const bool whole = sizeof(Count) == 4 && p.groups == 1;
    const int64_t group_dim = whole ? p.dim : p.dim / p.groups;
    const int64_t first = index_in_group * plan.block_channels;
    first_channel = group * group_dim + first;
    const int64_t rest = group_dim - first;
    channels = static_cast<int>(rest < plan.block_channels ? rest : plan.block_channels);
  }
};

// Which steps a tile holds.
struct Rows {
  int64_t t0;
  int steps;
  bool reversed;

  // The tile that comes index-th when the sequence is processed in this direction. One that does
  // not exist has no steps.
  __device__ Rows(const Problem& p, const Plan& plan, int index, bool reversed, bool exists = true)
      : reversed(reversed) {
    const int tile = reversed ? plan.tiles - 1 - index : index;
    t0 = static_cast<int64_t>(tile) * kTile;
    steps = !exists ? 0 : tile + 1 == plan.tiles ? plan.last_steps : kTile;
  }
  // Of the step t0 + offset; its own inverse.
  __device__ int Row(int offset) const { return reversed ? kTile - 1 - offset : offset; }
};

// A tile's segment ids, and those of the steps before, as a warp's first lanes load them.
struct SegmentIds {
  int32_t here = 0, before = 0;

  SegmentIds() = default;
  __device__ SegmentIds(const Problem& p, int64_t batch_row, const Rows& rows) {
    const int lane = threadIdx.x % kWarp, offset = rows.Row(lane);
    const int64_t t = rows.t0 + offset, previous = p.reverse ? t + 1 : t - 1;
    if (lane >= kTile || offset >= rows.steps || previous < 0 || previous >= p.length) return;
    const int32_t* ids =
        static_cast<const int32_t*>(p.operands.segment_ids.data) + batch_row * p.length;
    here = ids[t], before = ids[previous];
  }
  // Bit i: the state starts anew at row i. To be called by the whole warp.
  __device__ uint32_t Restarts() const { return Ballot(here != before); }
};

// Blocks take a tile and a group of its states at a time. To the next of them.
__device__ inline void Advance(int& tile, int& group, int groups) {
  if (++group == groups) group = 0, ++tile;
}

// How the time runs in memory: known to the code or not.
enum class Layout { kAny, kChannelLast, kTimeLast };

// Both, as a type for code that has to know them, and what calls such code: with the elements of
// the plan, one of kFirst and kRest, and the layout.
template <Elements kElementsOf, Layout kLayoutOf>
struct Storage {
  static constexpr Elements kElements = kElementsOf;
  static constexpr Layout kLayout = kLayoutOf;
};
template <Elements kFirst, Elements... kRest, typename Body>
auto ForStorage(Elements elements, bool channel_last, const Body& body) {
  if constexpr (sizeof...(kRest) > 0)
    if (elements != kFirst) return ForStorage<kRest...>(elements, channel_last, body);
  return channel_last ? body(Storage<kFirst, Layout::kChannelLast>{})
                      : body(Storage<kFirst, Layout::kTimeLast>{});
}
// The same for elements that are regular, and for all that are not general.
template <typename Body>
auto ForRegular(Elements elements, bool channel_last, const Body& body) {
  return ForStorage<Elements::kFloat, Elements::kBfloat, Elements::kHalf>(elements, channel_last,
                                                                          body);
}
template <typename Body>
auto ForPlain(Elements elements, bool channel_last, const Body& body) {
  return ForStorage<Elements::kFloat, Elements::kBfloat, Elements::kHalf, Elements::kMixed,
                    Elements::kOdd>(elements, channel_last, body);
}

template <Elements kElements>
__device__ inline DataType DtypeOf(const Array& array) {
  if constexpr (kElements == Elements::kFloat) return DataType::F32;
  if constexpr (kElements == Elements::kBfloat) return DataType::BF16;
  if constexpr (kElements == Elements::kHalf) return DataType::F16;
  return array.dtype == DataType::C64 ? DataType::F32 : array.dtype;
}

// Whether numbers are worth the last ulp.
template <Elements kElements>
constexpr bool kExact = kElements == Elements::kFloat || !IsRegular(kElements);

// Without branches where the dtype is not known to the code: they would part pairs that are staged
// side by side.
__device__ inline float2 Widen(uint2 raw, DataType dtype) {
  const float2 bfloats = FromBfloats(raw.x), halves = FromHalves(raw.x);
  const bool is_bfloat = dtype == DataType::BF16, is_float = dtype == DataType::F32;
  const float2 short_floats{is_bfloat ? bfloats.x : halves.x, is_bfloat ? bfloats.y : halves.y};
  return {is_float ? __uint_as_float(raw.x) : short_floats.x,
          is_float ? __uint_as_float(raw.y) : short_floats.y};
}
__device__ inline uint2 Narrow(float x, float y, DataType dtype) {
  const uint32_t shorts = dtype == DataType::BF16 ? ToBfloats(x, y) : ToHalves(x, y);
  return {dtype == DataType::F32 ? __float_as_uint(x) : shorts, __float_as_uint(y)};
}

// Where the lines of a tile lie: element `start + t * step + line * stride` and its neighbour,
// which is the next step where pairs_are_steps and the next line otherwise.
struct Lines {
  int64_t start, step, stride;
  int count;
  bool pairs_are_steps;
  bool steps_are_near;  // in memory; neighbouring threads take them
};

__device__ inline Lines SequenceLines(const Problem& p, const Block& block) {
  const int64_t row = block.row * p.length * p.dim;
  if (p.channel_last) return {row + block.first_channel, p.dim, 1, block.channels, false, false};
  return {row + block.first_channel * p.length, 1, p.length, block.channels, true, true};
}

// B or C varying along the sequence. A complex number is a pair of lines.
template <int kParts>
__device__ inline Lines ProjectionLines(const Problem& p, const Block& block) {
  const int count = static_cast<int>(p.dstate) * kParts;
  if (p.channel_last) {
    const int64_t step = p.groups * p.dstate * kParts;
    const int64_t start = block.row * p.length * step + block.group * p.dstate * kParts;
    return {start, step, 1, count, false, false};
  }
  const int64_t start = (block.row * p.groups + block.group) * p.dstate * p.length * kParts;
  return {start, kParts, p.length, count, kParts == 1, true};
}

// kPad: cells to a row of shared memory beyond its lines, against bank conflicts. Pairs stay
// aligned. kSkewed: rows as Skew says. kQuads: rows of 16 floats are loaded by quads, past the L1
// cache, where half a line of memory takes a line. Then a lane copies for two of its warp, which
// have to meet before they take, and before they send again.
template <int kThreads, int kLines, int kPad, Elements kElements, Layout kLayout,
          bool kSkewed = false, bool kQuads = false>
class Tile {
 public:
  static constexpr int kThreadCount = kThreads, kLineCount = kLines;
  static constexpr bool kChannelLast = kLayout == Layout::kChannelLast;
  static constexpr bool kRegular = IsRegular(kElements);
  static constexpr bool kByPairs = kRegular || kElements == Elements::kMixed;
  // Offsets in memory count bytes where the dtype is known to the code, elements where it is not.
  static constexpr int kUnit = kElements == Elements::kFloat ? 4 : kRegular ? 2 : 1;
  // Within a tile; 32 bits do for all but the general kernels, see IsGeneral.
  static_assert(kElements == Elements::kGeneral || kLines <= kMostPlainLines);
  using Offset = std::conditional_t<kElements == Elements::kGeneral, int64_t, uint32_t>;
  static constexpr int kRow = kLines + kPad;
  // Where pairs are steps, half a warp, or a whole one where cells are floats, puts down every
  // second row of a few lines. For these to lie on different banks, the second half of the rows is
  // moved on by so many cells.
  template <typename Cell>
  __host__ __device__ static constexpr int Skew() {
    if (kLayout != Layout::kTimeLast || !kSkewed) return 0;
    return sizeof(Cell) == 8 ? (kRow % 2 ? 0 : 2) : (kRow % 8 == 4 ? 4 : 0);
  }
  template <typename Cell>
  __host__ __device__ static constexpr int RowStart(int row) {
    return row * kRow + (row < kTile / 2 ? 0 : Skew<Cell>());
  }
  static constexpr int kCells = kTile * kRow + Skew<float2>();
  static constexpr int kPairs = kTile * kLines / 2;
  static constexpr int kCount = (kPairs + kThreads - 1) / kThreads;  // of a thread
  // Where channels are last: threads side by side along a row, and how often that makes the row.
  static constexpr int kNear = std::gcd(kLines / 2, kThreads);
  static constexpr int kAcross = kLayout == Layout::kChannelLast ? kLines / 2 / kNear : 1;
  static_assert(kAcross == 1 || kPairs % kThreads == 0);

  // One of a thread's pairs: of those across a row, in one of its rows.
  struct Place {
    int row, across;
    __device__ constexpr Place(int k) : row(k / kAcross), across(k % kAcross) {}
    // The i-th of a group of kTogether, in a loop over groups that is not unrolled.
    template <int kTogether>
    __device__ static constexpr Place InGroup(int group, int i) {
      Place place(i);
      place.row += group * (kTogether / kAcross);
      static_assert(kTogether % kAcross == 0);
      return place;
    }
    __device__ constexpr int Number() const { return row * kAcross + across; }
  };

  static_assert(!kQuads || (kElements == Elements::kFloat && kLayout == Layout::kTimeLast &&
                            kPairs % (2 * kThreads) == 0));

  // thread: of the kThreads that move it.
  __device__ Tile(const Lines& lines, bool reversed, int thread)
      : thread_(thread),
        start_(lines.start * kUnit),
        step_(lines.step * kUnit),
        stride_(lines.stride * kUnit),
        count_(lines.count),
        reversed_(reversed),
        pairs_are_steps_(lines.pairs_are_steps) {
    // The pairs of a thread are evenly spaced.
    const int i = Index(0);
    if (PairsAreSteps()) {
      constexpr int kNear = kTile / 2;
      static_assert(kThreads % kNear == 0);
      offset_ = i % kNear * 2, line_ = i / kNear;
      next_offset_ = 0, next_line_ = kThreads / kNear;
    } else if (lines.steps_are_near) {
      static_assert(kThreads % kTile == 0);
      offset_ = i % kTile, line_ = i / kTile * 2;
      next_offset_ = 0, next_line_ = kThreads / kTile * 2;
    } else {
      static_assert(kLayout != Layout::kAny || kNear == kLines / 2);
      offset_ = i / kNear, line_ = i % kNear * 2;
      next_offset_ = kThreads / kNear, next_line_ = 0;
    }
    start_ += offset_ * step_ + line_ * stride_;
    next_element_ = static_cast<Offset>(OffsetTo(kAcross) * step_ + LineTo(kAcross) * stride_);
    first_slot_ = offset_ * (kLines / 2) + line_ / 2;
    const int row = reversed ? kTile - 1 - offset_ : offset_;
    cell_ = RowStart<float>(row) + line_;
    row_ = reversed ? -kRow : kRow;
    if constexpr (kQuads) {
      const int lane = thread % kWarp, half = lane / (kWarp / 2);
      const int quad = thread - lane + lane % (kWarp / 2) * 2;
      quad_ = half * kThreads + quad;
      quad_offset_ = quad_ % (kTile / 2) * 2, quad_line_ = quad_ / (kTile / 2);
      from_quad_ =
          static_cast<int>((quad_offset_ - offset_) * step_ + (quad_line_ - line_) * stride_);
    }
  }

  // Of pair k of the calling thread, among all.
  __device__ int Index(Place k) const { return k.Number() * kThreads + thread_; }
  // In an array of slots: as pairs lie in memory.
  __device__ int SlotOf(Place k) const {
    if (kAcross == 1) return Index(k);
    return first_slot_ + k.row * (kThreads / kNear * (kLines / 2)) + k.across * kNear;
  }
  __device__ bool Mine(Place k) const { return kPairs % kThreads == 0 || Index(k) < kPairs; }
  // In shared memory, of element e (0 or 1) of pair k. A thread's pairs that are steps are all of
  // the same rows, and of one half of a tile.
  __device__ int Cell(Place k, int e) const { return CellFrom(cell_, k, e); }
  __device__ int WideCell(Place k, int e) const {
    const bool second_half = Skew<float2>() && (offset_ >= kTile / 2) != reversed_;
    return CellFrom(cell_ + (second_half ? Skew<float2>() : 0), k, e);
  }
  __device__ int LineOf(Place k, int e) const {
    return line_ + LineTo(k) + (PairsAreSteps() ? 0 : e);
  }
  // Whether the element is there. Lines count from `first_line`.
  __device__ bool Exists(Place k, int e, const Rows& rows, int first_line = 0) const {
    if (kByPairs) e = 0;
    const int offset = offset_ + OffsetTo(k) + (PairsAreSteps() ? e : 0), line = LineOf(k, e);
    return Mine(k) && offset < rows.steps && first_line + line < count_;
  }

  // Of the calling thread's first element of a tile, `first_line` lines further. From one tile to
  // the next it goes Stride() further.
  __device__ int64_t At(const Rows& rows, int first_line = 0) const {
    return start_ + rows.t0 * step_ + first_line * stride_;
  }
  __device__ int64_t Stride() const { return reversed_ ? -kTile * step_ : kTile * step_; }
  // An array that begins so much further on.
  __device__ static Array From(const Array& array, int64_t at) {
    const int size = kRegular ? 1 : IsWord(array) ? 4 : 2;
    return {static_cast<char*>(array.data) + at * size, array.dtype};
  }

  // Loads into slots of shared memory, kCount * kThreads, of which a thread reads its own back by
  // Take, after WaitForCopies. It spares the registers, and the compiler's guesses of when what is
  // loaded will be there: it uses registers as early as it can. at: as At gives for those rows and
  // lines.
  using Slot = std::conditional_t<kElements == Elements::kBfloat || kElements == Elements::kHalf,
                                  uint32_t, uint2>;
  __device__ void Prefetch(const Array& from, int64_t at, const Rows& rows, Slot* slots,
                           int first_line = 0, bool wanted = true) const {
#pragma unroll
    for (int k = 0; k < kCount; ++k) PrefetchPair(from, at, rows, slots, k, k, wanted, first_line);
  }
  // Pairs k and k + 1, for k even, of the whole warp.
  __device__ void PrefetchQuad(const Array& from, int64_t at, const Rows& rows, Slot* slots,
                               Place k, Place slot, bool wanted = true) const {
    const bool exists = wanted && quad_offset_ < rows.steps && quad_line_ + LineTo(k) < count_;
    CopyAsync<16>(slots + slot.Number() * kThreads + quad_,
                  static_cast<const char*>(from.data) + (at + from_quad_ + ElementTo(k)),
                  exists ? 16 : 0);
  }
  // Before a thread takes what it waited for, and before it sends for more to the same place.
  __device__ void MeetForCopies() const {
    if (kQuads) MeetLanes();
  }
  __device__ void PrefetchPair(const Array& from, int64_t at, const Rows& rows, Slot* slots,
                               Place k, Place slot, bool wanted = true, int first_line = 0) const {
    Slot* const to = slots + SlotOf(slot);
    const int64_t i = at + ElementTo(k);
    const bool first = wanted && Exists(k, 0, rows, first_line),
               second = wanted && Exists(k, 1, rows, first_line);
    if constexpr (kRegular) {
      CopyAsync<sizeof(Slot)>(to, static_cast<const char*>(from.data) + i,
                              first ? sizeof(Slot) : 0);
    } else {
      const bool word = IsWord(from);
      const char* data = static_cast<const char*>(from.data) + i * (word ? 4 : 2);
      if constexpr (kByPairs) {
        CopyPairAsync(to, data, word, first);
      } else {
        // No less than words can be copied: of two bytes each, elements lie in one or in two.
        const bool halves = !word && reinterpret_cast<uintptr_t>(data) & 2;
        data -= halves ? 2 : 0;
        CopyAsync<4>(&to->x, data, word || halves ? 4 * first : 2 * (first + second));
        CopyAsync<4>(&to->y, data + 4, word ? 4 * second : halves ? 2 * second : 0);
      }
    }
  }
  __device__ uint2 Take(const Slot* slots, Place k) const {
    if constexpr (sizeof(Slot) == 4)
      return {slots[SlotOf(k)], 0};
    else
      return slots[SlotOf(k)];
  }

  // What a slot of pair k holds.
  __device__ float2 Widen(uint2 raw, Place k, const Array& from) const {
    if (!kByPairs && !IsWord(from)) {
      // The same for all tiles, which are an even number of elements apart.
      const uintptr_t at = reinterpret_cast<uintptr_t>(from.data) + 2 * (start_ + ElementTo(k));
      if (at & 2) raw.x = raw.x >> 16 | raw.y << 16;
    }
    return gpu::Widen(raw, DtypeOf<kElements>(from));
  }

  __device__ void Store(const Array& to, int64_t at, const Rows& rows, Place k, float x, float y,
                        bool wanted = true) const {
    const int64_t i = at + ElementTo(k);
    const uint2 pair = Narrow(x, y, DtypeOf<kElements>(to));
    const bool first = wanted && Exists(k, 0, rows), second = wanted && Exists(k, 1, rows);
    if constexpr (kElements == Elements::kFloat) {
      if (first) *reinterpret_cast<uint2*>(static_cast<char*>(to.data) + i) = pair;
    } else if constexpr (kRegular) {
      if (first) *reinterpret_cast<uint32_t*>(static_cast<char*>(to.data) + i) = pair.x;
    } else {
      const bool word = IsWord(to);
      char* const data = static_cast<char*>(to.data) + i * (word ? 4 : 2);
      if constexpr (kByPairs) {
        if (first && word) *reinterpret_cast<uint2*>(data) = pair;
        if (first && !word) *reinterpret_cast<uint32_t*>(data) = pair.x;
      } else {
        uint32_t* const words = reinterpret_cast<uint32_t*>(data);
        uint16_t* const shorts = reinterpret_cast<uint16_t*>(data);
        if (first && word) words[0] = pair.x;
        if (second && word) words[1] = pair.y;
        if (first && !word) shorts[0] = static_cast<uint16_t>(pair.x);
        if (second && !word) shorts[1] = static_cast<uint16_t>(pair.x >> 16);
      }
    }
  }

  // Both elements of pair k, to or from cells of their own.
  __device__ void Put(float* cells, Place k, float x, float y) const {
    if (!Mine(k)) return;
    if (PairsAreSteps()) {
      cells[Cell(k, 0)] = x;
      cells[Cell(k, 1)] = y;
    } else {
      *reinterpret_cast<float2*>(cells + Cell(k, 0)) = {x, y};
    }
  }
  __device__ void Put(float2* cells, Place k, float2 x, float2 y) const {
    if (!Mine(k)) return;
    if (PairsAreSteps()) {
      cells[WideCell(k, 0)] = x;
      cells[WideCell(k, 1)] = y;
    } else {
      *reinterpret_cast<float4*>(cells + WideCell(k, 0)) = {x.x, x.y, y.x, y.y};
    }
  }
  // What there is one of for each line, for both elements of pair k.
  __device__ float2 OfLines(const float* lines, Place k) const {
    if (!PairsAreSteps()) return *reinterpret_cast<const float2*>(lines + LineOf(k, 0));
    const float x = lines[LineOf(k, 0)];
    return {x, x};
  }
  __device__ float2 Get(const float* cells, Place k) const {
    if (PairsAreSteps()) return {cells[Cell(k, 0)], cells[Cell(k, 1)]};
    return *reinterpret_cast<const float2*>(cells + Cell(k, 0));
  }
  __device__ float4 Get(const float2* cells, Place k) const {
    if (!PairsAreSteps()) return *reinterpret_cast<const float4*>(cells + WideCell(k, 0));
    const float2 x = cells[WideCell(k, 0)], y = cells[WideCell(k, 1)];
    return {x.x, x.y, y.x, y.y};
  }
  // The same where rows are of that length.
  template <int kRowLength>
  __device__ float2 GetFromRows(const float* cells, Place k) const {
    const int offset = offset_ + OffsetTo(k), row = reversed_ ? kTile - 1 - offset : offset;
    const float* const first = cells + row * kRowLength + LineOf(k, 0);
    if (PairsAreSteps()) return {*first, first[reversed_ ? -kRowLength : kRowLength]};
    return *reinterpret_cast<const float2*>(first);
  }

 private:
  __device__ int CellFrom(int first, Place k, int e) const {
    return first + OffsetTo(k) * row_ + LineTo(k) + (!e ? 0 : PairsAreSteps() ? row_ : 1);
  }
  __device__ bool PairsAreSteps() const {
    return kLayout == Layout::kAny ? pairs_are_steps_ : kLayout == Layout::kTimeLast;
  }
  __device__ static bool IsWord(const Array& array) {
    return DtypeOf<kElements>(array) == DataType::F32;
  }
  // From a thread's first pair to pair k.
  __device__ int OffsetTo(Place k) const {
    if (kLayout == Layout::kAny) return k.row * next_offset_;
    return kLayout == Layout::kTimeLast ? 0 : k.row * (kThreads / kNear);
  }
  __device__ int LineTo(Place k) const {
    if (kLayout == Layout::kAny) return k.row * next_line_;
    return kLayout == Layout::kTimeLast ? k.row * (kThreads / (kTile / 2)) : k.across * (2 * kNear);
  }
  __device__ Offset ElementTo(Place k) const {
    return k.row * next_element_ + (kAcross > 1 ? LineTo(k) * kUnit : 0);
  }

  int thread_;
  // The slot of the first quad that this thread copies, what is in it, and how far that is from the
  // thread's first pair.
  int quad_, quad_offset_, quad_line_, from_quad_;
  int64_t start_, step_, stride_;
  Offset next_element_;
  bool reversed_;
  int count_, offset_, line_, next_offset_, next_line_, cell_, row_, first_slot_;
  bool pairs_are_steps_;
};

// Copies a tile of kArrays regular arrays that lie alike, 16 bytes at a time where they may be, to
// where `Take` of `Tile` finds the pairs of each, one array after the other. Others may have copied
// what a thread takes: between waiting and taking all have to meet. kThreads: those who copy.
template <typename Tile, int kArrays, int kThreads = Tile::kThreadCount>
class QuadCopies {
  static constexpr int kOfQuad = 16 / Tile::kUnit;  // elements
  static constexpr int kNear = (Tile::kChannelLast ? Tile::kLineCount : kTile) / kOfQuad;
  static constexpr int kOfArray = kTile * Tile::kLineCount / kOfQuad;
  static constexpr int kAll = kArrays * kOfArray;
  static constexpr int kCount = (kAll + kThreads - 1) / kThreads;  // of a thread
  static constexpr int kPair = sizeof(typename Tile::Slot), kPairs = 16 / kPair;
  static_assert(Tile::kRegular && kCount <= 32);

 public:
  // From the tile that begins at t0 on.
  template <typename... Arrays>
  __device__ QuadCopies(const Lines& lines, int64_t t0, int thread, const Arrays&... arrays)
      : thread_(thread), lines_(lines.count) {
    static_assert(sizeof...(arrays) == kArrays);
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const int i = k * kThreads + thread, line = LineOf(i);
      const char* data = nullptr;
      int array = 0;
      ((data = array++ == i / kOfArray ? static_cast<const char*>(arrays.data) : data), ...);
      const int64_t at = lines.start + (t0 + OffsetOf(i)) * lines.step + line * lines.stride;
      from_[k] = data + at * Tile::kUnit;
      exist_ |= data && i < kAll && line < lines.count ? 1u << k : 0;
    }
  }
  // The next tile, of so many steps. The one after it is a stride further, as Tile says. in_quads:
  // whether 16 bytes may be copied at once, see InQuads; else, and in the last tile, it is a pair.
  __device__ void Send(typename Tile::Slot* slots, int steps, int64_t stride, bool in_quads) {
    typename Tile::Slot* const to = slots + thread_ * kPairs;
    if (in_quads && steps == kTile) {
#pragma unroll
      for (int k = 0; k < kCount; ++k)
        if (Mine(k)) CopyAsync<16>(to + k * kThreads * kPairs, from_[k], exist_ & 1u << k ? 16 : 0);
    } else {
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        const int i = k * kThreads + Anew(thread_);
        if (!Mine(k)) continue;
#pragma unroll
        for (int pair = 0; pair < kPairs; ++pair) {
          const int near = pair * (kOfQuad / kPairs);
          const int offset = OffsetOf(i) + (Tile::kChannelLast ? 0 : near);
          const int line = LineOf(i) + (Tile::kChannelLast ? near : 0);
          const bool exists = exist_ & 1u << k && offset < steps && line < lines_;
          CopyAsync<kPair>(to + k * kThreads * kPairs + pair, from_[k] + pair * kPair,
                           exists ? kPair : 0);
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kCount; ++k) from_[k] += stride;
  }

 private:
  __device__ bool Mine(int k) const {
    return (k + 1) * kThreads <= kAll || k * kThreads + thread_ < kAll;
  }
  // The first step and line of a quad.
  __device__ static int OffsetOf(int i) { return Tile::kChannelLast ? FarOf(i) : NearOf(i); }
  __device__ static int LineOf(int i) { return Tile::kChannelLast ? NearOf(i) : FarOf(i); }
  // Of these, the one along the axis that is last in memory, and the other.
  __device__ static int NearOf(int i) { return i % kOfArray % kNear * kOfQuad; }
  __device__ static int FarOf(int i) { return i % kOfArray / kNear; }

  int thread_, lines_;
  uint32_t exist_ = 0;  // bit k: whether there is quad k
  const char* from_[kCount];
};

// The same for one array after another, each by all threads, a thread's quads evenly spaced: so one
// offset serves for all arrays. For whole tiles, where 16 bytes may be copied at once.
template <typename Tile>
class EvenCopies {
  static constexpr bool kChannelLast = Tile::kChannelLast;
  static constexpr int kThreads = Tile::kThreadCount, kLines = Tile::kLineCount;
  static constexpr int kOfQuad = 16 / Tile::kUnit;  // elements
  static constexpr int kPairs = 16 / sizeof(typename Tile::Slot);
  // Quads side by side in memory, and how many threads take them, one step or line each.
  static constexpr int kOfRow = (kChannelLast ? kLines : kTile) / kOfQuad;
  static constexpr int kAbreast = kChannelLast ? kThreads / kTile : kOfRow;
  static constexpr int kRows = kThreads / kAbreast;  // at once
  static constexpr int kCount =
      kChannelLast ? (kOfRow + kAbreast - 1) / kAbreast : (kLines + kRows - 1) / kRows;
  static_assert(Tile::kRegular && kThreads % kAbreast == 0);

 public:
  // From the tile that begins at t0 on.
  __device__ EvenCopies(const Lines& lines, int64_t t0, int thread)
      : row_(thread / kAbreast),
        near_(thread % kAbreast * kOfQuad),
        lines_(lines.count),
        next_(kChannelLast ? kAbreast * 16u
                           : static_cast<uint32_t>(kRows * lines.stride * Tile::kUnit)) {
    const int offset = kChannelLast ? row_ : near_, line = kChannelLast ? near_ : row_;
    at_ = (lines.start + (t0 + offset) * lines.step + line * lines.stride) * Tile::kUnit;
  }
  __device__ void Advance(int64_t stride) { at_ += stride; }
  // The next tile of an array, all of whose steps are there.
  __device__ void Send(const Array& from, typename Tile::Slot* slots, bool wanted = true) const {
    const char* const data = static_cast<const char*>(from.data) + at_;
    typename Tile::Slot* const to =
        slots + (row_ * (kChannelLast ? kLines : kTile) + near_) / kOfQuad * kPairs;
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const int near = near_ + k * kAbreast * kOfQuad,
                line = kChannelLast ? near : row_ + k * kRows;
      if (kChannelLast ? kOfRow % kAbreast && near >= kLines : kLines % kRows && line >= kLines)
        continue;
      CopyAsync<16>(to + k * (kChannelLast ? kAbreast : kThreads) * kPairs,
                    data + k * static_cast<int64_t>(next_), wanted && line < lines_ ? 16 : 0);
    }
  }

 private:
  int row_, near_, lines_;
  uint32_t next_;
  int64_t at_;
};

// Walkers count the lanes of a warp with the first and the last bit of their number exchanged; its
// own inverse, for masks of lanes as well. Loads of 8 or 16 bytes from shared memory take half the
// time where each lane reads the same as the neighbour it has by the first bit, or each as that by
// the second: in this order neighbours by the first bit share their states, and those by the second
// their channel.
__device__ constexpr int LanePlace(int lane) {
  return (lane & ~17) | (lane & 1) << 4 | (lane >> 4 & 1);
}

// The value of the lane whose place differs by `mask`.
__device__ inline float ExchangePlaces(float x, int mask) { return ShuffleXor(x, LanePlace(mask)); }

// The sum over the lanes whose places differ in the bits from kBit up to kEnd, of kCount values at
// once, halved at each bit, the lowest first: the upper lane keeps the second half. A lane ends
// with values[0 .. held). The first kFree halvings need no select, since upper lanes hold their
// halves the other way round.
template <int kCount, int kFree, int kBit, int kEnd>
__device__ inline void SumHalves(float* values) {
  if constexpr (kBit < kEnd) {
    if constexpr (kCount > 1) {
      constexpr int kHalf = kCount / 2;
      const bool upper = kFree > 0 ? false : (LanePlace(threadIdx.x) & kBit) != 0;
#pragma unroll
      for (int i = 0; i < kHalf; ++i) {
        const float kept = upper ? values[i + kHalf] : values[i];
        const float sent = upper ? values[i] : values[i + kHalf];
        values[i] = kept + ExchangePlaces(sent, kBit);
      }
      SumHalves<kHalf, kFree - 1, kBit * 2, kEnd>(values);
    } else {
      values[0] += ExchangePlaces(values[0], kBit);
      SumHalves<1, 0, kBit * 2, kEnd>(values);
    }
  }
}

// A fixed B or C, one row of states per channel; the work of a thread of kThreads.
template <typename Number, int kThreads, int kChannels, int kGroup, int kRow>
__device__ inline void StageFixed(const Problem& p, const Block& block, const Array& from,
                                  int first_state, int thread, Number* to) {
  const int64_t start = (block.instance * p.dim + block.first_channel) * p.dstate + first_state;
  for (int i = thread; i < kChannels * kGroup; i += kThreads) {
    const int n = i % kGroup, channel = i / kGroup;
    Number x{};
    if (channel < block.channels && first_state + n < p.dstate)
      x = static_cast<const Number*>(from.data)[start + channel * p.dstate + n];
    to[channel * kRow + n] = x;
  }
}

// D and delta_bias of a block's channels, 0 for what is not there.
template <int kChannels>
struct Vectors {
  alignas(8) float D[kChannels];
  alignas(8) float delta_bias[kChannels];
};
// The work of a thread of kThreads.
template <int kThreads, int kChannels>
__device__ inline void StageVectors(const Problem& p, const Block& block, int thread,
                                    Vectors<kChannels>& to) {
  const Operands& o = p.operands;
  for (int i = thread; i < kChannels; i += kThreads) {
    const int64_t at = block.instance * p.dim + block.first_channel + i;
    const bool exists = i < block.channels;
    to.D[i] = exists && o.D.data ? static_cast<const float*>(o.D.data)[at] : 0.0f;
    to.delta_bias[i] =
        exists && o.delta_bias.data ? static_cast<const float*>(o.delta_bias.data)[at] : 0.0f;
  }
}

// A register's worth of states in shared memory, read with loads as wide as they get.
template <int kStates>
__device__ inline void LoadStates(const float* from, float (&to)[kStates]) {
  if constexpr (kStates == 4) {
    const float4 x = *reinterpret_cast<const float4*>(from);
    to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
  } else if constexpr (kStates == 2) {
    const float2 x = *reinterpret_cast<const float2*>(from);
    to[0] = x.x, to[1] = x.y;
  } else {
    for (int i = 0; i < kStates; ++i) to[i] = from[i];
  }
}
template <int kStates>
__device__ inline void LoadStates(const Complex* from, Complex (&to)[kStates]) {
  for (int i = 0; i < kStates; ++i) to[i] = from[i];
}

// A, one lane's states of a channel; 0 where there are none, which decays nothing.
template <typename Number>
__device__ inline Number LoadWeight(const Array& from, const Problem& p, const Block& block,
                                    int channel, int64_t state) {
  if (channel >= block.channels || state >= p.dstate) return Number{};
  return static_cast<const Number*>(
      from.data)[(block.instance * p.dim + block.first_channel + channel) * p.dstate + state];
}

// Index of a state in arrays (batch, dim, dstate), and in the saved states and carries, (..., batch
// row first in `slot`, dstate, dim).
__device__ inline int64_t StateIndex(const Problem& p, const Block& block, int channel,
                                     int64_t state) {
  return (block.row * p.dim + block.first_channel + channel) * p.dstate + state;
}
__device__ inline int64_t TransposedIndex(const Problem& p, const Block& block, int64_t slot,
                                          int channel, int64_t state) {
  return (slot * p.dstate + state) * p.dim + block.first_channel + channel;
}

// What the pass before the walk left of the pieces of spans, in processing order.
template <typename Number>
struct Pieces {
  const Number* ends;      // (pieces, batch, dstate, dim): the state of one that begins with 0
  const float* sum_delta;  // (pieces, batch, dim): NaN where the state starts anew

  // The state at the end of a piece that begins with x: x itself where there is no such channel or
  // state. Without a branch, so that several are loaded at once: each takes half a microsecond.
  __device__ Number After(int64_t piece, Number x, const Problem& p, const Block& block,
                          int channel, int64_t state, Number rate) const {
    const int64_t slot = piece * p.batch + block.row;
    const bool exists = channel < block.channels;
    const float sum = exists ? sum_delta[slot * p.dim + block.first_channel + channel] : 0.0f;
    const Number end = exists && state < p.dstate
                           ? ends[TransposedIndex(p, block, slot, channel, state)]
                           : Number{};
    const Number after = MultiplyAdd(Decay(rate, sum), x, end);
    return isnan(sum) ? end : after;
  }
};
template <typename Number, typename Workspace>
__host__ __device__ inline Pieces<Number> PiecesIn(const Problem& p, const Workspace& workspace) {
  const char* base = static_cast<const char*>(p.workspace.data);
  return {reinterpret_cast<const Number*>(base + workspace.ends),
          reinterpret_cast<const float*>(base + workspace.sum_delta)};
}

}  // namespace jax_sscan::gpu
