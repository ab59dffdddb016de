// The CPU kernels of the selective scan, for one instruction set (see vector.h).
//
// What it computes: the forward pass, saving the state at the start of every chunk, and the
// backward pass, which walks the chunks in reverse, recomputes a chunk's states from the saved one,
// and carries the adjoint.
//
// How work maps: a task is one batch row and one slice of channels. Vector lanes hold neighbouring
// channels (a block); time runs sequentially. Chunks are the outer loop and blocks the inner one,
// so that B and C of a chunk are converted once for all blocks. Within a block, states go in groups
// of kGroup, whose states and rates A stay in registers over all steps of the chunk.
//
// What lives where: per block and chunk, delta, delta u and the output in 3 * chunk vectors of
// scratch; the backward pass adds the history of one group (states and decays, 2 * chunk * kGroup
// vectors) and the partial sums for dB and dC (2 * chunk * dstate vectors, shared by the blocks of
// a task). All of it fits the L2 cache.
//
// Cost per (step, state) of a vector of channels: forward one Exp2 (13 operations), a multiply and
// two FMAs; backward the same again, then about nine multiplies and FMAs in the reverse walk, with
// no second Exp2.

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>

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
// Element types of sequences: conversion of a vector of them to and from the compute type T.

template <typename T>
using Halves = uint16_t __attribute__((vector_size(JAX_SSCAN_VECTOR_BYTES / sizeof(T) * 2)));

inline float FromBits(uint32_t bits) { return BitCast<float>(bits); }

inline float FloatFromHalf(uint16_t half) {
  uint32_t sign = uint32_t(half & 0x8000) << 16, rest = half & 0x7fff;
  if (rest >= 0x7c00) return FromBits(sign | 0x7f800000 | (rest << 13));
  return FromBits(sign |
                  BitCast<uint32_t>(FromBits(rest << 13) * FromBits(0x77800000)));  // * 2^112
}

inline uint16_t HalfFromFloat(float x) {
  uint32_t bits = BitCast<uint32_t>(x), sign = (bits >> 16) & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (rest >= 0x477ff000) return uint16_t(sign | 0x7c00);  // rounds to infinity
  if (rest < 0x38800000) {                                 // subnormal: let an addition round it
    float shifted = FromBits(rest) + 0.5f;
    return uint16_t(sign | (BitCast<uint32_t>(shifted) - 0x3f000000));
  }
  return uint16_t(sign | ((rest + 0xfff + ((rest >> 13) & 1) - 0x38000000) >> 13));
}

inline float FloatFromBfloat(uint16_t x) { return FromBits(uint32_t(x) << 16); }

