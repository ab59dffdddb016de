// The CPU kernels of the selective scan, for one instruction set (see vector.h).
//
// What it computes: the forward pass, saving the state at the start of every chunk, and the
// backward pass, which walks the chunks in reverse, recomputes a chunk's states from the saved one,
// and carries the adjoint.
//
// How work maps: a task is one batch row and one slice of channels. Vector lanes hold neighbouring
// channels (a block); time runs sequentially. Chunks are the outer loop and blocks the inner one,
// so that B and C of a chunk, if they have to be converted, are so once for all blocks. Within a
// block, states go in groups of kGroup, whose states and rates A stay in registers over all steps
// of the chunk.
//
// What lives where: per block and chunk, delta, delta u, y and the gate in 4 * chunk vectors of
// scratch; the backward pass has cotangents in their place, and adds the history of one group
// (states and decays, 2 * chunk * kGroup vectors) and the partial sums for dB and dC (2 * chunk *
// dstate vectors, shared by the blocks of a task). All of it fits the L2 cache.
//
// Cost per (step, state) of a vector of channels: forward the exponent's product, one Exp2 (9
// operations with AVX-512, else 14), another product and two FMAs; backward the same again but for
// the FMA that sums y, then about nine multiplies and FMAs in the reverse walk, with no second
// Exp2.

#include <algorithm>
#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#include "cpu/scan.h"
#include "cpu/vector.h"

namespace jax_sscan::cpu {
namespace {

// ---------------------------------------------------------------------------------------------------------
// Numbers: a vector of reals, or of complex numbers as two vectors.

template <typename T>
struct Real {
  using Scalar = T;
  static constexpr bool kComplex = false;
  static constexpr int kParts = 1;
  Vec<T> re;
};
template <typename T>
struct Complex {
  using Scalar = T;
  static constexpr bool kComplex = true;
  static constexpr int kParts = 2;
  Vec<T> re, im;
};

template <typename T>
inline Real<T> operator*(Real<T> a, Real<T> b) {
  return {a.re * b.re};
}
template <typename T>
inline Real<T> operator*(Real<T> a, Vec<T> b) {
  return {a.re * b};
}
template <typename T>
inline Real<T> operator+(Real<T> a, Real<T> b) {
  return {a.re + b.re};
}
template <typename T>
inline Complex<T> operator*(Complex<T> a, Complex<T> b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
template <typename T>
inline Complex<T> operator*(Complex<T> a, Vec<T> b) {
  return {a.re * b, a.im * b};
}
template <typename T>
inline Complex<T> operator+(Complex<T> a, Complex<T> b) {
  return {a.re + b.re, a.im + b.im};
}

// The real part of a product, which is all that a real operand's gradient takes of it.
template <typename T>
inline Vec<T> RealOfProduct(Real<T> a, Real<T> b) {
  return a.re * b.re;
}
template <typename T>
inline Vec<T> RealOfProduct(Complex<T> a, Complex<T> b) {
  return a.re * b.re - a.im * b.im;
}

// exp(delta A), for a rate that Rate() has scaled: by log2(e), and the phase to quarter turns.
template <typename T>
inline Real<T> Decay(Real<T> rate, Vec<T> delta) {
  return {Exp2<T>(rate.re * delta)};
}
template <typename T>
inline Complex<T> Decay(Complex<T> rate, Vec<T> delta) {
  Vec<T> magnitude = Exp2<T>(rate.re * delta), cosine, sine;
  CosSinQuarterTurns<T>(rate.im * delta, &cosine, &sine);
  return {magnitude * cosine, magnitude * sine};
}
template <typename T>
inline Real<T> Rate(Real<T> A) {
  return {A.re * T(kLog2E)};
}
template <typename T>
inline Complex<T> Rate(Complex<T> A) {
  return {A.re * T(kLog2E), A.im * T(0.63661977236758134308)};
}

template <typename N>
inline N Broadcast(const typename N::Scalar* p) {
  if constexpr (N::kComplex)
    return {Splat(p[0]), Splat(p[1])};
  else
    return {Splat(p[0])};
}

// ---------------------------------------------------------------------------------------------------------
// Element types of sequences: a vector of them to and from the compute type T. The 16-bit ones are
// converted as bits, so that every target has them.

struct Bfloat {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <typename T>
using Floats = typename VectorOf<T>::Floats;
template <typename T>
using Doubles = typename VectorOf<T>::Doubles;
template <typename T>
using Bits = typename VectorOf<T>::Bits;
template <typename T>
using ShortBits = typename VectorOf<T>::ShortBits;

template <typename T>
inline Vec<T> Widen(const float* from) {
  return __builtin_convertvector(LoadUnaligned<Floats<T>>(from), Vec<T>);
}
template <typename T>
inline Vec<T> Widen(const double* from) {
  return __builtin_convertvector(LoadUnaligned<Doubles<T>>(from), Vec<T>);
}
template <typename T>
inline Vec<T> Widen(const Bfloat* from) {
  const Bits<T> bits = __builtin_convertvector(LoadUnaligned<ShortBits<T>>(from), Bits<T>);
  return __builtin_convertvector(BitCast<Floats<T>>(bits << 16), Vec<T>);
}
template <typename T>
inline Vec<T> Widen(const Half* from) {
  const Bits<T> bits = __builtin_convertvector(LoadUnaligned<ShortBits<T>>(from), Bits<T>);
  const Bits<T> sign = (bits & 0x8000) << 16, rest = bits & 0x7fff;
  // The exponent moves by 112. Subnormal numbers get the exponent of the smallest normal one and
  // lose its 2^-14 again: XLA's threads read subnormal floats as 0, so none may arise on the way.
  const Bits<T> smallest = Bits<T>{} + 0x38800000;
  const Bits<T> subnormal =
      BitCast<Bits<T>>(BitCast<Floats<T>>((rest << 13) + smallest) - BitCast<Floats<T>>(smallest));
  Bits<T> magnitude = rest < 0x400 ? subnormal : (rest << 13) + 0x38000000;
  magnitude = rest >= 0x7c00 ? (rest << 13) | 0x7f800000 : magnitude;
  return __builtin_convertvector(BitCast<Floats<T>>(sign | magnitude), Vec<T>);
}

template <typename V>
inline void StoreUnaligned(V v, void* p) {
  std::memcpy(p, &v, sizeof(v));
}
template <typename T>
inline void Narrow(Vec<T> x, float* to) {
  StoreUnaligned(__builtin_convertvector(x, Floats<T>), to);
}
template <typename T>
inline void Narrow(Vec<T> x, double* to) {
  StoreUnaligned(__builtin_convertvector(x, Doubles<T>), to);
}
template <typename T>
inline void Narrow(Vec<T> x, Bfloat* to) {
  const Bits<T> bits = BitCast<Bits<T>>(__builtin_convertvector(x, Floats<T>));
  const Bits<T> rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Bits<T> result = (bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded;
  StoreUnaligned(__builtin_convertvector(result, ShortBits<T>), to);
}
template <typename T>
inline void Narrow(Vec<T> x, Half* to) {
  const Bits<T> bits = BitCast<Bits<T>>(__builtin_convertvector(x, Floats<T>));
  const Bits<T> sign = (bits >> 16) & 0x8000, rest = bits & 0x7fffffff;
  Bits<T> result = (rest + 0xfff + ((rest >> 13) & 1) - 0x38000000) >> 13;
  // Below the smallest normal number the addition rounds.
  const Bits<T> tiny = BitCast<Bits<T>>(BitCast<Floats<T>>(rest) + 0.5f) - 0x3f000000;
  result = rest < 0x38800000 ? tiny : result;
  result = rest >= 0x477ff000 ? Bits<T>{} + 0x7c00 : result;  // rounds to infinity
  result = rest > 0x7f800000 ? Bits<T>{} + 0x7e00 : result;
  StoreUnaligned(__builtin_convertvector(sign | result, ShortBits<T>), to);
}

// The first count lanes; the others are 0 or left alone in memory.
template <typename T, typename E>
inline Vec<T> WidenPart(const E* from, int64_t count) {
  E part[kLanes<T>] = {};
  std::memcpy(part, from, count * sizeof(E));
  return Widen<T>(part);
}
template <typename T, typename E>
inline void NarrowPart(Vec<T> x, int64_t count, E* to) {
  E part[kLanes<T>];
  Narrow<T>(x, part);
  std::memcpy(to, part, count * sizeof(E));
}

// Calls body with a null pointer to the C++ type of dtype.
template <typename Body>
inline void WithElement(DataType dtype, Body body) {
  switch (dtype) {
    case DataType::F32:
      return body(static_cast<float*>(nullptr));
    case DataType::F64:
      return body(static_cast<double*>(nullptr));
    case DataType::BF16:
      return body(static_cast<Bfloat*>(nullptr));
    default:
      return body(static_cast<Half*>(nullptr));
  }
}

// Copies a run of numbers.
template <typename T>
inline void ToReal(const Array& from, int64_t offset, int64_t count, T* to) {
  WithElement(from.dtype, [&](auto* element) {
    const auto* p = static_cast<decltype(element)>(from.data) + offset;
    int64_t i = 0;
    for (; i + kLanes<T> <= count; i += kLanes<T>) StoreUnaligned(Widen<T>(p + i), to + i);
    if (i < count) {
      const Vec<T> rest = WidenPart<T>(p + i, count - i);
      std::memcpy(to + i, &rest, (count - i) * sizeof(T));
    }
  });
}
template <typename T>
inline void FromReal(const T* from, int64_t count, const Array& to, int64_t offset) {
  WithElement(to.dtype, [&](auto* element) {
    auto* p = static_cast<decltype(element)>(to.data) + offset;
    int64_t i = 0;
    for (; i + kLanes<T> <= count; i += kLanes<T>)
      Narrow<T>(LoadUnaligned<Vec<T>>(from + i), p + i);
    if (i < count) NarrowPart<T>(WidenPart<T>(from + i, count - i), count - i, p + i);
  });
}

// ---------------------------------------------------------------------------------------------------------
// Tiles: a block of channels by some steps (or states), channel-minor in scratch. In memory either
// the channels are next to each other (layout "bld") or the steps (layout "bdl", and all (dim,
// dstate) arrays).

// Where a tile lies in an array of reals.
struct Place {
  int64_t offset;
  int64_t row_stride;      // between steps
  int64_t channel_stride;  // between channels; one of the two is 1
};

// Asks for the cache lines of tiles ahead of their use: their rows lie too far apart for the
// hardware to see them coming, and often on as many pages. A few lines at a time, in between other
// work, since a core has buffers for a few only; and into L2: into L1 they brought a Zen 4 next to
// nothing, and rows that lie a large power of two apart push each other out there.
class Prefetch {
 public:
  void Add(const Array& array, const Place& at, int64_t rows, int64_t channels) {
    const int64_t size = static_cast<int64_t>(ffi::ByteWidth(array.dtype));
    const bool by_row = at.channel_stride == 1;
    const char* first = static_cast<const char*>(array.data) + at.offset * size;
    const int64_t stride = (by_row ? at.row_stride : at.channel_stride) * size;
    const int64_t bytes = (by_row ? channels : rows) * size;
    for (int64_t byte = 0; byte < bytes && used_ < kMost; byte += 64)
      lines_[used_++] = {first + byte, stride};
    rows_ = by_row ? rows : channels;
  }
  // Row i in memory of every tile.
  void Row(int64_t i) const {
    if (i >= rows_) return;
    for (int k = 0; k < used_; ++k)
      __builtin_prefetch(lines_[k].first + i * lines_[k].stride, 0, 2);
    __asm__ volatile("");  // GCC drops calls of functions that do nothing but prefetch
  }

 private:
  static constexpr int kMost = 64;  // the rest of very long rows is left to the hardware
  struct Line {                     // one of each row
    const char* first;
    int64_t stride;
  };
  Line lines_[kMost];
  int used_ = 0;
  int64_t rows_ = 0;
};

template <typename T>
void LoadTile(const Array& from, const Place& at, int64_t rows, int64_t channels, Vec<T>* to) {
  constexpr int kWidth = kLanes<T>;
  WithElement(from.dtype, [&](auto* element) {
    const auto* first = static_cast<decltype(element)>(from.data) + at.offset;
    if (at.channel_stride == 1) {
      if (channels == kWidth)
        for (int64_t r = 0; r < rows; ++r) to[r] = Widen<T>(first + r * at.row_stride);
      else
        for (int64_t r = 0; r < rows; ++r)
          to[r] = WidenPart<T>(first + r * at.row_stride, channels);
      return;
    }
    for (int64_t begin = 0; begin < rows; begin += kWidth) {
      const int64_t count = std::min<int64_t>(kWidth, rows - begin);
      if (count == kWidth && channels == kWidth) {  // of known size, it stays in registers
        Vec<T> square[kWidth];
        for (int c = 0; c < kWidth; ++c)
          square[c] = Widen<T>(first + c * at.channel_stride + begin);
        Transpose<T>(square);
        for (int i = 0; i < kWidth; ++i) to[begin + i] = square[i];
        continue;
      }
      Vec<T> square[kWidth] = {};
      for (int64_t c = 0; c < channels; ++c) {
        const auto* row = first + c * at.channel_stride + begin;
        square[c] = count == kWidth ? Widen<T>(row) : WidenPart<T>(row, count);
      }
      Transpose<T>(square);
      for (int64_t i = 0; i < count; ++i) to[begin + i] = square[i];
    }
  });
}

template <typename T>
void StoreTile(const Vec<T>* from, int64_t rows, int64_t channels, const Array& to,
               const Place& at) {
  constexpr int kWidth = kLanes<T>;
  WithElement(to.dtype, [&](auto* element) {
    auto* first = static_cast<decltype(element)>(to.data) + at.offset;
    if (at.channel_stride == 1) {
      if (channels == kWidth)
        for (int64_t r = 0; r < rows; ++r) Narrow<T>(from[r], first + r * at.row_stride);
      else
        for (int64_t r = 0; r < rows; ++r)
          NarrowPart<T>(from[r], channels, first + r * at.row_stride);
      return;
    }
    for (int64_t begin = 0; begin < rows; begin += kWidth) {
      const int64_t count = std::min<int64_t>(kWidth, rows - begin);
      if (count == kWidth && channels == kWidth) {
        Vec<T> square[kWidth];
        for (int i = 0; i < kWidth; ++i) square[i] = from[begin + i];
        Transpose<T>(square);
        for (int c = 0; c < kWidth; ++c)
          Narrow<T>(square[c], first + c * at.channel_stride + begin);
        continue;
      }
      Vec<T> square[kWidth] = {};
      for (int64_t i = 0; i < count; ++i) square[i] = from[begin + i];
      Transpose<T>(square);
      for (int64_t c = 0; c < channels; ++c) {
        auto* row = first + c * at.channel_stride + begin;
        if (count == kWidth)
          Narrow<T>(square[c], row);
        else
          NarrowPart<T>(square[c], count, row);
      }
    }
  });
}

// A tile's rows as vectors: where they lie, if they can be used as they are (channels next to each
// other, a full block, in the compute type), or in scratch.
template <typename T>
struct Rows {
  const T* first;
  int64_t stride;
  Vec<T> operator[](int64_t r) const { return LoadUnaligned<Vec<T>>(first + r * stride); }
};
template <typename T>
struct WritableRows {
  T* first;
  int64_t stride;
  void Set(int64_t r, Vec<T> v) const { StoreUnaligned(v, first + r * stride); }
};

template <typename T>
inline bool InPlace(const Array& array, const Place& at, int64_t channels) {
  constexpr DataType kType = sizeof(T) == 4 ? DataType::F32 : DataType::F64;
  return array.dtype == kType && at.channel_stride == 1 && channels == kLanes<T>;
}
template <typename T>
inline Rows<T> ReadTile(const Array& from, const Place& at, int64_t rows, int64_t channels,
                        Vec<T>* scratch) {
  if (InPlace<T>(from, at, channels))
    return {static_cast<const T*>(from.data) + at.offset, at.row_stride};
  LoadTile<T>(from, at, rows, channels, scratch);
  return {reinterpret_cast<const T*>(scratch), kLanes<T>};
}
// What is set in these rows reaches memory with FinishTile.
template <typename T>
inline WritableRows<T> WriteTile(const Array& to, const Place& at, int64_t channels,
                                 Vec<T>* scratch) {
  if (InPlace<T>(to, at, channels)) return {static_cast<T*>(to.data) + at.offset, at.row_stride};
  return {reinterpret_cast<T*>(scratch), kLanes<T>};
}
template <typename T>
inline void FinishTile(const Vec<T>* scratch, int64_t rows, int64_t channels, const Array& to,
                       const Place& at) {
  if (!InPlace<T>(to, at, channels)) StoreTile<T>(scratch, rows, channels, to, at);
}

// The same for a run of count channels that lie next to each other; a row is a block of them.
template <typename T>
inline Rows<T> RunOf(const Vec<T>* scratch) {
  return {reinterpret_cast<const T*>(scratch), kLanes<T>};
}
template <typename T>
inline bool RunInPlace(const Array& array, int64_t count) {
  return InPlace<T>(array, {0, 0, 1}, kLanes<T>) && count % kLanes<T> == 0;
}
template <typename T>
inline Rows<T> ReadRun(const Array& from, int64_t offset, int64_t count, Vec<T>* scratch) {
  if (RunInPlace<T>(from, count)) return {static_cast<const T*>(from.data) + offset, kLanes<T>};
  ToReal(from, offset, count, reinterpret_cast<T*>(scratch));
  return RunOf<T>(scratch);
}
template <typename T>
inline WritableRows<T> WriteRun(const Array& to, int64_t offset, int64_t count, Vec<T>* scratch) {
  if (RunInPlace<T>(to, count)) return {static_cast<T*>(to.data) + offset, kLanes<T>};
  return {reinterpret_cast<T*>(scratch), kLanes<T>};
}
template <typename T>
inline void FinishRun(const Vec<T>* scratch, const Array& to, int64_t offset, int64_t count) {
  if (!RunInPlace<T>(to, count)) FromReal(reinterpret_cast<const T*>(scratch), count, to, offset);
}

// The same for tiles of numbers: a complex array is one of reals, with the parts interleaved.
template <typename N>
void LoadNumbers(const Array& from, const Place& at, int64_t rows, int64_t channels, N* to) {
  using T = typename N::Scalar;
  if constexpr (!N::kComplex) {
    LoadTile<T>(from, at, rows, channels, reinterpret_cast<Vec<T>*>(to));
  } else {
    const T* data = static_cast<const T*>(from.data);
    for (int64_t r = 0; r < rows; ++r) {
      to[r] = N{};
      for (int64_t c = 0; c < channels; ++c) {
        int64_t i = 2 * (at.offset + r * at.row_stride + c * at.channel_stride);
        to[r].re[c] = data[i];
        to[r].im[c] = data[i + 1];
      }
    }
  }
}

template <typename N>
void StoreNumbers(const N* from, int64_t rows, int64_t channels, const Array& to, const Place& at) {
  using T = typename N::Scalar;
  if constexpr (!N::kComplex) {
    StoreTile<T>(reinterpret_cast<const Vec<T>*>(from), rows, channels, to, at);
  } else {
    T* data = static_cast<T*>(to.data);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < channels; ++c) {
        int64_t i = 2 * (at.offset + r * at.row_stride + c * at.channel_stride);
        data[i] = from[r].re[c];
        data[i + 1] = from[r].im[c];
      }
    }
  }
}

// Scratch memory of one task, aligned to vectors. Most tasks need one block of it: a small call
// would spend a fifth of its time on one per array.
class Scratch {
 public:
  template <typename V>
  V* Take(int64_t count) {
    const size_t bytes = (size_t(count) * sizeof(V) + 63) / 64 * 64;
    if (bytes > left_) {
      left_ = std::max(bytes, kBlock);
      next_ = static_cast<char*>(std::aligned_alloc(64, left_));
      if (!next_) throw std::bad_alloc();
      blocks_.emplace_back(next_);
    }
    V* taken = reinterpret_cast<V*>(next_);
    next_ += bytes;
    left_ -= bytes;
    return taken;
  }

 private:
  // Below what glibc takes as a reason to tidy up when it is freed.
  static constexpr size_t kBlock = 48 << 10;
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  std::vector<std::unique_ptr<char, Free>> blocks_;
  char* next_ = nullptr;
  size_t left_ = 0;
};

// ---------------------------------------------------------------------------------------------------------
// One task's view of the problem.

struct Slice {
  Slice(const Problem& p, const Tasks& tasks, int64_t task)
      : p(p),
        part(task / tasks.slices),
        slice(task % tasks.slices),
        group(slice / tasks.slices_per_group) {
    const int64_t begin_in_group = slice % tasks.slices_per_group * tasks.slice_dim;
    begin = group * p.group_dim() + begin_in_group;
    dim = std::min(tasks.slice_dim, p.group_dim() - begin_in_group);
    const int64_t instance_rows = p.batch / p.instances;
    const int64_t begin_in_instance = part % tasks.parts_per_instance * tasks.rows;
    first_row = part / tasks.parts_per_instance * instance_rows + begin_in_instance;
    last_row = first_row + std::min(tasks.rows, instance_rows - begin_in_instance);
    batch = first_row;
  }

  // Blocks of so many channels; the last may have fewer.
  template <int kWidth>
  int64_t Blocks() const {
    return (dim + kWidth - 1) / kWidth;
  }
  // Calls body(block, channel, channels).
  template <int kWidth, typename Body>
  void EachBlock(Body body) const {
    for (int64_t b = 0; b < Blocks<kWidth>(); ++b)
      body(b, begin + b * kWidth, std::min<int64_t>(kWidth, dim - b * kWidth));
  }

  // A tile of u, delta, z, out and their cotangents.
  Place Sequence(int64_t channel, int64_t t) const {
    if (p.channel_last) return {(batch * p.length + t) * p.dim + channel, p.dim, 1};
    return {(batch * p.dim + channel) * p.length + t, 1, p.length};
  }
  // A tile of a (dim, dstate) array, states as rows; with the batch in front for states.
  Place Weight(int64_t channel) const {
    return {(p.instance(batch) * p.dim + channel) * p.dstate, 1, p.dstate};
  }
  Place Vector(int64_t channel) const { return {p.instance(batch) * p.dim + channel, 0, 1}; }
  Place State(int64_t channel) const { return {(batch * p.dim + channel) * p.dstate, 1, p.dstate}; }
  // The state on entering a chunk; that of the first one in processing order is not saved.
  Place Saved(int64_t channel, int64_t chunk) const {
    const int64_t row = batch * (p.num_chunks() - 1) + chunk - (p.reverse ? 0 : 1);
    return {row * p.dstate * p.dim + channel, p.dim, 1};
  }
  // Varying B or C: the number of state n at step t is at offset + t * time + n * state.
  struct Varying {
    int64_t offset, time, state;
  };
  Varying Projection() const {
    if (p.channel_last)
      return {(batch * p.length * p.groups + group) * p.dstate, p.groups * p.dstate, 1};
    return {(batch * p.groups + group) * p.dstate * p.length, 1, p.length};
  }
  bool Restarts(int64_t t) const {
    const int64_t previous = p.reverse ? t + 1 : t - 1;
    if (previous < 0 || previous >= p.length) return false;
    if (p.restart_every && t / p.restart_every != previous / p.restart_every) return true;
    if (!p.operands.segment_ids) return false;
    const int32_t* ids =
        static_cast<const int32_t*>(p.operands.segment_ids.data) + batch * p.length;
    return ids[t] != ids[previous];
  }

  const Problem& p;
  int64_t part, slice, group;
  int64_t begin, dim;           // channels
  int64_t first_row, last_row;  // of the batch
  int64_t batch;                // the row that places lie in
};

// What is read and written after block b of the chunk at t0: those arrays that are there, of the
// next block or, after the last, of the first one of the chunk that is `chunk` steps further.
template <typename T>
Prefetch NextBlock(const Slice& s, int64_t b, int64_t t0, int64_t chunk,
                   std::initializer_list<Array> arrays) {
  constexpr int kWidth = kLanes<T>;
  Prefetch next;
  if (++b * kWidth >= s.dim) b = 0, t0 += chunk;
  if (t0 < 0 || t0 >= s.p.length) return next;
  const Place at = s.Sequence(s.begin + b * kWidth, t0);
  const int64_t steps = std::min(s.p.chunk, s.p.length - t0);
  const int64_t channels = std::min<int64_t>(kWidth, s.dim - b * kWidth);
  for (const Array& array : arrays)
    if (array) next.Add(array, at, steps, channels);
  return next;
}

// A varying B or C of a chunk: at each step dstate reals, or pairs of reals.
template <typename T>
struct Steps {
  const T* first;
  int64_t stride;
};

// In place if the states are next to each other and in the compute type, or else in scratch.
template <typename N>
Steps<typename N::Scalar> ReadProjection(const Slice& s, const Array& from, int64_t t0,
                                         int64_t steps, typename N::Scalar* scratch) {
  using T = typename N::Scalar;
  const auto at = s.Projection();
  const int64_t dstate = s.p.dstate;
  if (at.state == 1 && from.dtype == s.p.state)
    return {static_cast<const T*>(from.data) + (at.offset + t0 * at.time) * N::kParts,
            at.time * N::kParts};
  if constexpr (N::kComplex) {
    const T* data = static_cast<const T*>(from.data);
    for (int64_t t = 0; t < steps; ++t)
      for (int64_t n = 0; n < dstate; ++n) {
        const int64_t i = 2 * (at.offset + (t0 + t) * at.time + n * at.state);
        scratch[2 * (t * dstate + n)] = data[i];
        scratch[2 * (t * dstate + n) + 1] = data[i + 1];
      }
  } else if (at.state == 1) {
    for (int64_t t = 0; t < steps; ++t)
      ToReal(from, at.offset + (t0 + t) * at.time, dstate, scratch + t * dstate);
  } else {
    // A tile whose "channels" are states; blocks of them are copied out of the vectors.
    constexpr int kWidth = kLanes<T>;
    for (int64_t n = 0; n < dstate; n += kWidth)
      for (int64_t t = 0; t < steps; t += kWidth) {
        Vec<T> tile[kWidth];
        int64_t states = std::min<int64_t>(kWidth, dstate - n),
                rows = std::min<int64_t>(kWidth, steps - t);
        LoadTile<T>(from, {at.offset + t0 + t + n * at.state, 1, at.state}, rows, states, tile);
        for (int64_t i = 0; i < rows; ++i)
          std::memcpy(scratch + (t + i) * dstate + n, &tile[i], states * sizeof(T));
      }
  }
  return {scratch, dstate * N::kParts};
}

// States per inner loop: their states and rates fill half of the registers, and the rest serves
// Exp2.
template <typename N>
constexpr int kGroup = (JAX_SSCAN_VECTOR_BYTES == 64 ? 8 : 4) / N::kParts;

// Calls body(std::integral_constant<int, count>) for each group of states; the last may be shorter.
template <int kMost, typename Body>
inline void ForGroups(int64_t dstate, Body body) {
  int64_t n = 0;
  for (; n + kMost <= dstate; n += kMost) body(n, std::integral_constant<int, kMost>());
  for (; n < dstate; ++n) body(n, std::integral_constant<int, 1>());
}

// One operand B or C in front of the inner loop: numbers that vary along the sequence, or one
// vector per state. From(t, n)[i] is the number of state n + i at step t.
template <typename N>
struct Varying {
  using T = typename N::Scalar;
  struct Row {
    const T* first;
    N operator[](int64_t n) const { return Broadcast<N>(first + n * N::kParts); }
  };
  static constexpr bool kIsVarying = true;
  Steps<T> steps;
  Row From(int64_t t, int64_t n) const { return {steps.first + t * steps.stride + n * N::kParts}; }
};
template <typename N>
struct Fixed {
  static constexpr bool kIsVarying = false;
  const N* numbers;  // (dstate)
  const N* From(int64_t, int64_t n) const { return numbers + n; }
};

// B and C as the blocks of a slice see them: what is fixed, of every block; what varies, of the
// steps that were read last.
template <typename N>
class Projections {
  using T = typename N::Scalar;

 public:
  // chunk: as many steps as are read at a time.
  Projections(const Slice& s, int64_t chunk, Scratch& scratch)
      : s_(s), B_(s, s.p.B_varies, chunk, scratch), C_(s, s.p.C_varies, chunk, scratch) {
    s.EachBlock<kLanes<T>>([&](int64_t b, int64_t channel, int64_t channels) {
      const Operands& o = s.p.operands;
      const Place at = s.Weight(channel);
      if (!B_.varies) LoadNumbers(o.B, at, s.p.dstate, channels, B_.fixed + b * s.p.dstate);
      if (!C_.varies) LoadNumbers(o.C, at, s.p.dstate, channels, C_.fixed + b * s.p.dstate);
    });
  }
  void Read(int64_t t0, int64_t steps) {
    const Operands& o = s_.p.operands;
    if (B_.varies) B_.varying.steps = ReadProjection<N>(s_, o.B, t0, steps, B_.scratch);
    if (C_.varies) C_.varying.steps = ReadProjection<N>(s_, o.C, t0, steps, C_.scratch);
  }
  // Calls body(B, C) with what block b has, each Varying or Fixed.
  template <typename Body>
  void With(int64_t b, Body body) const {
    const Fixed<N> fixed_B{B_.fixed + b * s_.p.dstate}, fixed_C{C_.fixed + b * s_.p.dstate};
    if (B_.varies && C_.varies)
      body(B_.varying, C_.varying);
    else if (B_.varies)
      body(B_.varying, fixed_C);
    else if (C_.varies)
      body(fixed_B, C_.varying);
    else
      body(fixed_B, fixed_C);
  }

 private:
  struct Projection {
    Projection(const Slice& s, bool varies, int64_t chunk, Scratch& from)
        : varies(varies),
          fixed(from.Take<N>(varies ? 0 : s.Blocks<kLanes<T>>() * s.p.dstate)),
          scratch(from.Take<T>(varies ? chunk * s.p.dstate * N::kParts : 0)) {}
    bool varies;
    N* fixed;  // (blocks, dstate)
    T* scratch;
    Varying<N> varying{};
  };
  const Slice& s_;
  Projection B_, C_;
};

// The steps of one chunk in processing order: step i is row Row(i).
struct Walk {
  int64_t steps;
  bool reverse;
  int64_t Row(int64_t i) const { return reverse ? steps - 1 - i : i; }
};

// What the walk over one block reads, from the operands: delta after bias and softplus, and delta
// u. In the forward pass also what it adds to, y, which is D u at first, and gate, silu(z); in the
// backward pass slope, the derivative of delta by what the caller gave as delta.
template <typename T>
struct BlockInputs {
  Vec<T>*u_scratch, *delta, *source, *y, *gate, *slope;  // null: not wanted
  Rows<T> u{};
};

template <typename T>
void LoadInputs(const Slice& s, Vec<T> D, Vec<T> bias, int64_t channel, int64_t channels,
                int64_t t0, int64_t steps, BlockInputs<T>& to) {
  const Operands& o = s.p.operands;
  const Place at = s.Sequence(channel, t0);
  Vec<T>*delta = to.delta, *source = to.source, *y = to.y, *gate = to.gate, *slope = to.slope;
  const Rows<T> u = to.u = ReadTile<T>(o.u, at, steps, channels, to.u_scratch);
  const Rows<T> raw = ReadTile<T>(o.delta, at, steps, channels, delta);
  const Rows<T> z = gate ? ReadTile<T>(o.z, at, steps, channels, gate) : Rows<T>{};
  auto set = [=](int64_t t, Vec<T> step) {
    delta[t] = step;
    source[t] = step * u[t];
    if (y) y[t] = D * u[t];
  };
  if (gate)
    for (int64_t t = 0; t < steps; ++t) gate[t] = Silu<T>(z[t]);
  if (!s.p.delta_softplus) {
    for (int64_t t = 0; t < steps; ++t) {
      set(t, raw[t] + bias);
      if (slope) slope[t] = Splat(T(1));
    }
    return;
  }
  // In two loops: the longer the operations that wait for each other, the fewer steps a core has
  // under way. x goes from one to the other in delta: where rows lie far apart, raw would come from
  // L2 twice.
  for (int64_t t = 0; t < steps; ++t) {
    const Vec<T> x = delta[t] = raw[t] + bias;
    source[t] = ExpMinusMagnitude<T>(x);
  }
  for (int64_t t = 0; t < steps; ++t) {
    const Vec<T> x = delta[t], exp = source[t];
    if (slope) slope[t] = SoftplusSlope<T>(x, exp);
    set(t, Softplus<T>(x, exp));
  }
}

// Where every step restarts, nothing decays: y = D u + delta u sum C B, which needs neither A nor a
// state. Steps are independent, so that the inner loops run over the channels of one, which lie
// next to each other (FoldRows sees to that).
template <typename N>
void ForwardWithoutDecay(const Forward& p, const Tasks& tasks, int64_t task) {
  using T = typename N::Scalar;
  using V = Vec<T>;
  constexpr int kWidth = kLanes<T>;
  Slice s(p, tasks, task);
  const Operands& o = p.operands;
  const int64_t blocks = s.Blocks<kWidth>(), dstate = p.dstate;

  Scratch scratch;
  auto take_run = [&] {
    V* run = scratch.Take<V>(blocks);
    std::fill_n(run, blocks, V{});
    return run;
  };
  V *u_scratch = take_run(), *raw_scratch = take_run(), *z_scratch = take_run(),
    *out_scratch = take_run(), *ungated_scratch = take_run(), *D_scratch = take_run(),
    *bias_scratch = take_run(), *exp = take_run(), *gate = take_run();
  Projections<N> projections(s, 1, scratch);
  auto read = [&](const Array& from, const Place& at, V* run) {
    return from ? ReadRun<T>(from, at.offset, s.dim, run) : RunOf<T>(run);
  };
  const Rows<T> D = read(o.D, s.Vector(s.begin), D_scratch);
  const Rows<T> bias = read(o.delta_bias, s.Vector(s.begin), bias_scratch);
  const bool softplus = p.delta_softplus;

  auto run_step = [&](int64_t t, auto B, auto C) {
    constexpr bool kSame = decltype(B)::kIsVarying && decltype(C)::kIsVarying;  // for all channels
    const Place at = s.Sequence(s.begin, t);
    const Rows<T> u = read(o.u, at, u_scratch), raw = read(o.delta, at, raw_scratch);
    const Rows<T> z = read(o.z, at, z_scratch);
    const WritableRows<T> out = WriteRun<T>(p.out, at.offset, s.dim, out_scratch);
    const WritableRows<T> ungated = WriteRun<T>(p.ungated, at.offset, s.dim, ungated_scratch);
    V product;
    auto set_product = [&](int64_t b) {
      product = V{};
      const auto B_t = B.From(0, b * dstate), C_t = C.From(0, b * dstate);
      for (int64_t n = 0; n < dstate; ++n) product += RealOfProduct(C_t[n], B_t[n]);
      if (N::kComplex) product += product;
    };
    if (kSame) set_product(0);
    // In several loops: the longer the operations that wait for each other, the fewer blocks a core
    // has under way.
    for (int64_t b = 0; o.z && b < blocks; ++b) gate[b] = Silu<T>(z[b]);
    for (int64_t b = 0; softplus && b < blocks; ++b)
      exp[b] = ExpMinusMagnitude<T>(raw[b] + bias[b]);
    for (int64_t b = 0; b < blocks; ++b) {
      if (!kSame) set_product(b);
      const V x = raw[b] + bias[b], delta = softplus ? Softplus<T>(x, exp[b]) : x;
      const V y = (D[b] + product * delta) * u[b];
      if (p.ungated) ungated.Set(b, y);
      out.Set(b, o.z ? y * gate[b] : y);
    }
    FinishRun<T>(out_scratch, p.out, at.offset, s.dim);
    if (p.ungated) FinishRun<T>(ungated_scratch, p.ungated, at.offset, s.dim);
  };

  for (s.batch = s.first_row; s.batch < s.last_row; ++s.batch)
    for (int64_t t = 0; t < p.length; ++t) {
      projections.Read(t, 1);
      projections.With(0, [&](auto B, auto C) { run_step(t, B, C); });
    }
}

template <typename N>
void ForwardTask(const Forward& p, const Tasks& tasks, int64_t task) {
  using T = typename N::Scalar;
  using V = Vec<T>;
  constexpr int kWidth = kLanes<T>;
  Slice s(p, tasks, task);
  const Operands& o = p.operands;
  const int64_t blocks = s.Blocks<kWidth>(), dstate = p.dstate;

  Scratch scratch;
  N* state = scratch.Take<N>(blocks * dstate);
  N* rate = scratch.Take<N>(blocks * dstate);
  Projections<N> projections(s, p.chunk, scratch);
  BlockInputs<T> in{scratch.Take<V>(p.chunk),
                    scratch.Take<V>(p.chunk),
                    scratch.Take<V>(p.chunk),
                    scratch.Take<V>(p.chunk),
                    o.z ? scratch.Take<V>(p.chunk) : nullptr,
                    nullptr};
  V* D = scratch.Take<V>(blocks);
  V* bias = scratch.Take<V>(blocks);
  bool* restarts = scratch.Take<bool>(p.chunk);

  s.EachBlock<kWidth>([&](int64_t b, int64_t channel, int64_t channels) {
    LoadNumbers(o.A, s.Weight(channel), dstate, channels, rate + b * dstate);
    for (int64_t n = 0; n < dstate; ++n) rate[b * dstate + n] = Rate(rate[b * dstate + n]);
    D[b] = bias[b] = V{};
    if (o.D) LoadTile<T>(o.D, s.Vector(channel), 1, channels, D + b);
    if (o.delta_bias) LoadTile<T>(o.delta_bias, s.Vector(channel), 1, channels, bias + b);
    // y = 2 Re sum C h for complex numbers: the walk makes half of it.
    if (N::kComplex) D[b] = T(0.5) * D[b];
  });

  auto run_block = [&](const Walk& walk, int64_t b, const Prefetch& next, auto B, auto C) {
    const N* A = rate + b * dstate;
    N* h = state + b * dstate;
    const V *deltas = in.delta, *sources = in.source;
    V* y = in.y;
    ForGroups<kGroup<N>>(dstate, [=, &next](int64_t n0, auto count) {
      constexpr int kCount = decltype(count)::value;
      N rates[kCount], states[kCount];
#pragma GCC unroll 8
      for (int n = 0; n < kCount; ++n) rates[n] = A[n0 + n], states[n] = h[n0 + n];
      for (int64_t i = 0; i < walk.steps; ++i) {
        const int64_t t = walk.Row(i);
        if (n0 == 0) next.Row(i);
        const V delta = deltas[t], source = sources[t];
        const auto B_t = B.From(t, n0);
        const auto C_t = C.From(t, n0);
        const bool restart = restarts[t];
        V sum = y[t];
#pragma GCC unroll 8
        for (int n = 0; n < kCount; ++n) {
          const N added = B_t[n] * source;
          // A restart needs no decay, and lets not even NaN pass.
          states[n] = restart ? added : Decay<T>(rates[n], delta) * states[n] + added;
          sum += RealOfProduct(C_t[n], states[n]);
        }
        y[t] = sum;
      }
#pragma GCC unroll 8
      for (int n = 0; n < kCount; ++n) h[n0 + n] = states[n];
    });
  };

  auto run_chunk = [&](int64_t chunk, bool from_start) {
    const int64_t t0 = chunk * p.chunk;
    const Walk walk{std::min(p.chunk, p.length - t0), p.reverse};
    projections.Read(t0, walk.steps);
    for (int64_t t = 0; t < walk.steps; ++t) restarts[t] = s.Restarts(t0 + t);
    s.EachBlock<kWidth>([&](int64_t b, int64_t channel, int64_t channels) {
      if (p.states && !from_start)
        StoreNumbers(state + b * dstate, dstate, channels, p.states, s.Saved(channel, chunk));
      LoadInputs<T>(s, D[b], bias[b], channel, channels, t0, walk.steps, in);
      const Place at = s.Sequence(channel, t0);
      const Prefetch next = NextBlock<T>(s, b, t0, p.reverse ? -p.chunk : p.chunk,
                                         {o.u, o.delta, o.z, p.out, p.ungated});
      projections.With(b, [&](auto B, auto C) { run_block(walk, b, next, B, C); });
      const V *y = in.y, *gate = in.gate;
      const WritableRows<T> out = WriteTile<T>(p.out, at, channels, in.y);
      // The walk has no more need of delta.
      const WritableRows<T> ungated = WriteTile<T>(p.ungated, at, channels, in.delta);
      for (int64_t t = 0; t < walk.steps; ++t) {
        const V whole = N::kComplex ? T(2) * y[t] : y[t];
        if (p.ungated) ungated.Set(t, whole);
        out.Set(t, gate ? whole * gate[t] : whole);
      }
      FinishTile<T>(in.y, walk.steps, channels, p.out, at);
      if (p.ungated) FinishTile<T>(in.delta, walk.steps, channels, p.ungated, at);
    });
  };

  const int64_t chunks = p.num_chunks();
  for (s.batch = s.first_row; s.batch < s.last_row; ++s.batch) {
    s.EachBlock<kWidth>([&](int64_t b, int64_t channel, int64_t channels) {
      if (o.initial_state)
        LoadNumbers(o.initial_state, s.State(channel), dstate, channels, state + b * dstate);
      else
        std::fill_n(state + b * dstate, dstate, N{});
    });
    for (int64_t i = 0; i < chunks; ++i)
      run_chunk(p.reverse ? chunks - 1 - i : i, i == 0 || p.restart_every);
    if (!p.last_state) continue;
    s.EachBlock<kWidth>([&](int64_t b, int64_t channel, int64_t channels) {
      StoreNumbers(state + b * dstate, dstate, channels, p.last_state, s.State(channel));
    });
  }
}

// The scratch of the reverse walk over one block and chunk.
template <typename N>
struct History {
  N* states;  // (1 + steps, kGroup): the entry state, then the state after each step
  N* decays;  // (steps, kGroup)
};

template <typename N>
void BackwardTask(const Backward& p, const Tasks& tasks, const Workspace& workspace, int64_t task) {
  using T = typename N::Scalar;
  using V = Vec<T>;
  constexpr int kWidth = kLanes<T>;
  constexpr int kMost = kGroup<N>;
  Slice s(p, tasks, task);
  const Operands& o = p.operands;
  const int64_t blocks = s.Blocks<kWidth>(), dstate = p.dstate;
  const int64_t channel_states = blocks * dstate;

  Scratch scratch;
  N* adjoint = scratch.Take<N>(channel_states);  // decay times adjoint of the step processed last
  N* A = scratch.Take<N>(channel_states);
  N* dA = scratch.Take<N>(channel_states);
  Projections<N> projections(s, p.chunk, scratch);
  N* entry = scratch.Take<N>(dstate);
  // Sums over time for a fixed B or C, over the blocks of a chunk for a varying one.
  const int64_t dB_count = p.B_varies ? p.chunk * dstate : channel_states;
  const int64_t dC_count = p.C_varies ? p.chunk * dstate : channel_states;
  N* dB = scratch.Take<N>(dB_count);
  N* dC = scratch.Take<N>(dC_count);
  V* rows = scratch.Take<V>(9 * p.chunk);
  auto take_rows = [&] {
    V* first = rows;
    rows += p.chunk;
    return first;
  };
  BlockInputs<T> in{take_rows(), take_rows(), take_rows(), nullptr, nullptr, take_rows()};
  V *dy = take_rows(), *d_z = take_rows(), *d_delta = take_rows(), *d_source = take_rows(),
    *d_u = take_rows();
  History<N> history{scratch.Take<N>((p.chunk + 1) * kMost), scratch.Take<N>(p.chunk * kMost)};
  V* D = scratch.Take<V>(blocks);
  V* bias = scratch.Take<V>(blocks);
  V* dD = scratch.Take<V>(blocks);
  V* d_bias = scratch.Take<V>(blocks);
  bool* restarts = scratch.Take<bool>(p.chunk);
  std::fill_n(dA, channel_states, N{});
  if (!p.B_varies) std::fill_n(dB, dB_count, N{});
  if (!p.C_varies) std::fill_n(dC, dC_count, N{});
  std::fill_n(dD, blocks, V{});
  std::fill_n(d_bias, blocks, V{});

  s.EachBlock<kWidth>([&](int64_t b, int64_t channel, int64_t channels) {
    LoadNumbers(o.A, s.Weight(channel), dstate, channels, A + b * dstate);
    D[b] = bias[b] = V{};
    if (o.D) LoadTile<T>(o.D, s.Vector(channel), 1, channels, D + b);
    if (o.delta_bias) LoadTile<T>(o.delta_bias, s.Vector(channel), 1, channels, bias + b);
  });

  auto run_block = [&](const Walk& walk, int64_t b, const Prefetch& next, auto B, auto C) {
    constexpr bool kBVaries = decltype(B)::kIsVarying, kCVaries = decltype(C)::kIsVarying;
    ForGroups<kMost>(dstate, [&](int64_t n0, auto count) {
      constexpr int kCount = decltype(count)::value;
      const int64_t first = b * dstate + n0;
      N rates[kCount],
          values[kCount];  // values: states on the way forward, adjoints on the way back
#pragma GCC unroll 8
      for (int n = 0; n < kCount; ++n) {
        rates[n] = Rate(A[first + n]);
        values[n] = history.states[n] = entry[n0 + n];
      }
      for (int64_t i = 0; i < walk.steps; ++i) {
        const int64_t t = walk.Row(i);
        if (n0 == 0) next.Row(i);
        const V delta = in.delta[t], source = in.source[t];
        const auto B_t = B.From(t, n0);
        N* after = history.states + (i + 1) * kCount;
        N* decays = history.decays + i * kCount;
        if (restarts[t]) {
#pragma GCC unroll 8
          for (int n = 0; n < kCount; ++n) {
            values[n] = B_t[n] * source;
            decays[n] = N{};
          }
        } else {
#pragma GCC unroll 8
          for (int n = 0; n < kCount; ++n) {
            decays[n] = Decay<T>(rates[n], delta);
            values[n] = decays[n] * values[n] + B_t[n] * source;
          }
        }
#pragma GCC unroll 8
        for (int n = 0; n < kCount; ++n) after[n] = values[n];
      }

      N sums[kCount];
#pragma GCC unroll 8
      for (int n = 0; n < kCount; ++n) {
        rates[n] = A[first + n];
        values[n] = adjoint[first + n];
        sums[n] = dA[first + n];
      }
      for (int64_t i = walk.steps - 1; i >= 0; --i) {
        const int64_t t = walk.Row(i);
        const V delta = in.delta[t], source = in.source[t], cotangent = dy[t];
        const auto B_t = B.From(t, n0);
        const auto C_t = C.From(t, n0);
        V delta_sum = d_delta[t], source_sum = d_source[t];
        const N* before = history.states + i * kCount;
        const N* after = before + kCount;
        const N* decays = history.decays + i * kCount;
        const bool restart = restarts[t];
#pragma GCC unroll 8
        for (int n = 0; n < kCount; ++n) {
          const N lambda = values[n] + C_t[n] * cotangent;
          N& to_C = dC[kCVaries ? t * dstate + n0 + n : first + n];
          to_C = to_C + after[n] * cotangent;
          N& to_B = dB[kBVaries ? t * dstate + n0 + n : first + n];
          to_B = to_B + lambda * source;
          source_sum += RealOfProduct(lambda, B_t[n]);
          values[n] = decays[n] * lambda;
          const N d_exponent = values[n] * before[n];
          if (!restart) {
            delta_sum += RealOfProduct(d_exponent, rates[n]);
            sums[n] = sums[n] + d_exponent * delta;
          }
        }
        if (restart)
#pragma GCC unroll 8
          for (int n = 0; n < kCount; ++n) values[n] = N{};
        d_delta[t] = delta_sum;
        d_source[t] = source_sum;
      }
#pragma GCC unroll 8
      for (int n = 0; n < kCount; ++n) {
        adjoint[first + n] = values[n];
        dA[first + n] = sums[n];
      }
    });
  };

  // A varying gradient's sum over the lanes of a vector, into this task's partial sums.
  auto store_partial = [&](const N* from, char* to, int64_t t0, int64_t steps) {
    const int64_t step = (s.batch * tasks.slices + s.slice) * p.length + t0;
    LaneSums<T>(reinterpret_cast<const V*>(from), steps * dstate * N::kParts,
                reinterpret_cast<T*>(to) + step * dstate * N::kParts);
  };

  auto run_chunk = [&](int64_t chunk, bool from_start) {
    const int64_t t0 = chunk * p.chunk;
    const Walk walk{std::min(p.chunk, p.length - t0), p.reverse};
    projections.Read(t0, walk.steps);
    if (p.B_varies) std::fill_n(dB, walk.steps * dstate, N{});
    if (p.C_varies) std::fill_n(dC, walk.steps * dstate, N{});
    for (int64_t t = 0; t < walk.steps; ++t) restarts[t] = s.Restarts(t0 + t);
    s.EachBlock<kWidth>([&](int64_t b, int64_t channel, int64_t channels) {
      const Place at = s.Sequence(channel, t0);
      if (!from_start)
        LoadNumbers(p.states, s.Saved(channel, chunk), dstate, channels, entry);
      else if (o.initial_state)
        LoadNumbers(o.initial_state, s.State(channel), dstate, channels, entry);
      else
        std::fill_n(entry, dstate, N{});
      LoadInputs<T>(s, D[b], bias[b], channel, channels, t0, walk.steps, in);
      const Rows<T> d_out = ReadTile<T>(p.out_cotangent, at, walk.steps, channels, dy);
      if (o.z) {
        const Rows<T> z_rows = ReadTile<T>(o.z, at, walk.steps, channels, d_z);
        const Rows<T> ungated = ReadTile<T>(p.ungated, at, walk.steps, channels, d_u);
        const WritableRows<T> to_z = WriteTile<T>(p.cotangents.z, at, channels, d_z);
        for (int64_t t = 0; t < walk.steps; ++t) {
          const V z = z_rows[t], sigmoid = Sigmoid<T>(z), d = d_out[t];
          const V slope = sigmoid * (T(1) + z * (T(1) - sigmoid));  // of silu
          to_z.Set(t, d * slope * ungated[t]);
          dy[t] = d * (z * sigmoid);
        }
        FinishTile<T>(d_z, walk.steps, channels, p.cotangents.z, at);
      } else {
        for (int64_t t = 0; t < walk.steps; ++t) dy[t] = d_out[t];
      }
      const Prefetch next = NextBlock<T>(s, b, t0, p.reverse ? p.chunk : -p.chunk,
                                         {o.u, o.delta, o.z, p.ungated, p.out_cotangent,
                                          p.cotangents.u, p.cotangents.delta, p.cotangents.z});
      // y = 2 Re sum C h for complex numbers: the walk sees its cotangent doubled.
      if constexpr (N::kComplex)
        for (int64_t t = 0; t < walk.steps; ++t) dy[t] = T(2) * dy[t];
      std::fill_n(d_delta, walk.steps, V{});
      std::fill_n(d_source, walk.steps, V{});
      projections.With(b, [&](auto B, auto C) { run_block(walk, b, next, B, C); });

      V D_sum = dD[b], bias_sum = d_bias[b];
      const WritableRows<T> to_u = WriteTile<T>(p.cotangents.u, at, channels, d_u);
      const WritableRows<T> to_delta = WriteTile<T>(p.cotangents.delta, at, channels, d_delta);
      for (int64_t t = 0; t < walk.steps; ++t) {
        const V u = in.u[t], d_y = N::kComplex ? T(0.5) * dy[t] : dy[t];
        to_u.Set(t, d_source[t] * in.delta[t] + D[b] * d_y);
        D_sum += d_y * u;
        const V d_raw = (d_delta[t] + d_source[t] * u) * in.slope[t];
        to_delta.Set(t, d_raw);
        bias_sum += d_raw;
      }
      dD[b] = D_sum;
      d_bias[b] = bias_sum;
      FinishTile<T>(d_u, walk.steps, channels, p.cotangents.u, at);
      FinishTile<T>(d_delta, walk.steps, channels, p.cotangents.delta, at);
    });
    if (p.B_varies) store_partial(dB, workspace.B, t0, walk.steps);
    if (p.C_varies) store_partial(dC, workspace.C, t0, walk.steps);
  };

  const int64_t chunks = p.num_chunks();
  for (s.batch = s.first_row; s.batch < s.last_row; ++s.batch) {
    s.EachBlock<kWidth>([&](int64_t b, int64_t channel, int64_t channels) {
      if (p.last_state_cotangent)
        LoadNumbers(p.last_state_cotangent, s.State(channel), dstate, channels,
                    adjoint + b * dstate);
      else
        std::fill_n(adjoint + b * dstate, dstate, N{});
    });
    for (int64_t i = chunks - 1; i >= 0; --i)
      run_chunk(p.reverse ? chunks - 1 - i : i, i == 0 || p.restart_every);
    if (!o.initial_state) continue;
    s.EachBlock<kWidth>([&](int64_t b, int64_t channel, int64_t channels) {
      StoreNumbers(adjoint + b * dstate, dstate, channels, p.cotangents.initial_state,
                   s.State(channel));
    });
  }

  const DataType real = ffi::ToReal(p.state);
  s.EachBlock<kWidth>([&](int64_t b, int64_t channel, int64_t channels) {
    const Place weight{(s.part * p.dim + channel) * dstate, 1, dstate};
    const Place per_channel{s.part * p.dim + channel, 0, 1};
    auto store = [&](const N* from, char* to) {
      StoreNumbers(from + b * dstate, dstate, channels, Array{to, p.state}, weight);
    };
    store(dA, workspace.A);
    if (!p.B_varies) store(dB, workspace.B);
    if (!p.C_varies) store(dC, workspace.C);
    if (o.D) StoreTile<T>(dD + b, 1, channels, Array{workspace.D, real}, per_channel);
    if (o.delta_bias)
      StoreTile<T>(d_bias + b, 1, channels, Array{workspace.delta_bias, real}, per_channel);
  });
}

// to[i] = sum over k of from[k * stride + i], in the order of k.
template <typename T>
void SumRows(const T* from, int64_t rows, int64_t stride, int64_t count, T* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[i];
  for (int64_t k = 1; k < rows; ++k)
    for (int64_t i = 0; i < count; ++i) to[i] += from[k * stride + i];
}

template <typename N>
void ReducePart(const Backward& p, const Tasks& tasks, const Workspace& workspace, int64_t part) {
  using T = typename N::Scalar;
  const int64_t dstate = p.dstate * N::kParts;
  if (part == 0) {
    auto reduce = [&](const char* partial, const Array& to, int64_t count) {
      const int64_t rows = tasks.parts_per_instance;
      for (int64_t i = 0; i < p.instances; ++i)
        SumRows(reinterpret_cast<const T*>(partial) + i * rows * count, rows, count, count,
                static_cast<T*>(to.data) + i * count);
    };
    reduce(workspace.A, p.cotangents.A, p.dim * dstate);
    if (!p.B_varies) reduce(workspace.B, p.cotangents.B, p.dim * dstate);
    if (!p.C_varies) reduce(workspace.C, p.cotangents.C, p.dim * dstate);
    if (p.operands.D) reduce(workspace.D, p.cotangents.D, p.dim);
    if (p.operands.delta_bias) reduce(workspace.delta_bias, p.cotangents.delta_bias, p.dim);
    return;
  }
  const int64_t row = (part - 1) % p.batch, begin = (part - 1) / p.batch * tasks.reduce_steps;
  const int64_t end = std::min(p.length, begin + tasks.reduce_steps);
  Scratch scratch;
  T* sum = scratch.Take<T>(dstate);
  auto reduce = [&](const char* partial, Array to) {
    // A complex result is written as the reals it is made of.
    if (N::kComplex) to.dtype = ffi::ToReal(p.state);
    for (int64_t g = 0; g < p.groups; ++g) {
      const T* first = reinterpret_cast<const T*>(partial) +
                       (row * tasks.slices + g * tasks.slices_per_group) * p.length * dstate;
      for (int64_t t = begin; t < end; ++t) {
        SumRows(first + t * dstate, tasks.slices_per_group, p.length * dstate, dstate, sum);
        if (p.channel_last) {
          FromReal(sum, dstate, to, ((row * p.length + t) * p.groups + g) * dstate);
        } else {
          for (int64_t n = 0; n < p.dstate; ++n)
            FromReal(sum + n * N::kParts, N::kParts, to,
                     (((row * p.groups + g) * p.dstate + n) * p.length + t) * N::kParts);
        }
      }
    }
  };
  if (p.B_varies) reduce(workspace.B, p.cotangents.B);
  if (p.C_varies) reduce(workspace.C, p.cotangents.C);
}

// Calls run with the number type of the problem's state.
template <typename Run>
void WithNumber(const Problem& p, Run run) {
  switch (p.state) {
    case DataType::F32:
      return run(Real<float>{});
    case DataType::F64:
      return run(Real<double>{});
    case DataType::C64:
      return run(Complex<float>{});
    default:
      return run(Complex<double>{});
  }
}

void RunForward(const Forward& p, const Tasks& tasks, int64_t task) {
  WithNumber(p, [&](auto number) {
    if (p.restart_every == 1)
      ForwardWithoutDecay<decltype(number)>(p, tasks, task);
    else
      ForwardTask<decltype(number)>(p, tasks, task);
  });
}
void RunBackward(const Backward& p, const Tasks& tasks, const Workspace& workspace, int64_t task) {
  WithNumber(p, [&](auto number) { BackwardTask<decltype(number)>(p, tasks, workspace, task); });
}
void RunReduce(const Backward& p, const Tasks& tasks, const Workspace& workspace, int64_t part) {
  WithNumber(p, [&](auto number) { ReducePart<decltype(number)>(p, tasks, workspace, part); });
}

}  // namespace

extern const Kernels JAX_SSCAN_KERNELS;
const Kernels JAX_SSCAN_KERNELS = {JAX_SSCAN_TARGET_NAME, RunForward, RunBackward, RunReduce};

}  // namespace jax_sscan::cpu