inline uint16_t BfloatFromFloat(float x) {
  uint32_t bits = BitCast<uint32_t>(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t((bits >> 16) | 0x40);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Copies count numbers between an element type and T; simple loops that the compiler vectorises.
template <typename T>
inline void ToReal(const Array& from, int64_t offset, int64_t count, T* to) {
  switch (from.dtype) {
    case DataType::F32: {
      const float* p = static_cast<const float*>(from.data) + offset;
      for (int64_t i = 0; i < count; ++i) to[i] = T(p[i]);
      break;
    }
    case DataType::F64: {
      const double* p = static_cast<const double*>(from.data) + offset;
      for (int64_t i = 0; i < count; ++i) to[i] = T(p[i]);
      break;
    }
    case DataType::BF16: {
      const uint16_t* p = static_cast<const uint16_t*>(from.data) + offset;
      for (int64_t i = 0; i < count; ++i) to[i] = T(FloatFromBfloat(p[i]));
      break;
    }
    default: {
      const uint16_t* p = static_cast<const uint16_t*>(from.data) + offset;
      for (int64_t i = 0; i < count; ++i) to[i] = T(FloatFromHalf(p[i]));
      break;
    }
  }
}

template <typename T>
inline void FromReal(const T* from, int64_t count, const Array& to, int64_t offset) {
  switch (to.dtype) {
    case DataType::F32: {
      float* p = static_cast<float*>(to.data) + offset;
      for (int64_t i = 0; i < count; ++i) p[i] = float(from[i]);
      break;
    }
    case DataType::F64: {
      double* p = static_cast<double*>(to.data) + offset;
      for (int64_t i = 0; i < count; ++i) p[i] = double(from[i]);
      break;
    }
    case DataType::BF16: {
      uint16_t* p = static_cast<uint16_t*>(to.data) + offset;
      for (int64_t i = 0; i < count; ++i) p[i] = BfloatFromFloat(float(from[i]));
      break;
    }
    default: {
      uint16_t* p = static_cast<uint16_t*>(to.data) + offset;
      for (int64_t i = 0; i < count; ++i) p[i] = HalfFromFloat(float(from[i]));
      break;
    }
  }
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

template <typename T>
void LoadTile(const Array& from, const Place& at, int64_t rows, int64_t channels, Vec<T>* to) {
  constexpr int kWidth = kLanes<T>;
  T* out = reinterpret_cast<T*>(to);
  if (at.channel_stride == 1) {
    for (int64_t r = 0; r < rows; ++r) {
      T* row = out + r * kWidth;
      if (channels < kWidth) to[r] = Vec<T>{};
      if (channels == kWidth)
        ToReal(from, at.offset + r * at.row_stride, kWidth, row);
      else
        ToReal(from, at.offset + r * at.row_stride, channels, row);
    }
    return;
  }
  for (int64_t begin = 0; begin < rows; begin += kWidth) {
    int64_t count = std::min<int64_t>(kWidth, rows - begin);
    Vec<T> square[kWidth] = {};
    for (int64_t c = 0; c < channels; ++c) {
      int64_t offset = at.offset + c * at.channel_stride + begin * at.row_stride;
      T* row = reinterpret_cast<T*>(&square[c]);
      if (at.row_stride != 1)
        for (int64_t i = 0; i < count; ++i) ToReal(from, offset + i * at.row_stride, 1, row + i);
      else if (count == kWidth)
        ToReal(from, offset, kWidth, row);
      else
        ToReal(from, offset, count, row);
    }
    Transpose<T>(square);
    for (int64_t i = 0; i < count; ++i) to[begin + i] = square[i];
  }
}

template <typename T>
void StoreTile(const Vec<T>* from, int64_t rows, int64_t channels, const Array& to,
               const Place& at) {
  constexpr int kWidth = kLanes<T>;
  if (at.channel_stride == 1) {
    const T* in = reinterpret_cast<const T*>(from);
    for (int64_t r = 0; r < rows; ++r)
      FromReal(in + r * kWidth, channels, to, at.offset + r * at.row_stride);
    return;
  }
  for (int64_t begin = 0; begin < rows; begin += kWidth) {
    int64_t count = std::min<int64_t>(kWidth, rows - begin);
    Vec<T> square[kWidth] = {};
    for (int64_t i = 0; i < count; ++i) square[i] = from[begin + i];
    Transpose<T>(square);
    for (int64_t c = 0; c < channels; ++c) {
      int64_t offset = at.offset + c * at.channel_stride + begin * at.row_stride;
      const T* row = reinterpret_cast<const T*>(&square[c]);
      if (at.row_stride != 1)
        for (int64_t i = 0; i < count; ++i) FromReal(row + i, 1, to, offset + i * at.row_stride);
      else
        FromReal(row, count, to, offset);
    }
  }
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

// Scratch memory of one task, aligned to vectors.
class Scratch {
 public:
  template <typename V>
  V* Take(int64_t count) {
    size_t bytes = std::max<size_t>(1, size_t(count)) * sizeof(V);
    bytes = (bytes + 63) / 64 * 64;
    void* p = std::aligned_alloc(64, bytes);
    if (!p) throw std::bad_alloc();
    blocks_[used_++].reset(p);
    return static_cast<V*>(p);
  }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> blocks_[24];
  int used_ = 0;
};

// ---------------------------------------------------------------------------------------------------------
// One task's view of the problem.

struct Slice {
  Slice(const Problem& p, const Tasks& tasks, int64_t task)
      : p(p),
        batch(task / tasks.slices),
        slice(task % tasks.slices),
        group(slice / tasks.slices_per_group) {
    int64_t begin_in_group = slice % tasks.slices_per_group * tasks.slice_dim;
    begin = group * p.group_dim() + begin_in_group;
    dim = std::min(tasks.slice_dim, p.group_dim() - begin_in_group);
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
  Place Saved(int64_t channel, int64_t chunk) const {
    return {(batch * p.num_chunks() + chunk) * p.dstate * p.dim + channel, p.dim, 1};
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
    if (!p.operands.segment_ids) return false;
    const int32_t* ids =
        static_cast<const int32_t*>(p.operands.segment_ids.data) + batch * p.length;
    int64_t previous = p.reverse ? t + 1 : t - 1;
    return previous >= 0 && previous < p.length && ids[t] != ids[previous];
  }

  const Problem& p;
  int64_t batch, slice, group, begin, dim;
};

// Loads varying B or C of a chunk into (steps, dstate) reals or pairs of reals.
template <typename N>
void LoadProjection(const Slice& s, const Array& from, int64_t t0, int64_t steps,
                    typename N::Scalar* to) {
  using T = typename N::Scalar;
  auto at = s.Projection();
  int64_t dstate = s.p.dstate;
  if constexpr (N::kComplex) {
    const T* data = static_cast<const T*>(from.data);
    for (int64_t t = 0; t < steps; ++t)
      for (int64_t n = 0; n < dstate; ++n) {
        int64_t i = 2 * (at.offset + (t0 + t) * at.time + n * at.state);
        to[2 * (t * dstate + n)] = data[i];
        to[2 * (t * dstate + n) + 1] = data[i + 1];
      }
  } else if (at.state == 1) {
    for (int64_t t = 0; t < steps; ++t)
      ToReal(from, at.offset + (t0 + t) * at.time, dstate, to + t * dstate);
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
          std::memcpy(to + (t + i) * dstate + n, &tile[i], states * sizeof(T));
      }
  }
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
// vector per state.
template <typename N, bool kVaries>
struct Projection {
  using T = typename N::Scalar;
  static constexpr bool kIsVarying = kVaries;
  const T* varying;  // (steps, dstate)
  const N* fixed;    // (dstate)
  int64_t dstate;
  N At(int64_t t, int64_t n) const {
    if constexpr (kVaries)
      return Broadcast<N>(varying + (t * dstate + n) * N::kParts);
    else
      return fixed[n];
  }
};

// The steps of one chunk in processing order: step i is row Row(i).
struct Walk {
  int64_t steps;
  bool reverse;
  int64_t Row(int64_t i) const { return reverse ? steps - 1 - i : i; }
};

// delta after bias and softplus and its derivative's factor, delta u, from the operands of one
// block.
template <typename T>
struct BlockInputs {
  Vec<T>*u, *delta, *source,
      *slope;  // rows; slope (d delta / d raw delta) is null in the forward pass
};

template <typename T>
void LoadInputs(const Slice& s, int64_t channel, int64_t channels, int64_t t0, int64_t steps,
                const BlockInputs<T>& to) {
  const Operands& o = s.p.operands;
  Place at = s.Sequence(channel, t0);
  LoadTile<T>(o.u, at, steps, channels, to.u);
  LoadTile<T>(o.delta, at, steps, channels, to.delta);
  Vec<T> bias{};
  if (o.delta_bias) LoadTile<T>(o.delta_bias, s.Vector(channel), 1, channels, &bias);
  for (int64_t t = 0; t < steps; ++t) {
    Vec<T> raw = to.delta[t] + bias;
    if (to.slope)
      to.slope[t] =
          s.p.delta_softplus ? (raw > T(20) ? Splat(T(1)) : Sigmoid<T>(raw)) : Splat(T(1));
    if (s.p.delta_softplus) raw = Softplus<T>(raw);
    to.delta[t] = raw;
    to.source[t] = raw * to.u[t];
  }
}

template <typename N>
void ForwardTask(const Forward& p, const Tasks& tasks, int64_t task) {
  using T = typename N::Scalar;
  using V = Vec<T>;
  constexpr int kWidth = kLanes<T>;
  const Slice s(p, tasks, task);
  const Operands& o = p.operands;
  const int64_t blocks = (s.dim + kWidth - 1) / kWidth, dstate = p.dstate;

  Scratch scratch;
  N* state = scratch.Take<N>(blocks * dstate);
  N* rate = scratch.Take<N>(blocks * dstate);
  N* fixed_B = scratch.Take<N>(p.B_varies ? 0 : blocks * dstate);
  N* fixed_C = scratch.Take<N>(p.C_varies ? 0 : blocks * dstate);
  T* varying_B = scratch.Take<T>(p.B_varies ? p.chunk * dstate * N::kParts : 0);
  T* varying_C = scratch.Take<T>(p.C_varies ? p.chunk * dstate * N::kParts : 0);
  BlockInputs<T> in{scratch.Take<V>(p.chunk), scratch.Take<V>(p.chunk), scratch.Take<V>(p.chunk),
                    nullptr};
  V* y = scratch.Take<V>(p.chunk);
  V* gate = scratch.Take<V>(p.chunk);
  bool* restarts = scratch.Take<bool>(p.chunk);

  auto each_block = [&](auto body) {
    for (int64_t b = 0; b < blocks; ++b)
      body(b, s.begin + b * kWidth, std::min<int64_t>(kWidth, s.dim - b * kWidth));
  };
  each_block([&](int64_t b, int64_t channel, int64_t channels) {
    LoadNumbers(o.A, s.Weight(channel), dstate, channels, rate + b * dstate);
    for (int64_t n = 0; n < dstate; ++n) rate[b * dstate + n] = Rate(rate[b * dstate + n]);
    if (!p.B_varies) LoadNumbers(o.B, s.Weight(channel), dstate, channels, fixed_B + b * dstate);
    if (!p.C_varies) LoadNumbers(o.C, s.Weight(channel), dstate, channels, fixed_C + b * dstate);
    if (o.initial_state)
      LoadNumbers(o.initial_state, s.State(channel), dstate, channels, state + b * dstate);
    else
      std::fill_n(state + b * dstate, dstate, N{});
  });

  auto run_block = [&](const Walk& walk, int64_t b, auto B, auto C) {
    const N* A = rate + b * dstate;
    N* h = state + b * dstate;
    ForGroups<kGroup<N>>(dstate, [&](int64_t n0, auto count) {
      constexpr int kCount = decltype(count)::value;
      N rates[kCount], states[kCount];
#pragma GCC unroll 8
      for (int n = 0; n < kCount; ++n) rates[n] = A[n0 + n], states[n] = h[n0 + n];
      for (int64_t i = 0; i < walk.steps; ++i) {
        const int64_t t = walk.Row(i);
        if (restarts[t])
#pragma GCC unroll 8
          for (int n = 0; n < kCount; ++n) states[n] = N{};
        const V delta = in.delta[t], source = in.source[t];
        V sum = y[t];
#pragma GCC unroll 8
        for (int n = 0; n < kCount; ++n) {
          states[n] = Decay<T>(rates[n], delta) * states[n] + B.At(t, n0 + n) * source;
          sum += RealOfProduct(C.At(t, n0 + n), states[n]);
        }
        y[t] = sum;
      }
#pragma GCC unroll 8
      for (int n = 0; n < kCount; ++n) h[n0 + n] = states[n];
    });
  };

  const int64_t chunks = p.num_chunks();
  for (int64_t i = 0; i < chunks; ++i) {
    const int64_t chunk = p.reverse ? chunks - 1 - i : i, t0 = chunk * p.chunk;
    const Walk walk{std::min(p.chunk, p.length - t0), p.reverse};
    if (p.B_varies) LoadProjection<N>(s, o.B, t0, walk.steps, varying_B);
    if (p.C_varies) LoadProjection<N>(s, o.C, t0, walk.steps, varying_C);
    for (int64_t t = 0; t < walk.steps; ++t) restarts[t] = s.Restarts(t0 + t);
    each_block([&](int64_t b, int64_t channel, int64_t channels) {
      StoreNumbers(state + b * dstate, dstate, channels, p.states, s.Saved(channel, chunk));
      LoadInputs<T>(s, channel, channels, t0, walk.steps, in);
      std::fill_n(y, walk.steps, V{});
      const N *B = fixed_B + b * dstate, *C = fixed_C + b * dstate;
      if (p.B_varies && p.C_varies)
        run_block(walk, b, Projection<N, true>{varying_B, B, dstate},
                  Projection<N, true>{varying_C, C, dstate});
      else if (p.B_varies)
        run_block(walk, b, Projection<N, true>{varying_B, B, dstate},
                  Projection<N, false>{varying_C, C, dstate});
      else if (p.C_varies)
        run_block(walk, b, Projection<N, false>{varying_B, B, dstate},
                  Projection<N, true>{varying_C, C, dstate});
      else
        run_block(walk, b, Projection<N, false>{varying_B, B, dstate},
                  Projection<N, false>{varying_C, C, dstate});
      V D{};
      if (o.D) LoadTile<T>(o.D, s.Vector(channel), 1, channels, &D);
      if (o.z) LoadTile<T>(o.z, s.Sequence(channel, t0), walk.steps, channels, gate);
      for (int64_t t = 0; t < walk.steps; ++t) {
        V out = (N::kComplex ? T(2) * y[t] : y[t]) + D * in.u[t];
        y[t] = o.z ? out * (gate[t] * Sigmoid<T>(gate[t])) : out;
      }
      StoreTile<T>(y, walk.steps, channels, p.out, s.Sequence(channel, t0));
    });
  }
  each_block([&](int64_t b, int64_t channel, int64_t channels) {
    StoreNumbers(state + b * dstate, dstate, channels, p.last_state, s.State(channel));
  });
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
  const Slice s(p, tasks, task);
  const Operands& o = p.operands;
  const int64_t blocks = (s.dim + kWidth - 1) / kWidth, dstate = p.dstate;
  const int64_t channel_states = blocks * dstate;

  Scratch scratch;
  N* adjoint = scratch.Take<N>(channel_states);  // decay times adjoint of the step processed last
  N* A = scratch.Take<N>(channel_states);
  N* dA = scratch.Take<N>(channel_states);
  N* fixed_B = scratch.Take<N>(p.B_varies ? 0 : channel_states);
  N* fixed_C = scratch.Take<N>(p.C_varies ? 0 : channel_states);
  N* entry = scratch.Take<N>(dstate);
  T* varying_B = scratch.Take<T>(p.B_varies ? p.chunk * dstate * N::kParts : 0);
  T* varying_C = scratch.Take<T>(p.C_varies ? p.chunk * dstate * N::kParts : 0);
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
  BlockInputs<T> in{take_rows(), take_rows(), take_rows(), take_rows()};
  V *y = take_rows(), *dy = take_rows(), *gate = take_rows(), *d_delta = take_rows(),
    *d_source = take_rows();
  History<N> history{scratch.Take<N>((p.chunk + 1) * kMost), scratch.Take<N>(p.chunk * kMost)};
  V* dD = scratch.Take<V>(blocks);
  V* d_bias = scratch.Take<V>(blocks);
  bool* restarts = scratch.Take<bool>(p.chunk);
  std::fill_n(dA, channel_states, N{});
  if (!p.B_varies) std::fill_n(dB, dB_count, N{});
  if (!p.C_varies) std::fill_n(dC, dC_count, N{});
  std::fill_n(dD, blocks, V{});
  std::fill_n(d_bias, blocks, V{});

  auto each_block = [&](auto body) {
    for (int64_t b = 0; b < blocks; ++b)
      body(b, s.begin + b * kWidth, std::min<int64_t>(kWidth, s.dim - b * kWidth));
  };
  each_block([&](int64_t b, int64_t channel, int64_t channels) {
    LoadNumbers(o.A, s.Weight(channel), dstate, channels, A + b * dstate);
    if (!p.B_varies) LoadNumbers(o.B, s.Weight(channel), dstate, channels, fixed_B + b * dstate);
    if (!p.C_varies) LoadNumbers(o.C, s.Weight(channel), dstate, channels, fixed_C + b * dstate);
    LoadNumbers(p.last_state_cotangent, s.State(channel), dstate, channels, adjoint + b * dstate);
  });

  auto run_block = [&](const Walk& walk, int64_t b, auto B, auto C) {
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
        const V delta = in.delta[t], source = in.source[t];
        V sum = y[t];
        N* next = history.states + (i + 1) * kCount;
        N* decays = history.decays + i * kCount;
        if (restarts[t])
#pragma GCC unroll 8
          for (int n = 0; n < kCount; ++n) values[n] = N{};
#pragma GCC unroll 8
        for (int n = 0; n < kCount; ++n) {
          const N decay = Decay<T>(rates[n], delta);
          values[n] = decay * values[n] + B.At(t, n0 + n) * source;
          decays[n] = decay;
          next[n] = values[n];
          sum += RealOfProduct(C.At(t, n0 + n), values[n]);
        }
        y[t] = sum;
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
        V delta_sum = d_delta[t], source_sum = d_source[t];
        const N* before = history.states + i * kCount;
        const N* after = before + kCount;
        const N* decays = history.decays + i * kCount;
        const bool restart = restarts[t];
#pragma GCC unroll 8
        for (int n = 0; n < kCount; ++n) {
          const N lambda = values[n] + C.At(t, n0 + n) * cotangent;
          N& to_C = dC[kCVaries ? t * dstate + n0 + n : first + n];
          to_C = to_C + after[n] * cotangent;
          N& to_B = dB[kBVaries ? t * dstate + n0 + n : first + n];
          to_B = to_B + lambda * source;
          source_sum += RealOfProduct(lambda, B.At(t, n0 + n));
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
    T* row = reinterpret_cast<T*>(to) + (task * p.length + t0) * dstate * N::kParts;
    for (int64_t i = 0; i < steps * dstate; ++i) {
      row[i * N::kParts] = HorizontalSum<T>(from[i].re);
      if constexpr (N::kComplex) row[2 * i + 1] = HorizontalSum<T>(from[i].im);
    }
  };

  const int64_t chunks = p.num_chunks();
  for (int64_t i = chunks - 1; i >= 0; --i) {
    const int64_t chunk = p.reverse ? chunks - 1 - i : i, t0 = chunk * p.chunk;
    const Walk walk{std::min(p.chunk, p.length - t0), p.reverse};
    if (p.B_varies) LoadProjection<N>(s, o.B, t0, walk.steps, varying_B);
    if (p.C_varies) LoadProjection<N>(s, o.C, t0, walk.steps, varying_C);
    if (p.B_varies) std::fill_n(dB, walk.steps * dstate, N{});
    if (p.C_varies) std::fill_n(dC, walk.steps * dstate, N{});
    for (int64_t t = 0; t < walk.steps; ++t) restarts[t] = s.Restarts(t0 + t);
    each_block([&](int64_t b, int64_t channel, int64_t channels) {
      const Place at = s.Sequence(channel, t0);
      LoadNumbers(p.states, s.Saved(channel, chunk), dstate, channels, entry);
      LoadInputs<T>(s, channel, channels, t0, walk.steps, in);
      LoadTile<T>(p.out_cotangent, at, walk.steps, channels, dy);
      if (o.z) {
        LoadTile<T>(o.z, at, walk.steps, channels, gate);
        for (int64_t t = 0; t < walk.steps; ++t) {
          const V z = gate[t], sigmoid = Sigmoid<T>(z);
          gate[t] = dy[t] * sigmoid * (T(1) + z * (T(1) - sigmoid));  // the derivative of silu
          dy[t] = dy[t] * (z * sigmoid);
        }
      }
      // y = 2 Re sum C h for complex numbers: the walk sees its cotangent doubled.
      if constexpr (N::kComplex)
        for (int64_t t = 0; t < walk.steps; ++t) dy[t] = T(2) * dy[t];
      std::fill_n(y, walk.steps, V{});
      std::fill_n(d_delta, walk.steps, V{});
      std::fill_n(d_source, walk.steps, V{});
      const N *B = fixed_B + b * dstate, *C = fixed_C + b * dstate;
      using Varying = Projection<N, true>;
      using Fixed = Projection<N, false>;
      if (p.B_varies && p.C_varies)
        run_block(walk, b, Varying{varying_B, B, dstate}, Varying{varying_C, C, dstate});
      else if (p.B_varies)
        run_block(walk, b, Varying{varying_B, B, dstate}, Fixed{varying_C, C, dstate});
      else if (p.C_varies)
        run_block(walk, b, Fixed{varying_B, B, dstate}, Varying{varying_C, C, dstate});
      else
        run_block(walk, b, Fixed{varying_B, B, dstate}, Fixed{varying_C, C, dstate});

      V D{};
      if (o.D) LoadTile<T>(o.D, s.Vector(channel), 1, channels, &D);
      V D_sum = dD[b], bias_sum = d_bias[b];
      for (int64_t t = 0; t < walk.steps; ++t) {
        const V u = in.u[t], d_out = N::kComplex ? T(0.5) * dy[t] : dy[t];
        gate[t] = gate[t] * ((N::kComplex ? T(2) * y[t] : y[t]) + D * u);
        in.u[t] = d_source[t] * in.delta[t] + D * d_out;
        D_sum += d_out * u;
        d_delta[t] = (d_delta[t] + d_source[t] * u) * in.slope[t];
        bias_sum += d_delta[t];
      }
      dD[b] = D_sum;
      d_bias[b] = bias_sum;
      StoreTile<T>(in.u, walk.steps, channels, p.cotangents.u, at);
      StoreTile<T>(d_delta, walk.steps, channels, p.cotangents.delta, at);
      if (o.z) StoreTile<T>(gate, walk.steps, channels, p.cotangents.z, at);
    });
    if (p.B_varies) store_partial(dB, workspace.B, t0, walk.steps);
    if (p.C_varies) store_partial(dC, workspace.C, t0, walk.steps);
  }

  const DataType real = ffi::ToReal(p.state);
  each_block([&](int64_t b, int64_t channel, int64_t channels) {
    auto store = [&](const N* from, char* to) {
      StoreNumbers(from + b * dstate, dstate, channels, Array{to, p.state}, s.State(channel));
    };
    store(dA, workspace.A);
    if (!p.B_varies) store(dB, workspace.B);
    if (!p.C_varies) store(dC, workspace.C);
    const Place per_channel{s.batch * p.dim + channel, 0, 1};
    if (o.D) StoreTile<T>(dD + b, 1, channels, Array{workspace.D, real}, per_channel);
    if (o.delta_bias)
      StoreTile<T>(d_bias + b, 1, channels, Array{workspace.delta_bias, real}, per_channel);
    if (o.initial_state)
      StoreNumbers(adjoint + b * dstate, dstate, channels, p.cotangents.initial_state,
                   s.State(channel));
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
  const int64_t dstate = p.dstate * N::kParts, steps = p.length * dstate;
  Array none{nullptr, ffi::ToReal(p.state)};
  if (part < p.batch) {
    Scratch scratch;
    T* sum = scratch.Take<T>(dstate);
    auto reduce = [&](const char* partial, Array to) {
      // A complex result is written as the reals it is made of.
      if (N::kComplex) to.dtype = none.dtype;
      for (int64_t g = 0; g < p.groups; ++g) {
        const T* first = reinterpret_cast<const T*>(partial) +
                         (part * tasks.slices + g * tasks.slices_per_group) * steps;
        for (int64_t t = 0; t < p.length; ++t) {
          SumRows(first + t * dstate, tasks.slices_per_group, steps, dstate, sum);
          if (p.channel_last) {
            FromReal(sum, dstate, to, ((part * p.length + t) * p.groups + g) * dstate);
          } else {
            for (int64_t n = 0; n < p.dstate; ++n)
              FromReal(sum + n * N::kParts, N::kParts, to,
                       (((part * p.groups + g) * p.dstate + n) * p.length + t) * N::kParts);
          }
        }
      }
    };
    if (p.B_varies) reduce(workspace.B, p.cotangents.B);
    if (p.C_varies) reduce(workspace.C, p.cotangents.C);
    return;
  }
  auto reduce = [&](const char* partial, const Array& to, int64_t count) {
    const int64_t rows = p.batch / p.instances;
    for (int64_t i = 0; i < p.instances; ++i)
      SumRows(reinterpret_cast<const T*>(partial) + i * rows * count, rows, count, count,
              static_cast<T*>(to.data) + i * count);
  };
  reduce(workspace.A, p.cotangents.A, p.dim * dstate);
  if (!p.B_varies) reduce(workspace.B, p.cotangents.B, p.dim * dstate);
  if (!p.C_varies) reduce(workspace.C, p.cotangents.C, p.dim * dstate);
  if (p.operands.D) reduce(workspace.D, p.cotangents.D, p.dim);
  if (p.operands.delta_bias) reduce(workspace.delta_bias, p.cotangents.delta_bias, p.dim);
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
  WithNumber(p, [&](auto number) { ForwardTask<decltype(number)>(p, tasks, task); });
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
