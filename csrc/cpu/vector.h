// Vectors of one instruction set, and the few functions of them that a selective scan needs.
//
// Built on the vector extensions of GCC and Clang, so that one source serves every target: a file
// that includes this one is compiled once per instruction set, with JAX_SSCAN_VECTOR_BYTES saying
// how wide a vector is there. Everything lives in an anonymous namespace, since the same names mean
// other code in each of those files.
//
// Accuracy: the polynomials of Exp2 are within 2e-9 (float) and 3e-18 (double) of 2^x, so that it
// errs by rounding alone. Below the smallest normal number Exp2 may stop at it, and the infinity of
// an overflow far beyond the largest (an x of 2^23 or more) may have either sign; NaN passes
// through everything.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace jax_sscan {
namespace {

// The vector of T that fills a register, and vectors of other types with as many lanes.
template <typename T>
struct VectorOf;
template <>
struct VectorOf<float> {
  using Int = int32_t;
  typedef float Type __attribute__((vector_size(JAX_SSCAN_VECTOR_BYTES)));
  typedef int32_t IntType __attribute__((vector_size(JAX_SSCAN_VECTOR_BYTES)));
  typedef float Floats __attribute__((vector_size(JAX_SSCAN_VECTOR_BYTES)));
  typedef double Doubles __attribute__((vector_size(JAX_SSCAN_VECTOR_BYTES * 2)));
  typedef uint32_t Bits __attribute__((vector_size(JAX_SSCAN_VECTOR_BYTES)));
  typedef uint16_t ShortBits __attribute__((vector_size(JAX_SSCAN_VECTOR_BYTES / 2)));
};
template <>
struct VectorOf<double> {
  using Int = int64_t;
  typedef double Type __attribute__((vector_size(JAX_SSCAN_VECTOR_BYTES)));
  typedef int64_t IntType __attribute__((vector_size(JAX_SSCAN_VECTOR_BYTES)));
  typedef float Floats __attribute__((vector_size(JAX_SSCAN_VECTOR_BYTES / 2)));
  typedef double Doubles __attribute__((vector_size(JAX_SSCAN_VECTOR_BYTES)));
  typedef uint32_t Bits __attribute__((vector_size(JAX_SSCAN_VECTOR_BYTES / 2)));
  typedef uint16_t ShortBits __attribute__((vector_size(JAX_SSCAN_VECTOR_BYTES / 4)));
};
template <typename T>
using Vec = typename VectorOf<T>::Type;
template <typename T>
using IntVec = typename VectorOf<T>::IntType;
template <typename T>
constexpr int kLanes = JAX_SSCAN_VECTOR_BYTES / sizeof(T);

template <typename To, typename From>
inline To BitCast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <typename V>
inline V LoadUnaligned(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <typename T>
inline Vec<T> Splat(T x) {
  return x - Vec<T>{};  // vector minus vector: the scalar is broadcast; -0 stays -0
}

// Polynomials in ascending order, minimax on the stated interval.
template <typename T>
struct Poly;
template <>
struct Poly<float> {
  static constexpr float kExp2[] = {1.0f,
                                    0.693147206703f,
                                    0.240226509223f,
                                    0.0555032722667f,
                                    0.00961805667852f,
                                    0.00134004281776f,
                                    0.000154614446986f};
  static constexpr float kAtanh[] = {
      1.0f, 0.333333395132f, 0.199993556234f, 0.143101037042f, 0.106992802533f, 0.12196954042f};
  static constexpr float kSin[] = {1.57079632679f, -0.645964096147f, 0.0796925827256f,
                                   -0.00468126625673f, 0.000158206303556f};
  static constexpr float kCos[] = {1.0f, -1.23370054063f, 0.253669203655f, -0.0208600695003f,
                                   0.00090362806638f};
  static constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float kMinExponent = -126.0f, kMaxExponent = 128.0f;
  static constexpr int kMantissa = 23;
};
template <>
struct Poly<double> {
  static constexpr double kExp2[] = {1.0,
                                     0.69314718055994530835,
                                     0.24022650695910071228,
                                     0.055504108664821698992,
                                     0.0096181291076284830543,
                                     0.0013333558146390352775,
                                     0.00015403530393362755291,
                                     0.000015252733856293466416,
                                     1.3215486815999976975e-6,
                                     1.017805119296064896e-7,
                                     7.0548943863483480445e-9,
                                     4.4566753410492058782e-10,
                                     2.5733568308756891235e-11};
  static constexpr double kAtanh[] = {1.0,
                                      0.33333333333333333333,
                                      0.2000000000000000018,
                                      0.14285714285714238212,
                                      0.11111111111117685884,
                                      0.090909090903618928924,
                                      0.076923077219771932739,
                                      0.066666655661631599203,
                                      0.058823816956191893681,
                                      0.052626207026761441214,
                                      0.047690966866981674559,
                                      0.042796204298536421153,
                                      0.044443191304346285198,
                                      0.01840666348631857495,
                                      0.077780569806244465067};
  static constexpr double kSin[] = {
      1.5707963267948966192,    -0.64596409750624625365,    0.079692626246167045033,
      -0.004681754135318684508, 0.00016044118478728590486,  -3.598843234357742675e-6,
      5.6921723418431314607e-8, -6.6878054675122114801e-10, 6.0178831240409112466e-12};
  static constexpr double kCos[] = {1.0,
                                    -1.2337005501361698274,
                                    0.25366950790104801364,
                                    -0.020863480763352960839,
                                    0.00091926027483942570687,
                                    -0.000025202042373047561117,
                                    4.710874777632047335e-7,
                                    -6.3866024161902470511e-9,
                                    6.5657359898647710309e-11,
                                    -5.2515930133447995288e-13};
  static constexpr double kMagic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kMinExponent = -1022.0, kMaxExponent = 1024.0;
  static constexpr int kMantissa = 52;
};

// Powers of two by a table: 2^(i / lanes), and (2^x - 1) / x between two of its entries.
template <typename T>
struct Fractions;
template <>
struct Fractions<float> {
  static constexpr float kPowers[] = {1.0f,          1.0442737824f, 1.0905077327f, 1.1387886348f,
                                      1.1892071150f, 1.2418578121f, 1.2968395547f, 1.3542555469f,
                                      1.4142135624f, 1.4768261459f, 1.5422108254f, 1.6104903319f,
                                      1.6817928305f, 1.7562521604f, 1.8340080864f, 1.9152065614f};
  static constexpr float kExp2[] = {0.693147182667f, 0.240234288027f, 0.0555021366246f};
};
template <>
struct Fractions<double> {
  static constexpr double kPowers[] = {1.0,
                                       1.0905077326652576592,
                                       1.1892071150027210667,
                                       1.2968395546510096659,
                                       1.4142135623730950488,
                                       1.5422108254079408236,
                                       1.6817928305074290861,
                                       1.8340080864093424635};
  static constexpr double kExp2[] = {0.6931471805599453181,     0.24022650695911516005,
                                     0.055504108664802390121,   0.0096181290851791997372,
                                     0.0013333558238702804358,  0.00015404521937451194452,
                                     0.000015251848398709409481};
};

template <typename T, int kCount>
inline Vec<T> Horner(Vec<T> x, const T (&c)[kCount]) {
  Vec<T> y = Splat(c[kCount - 1]);
#pragma GCC unroll 16
  for (int i = kCount - 2; i >= 0; --i) y = y * x + c[i];
  return y;
}

// 2^whole 2^rest of a number that was split by rounding: whole is a multiple of 1 / kFractions,
// rest at most half of that, and the last bits of rounded are those of whole * kFractions.
#if defined(__AVX512F__)
// The fraction of whole comes from a register, by a permutation, which leaves the polynomial little
// to do. One more instruction scales, infinities and underflow included. In the form with a mask of
// ones, since the plain ones make GCC warn of its own undefined vectors.
template <typename T>
constexpr int kFractions = kLanes<T>;
template <typename T>
inline Vec<T> Exp2(Vec<T> rounded, Vec<T> whole, Vec<T> rest) {
  const Vec<T> powers = LoadUnaligned<Vec<T>>(Fractions<T>::kPowers);
  const Vec<T> more = rest * Horner<T>(rest, Fractions<T>::kExp2);  // 2^rest - 1
  if constexpr (sizeof(T) == 4) {
    const Vec<T> power = _mm512_maskz_permutexvar_ps(0xffff, BitCast<__m512i>(rounded), powers);
    return _mm512_maskz_scalef_ps(0xffff, power + power * more, whole);
  } else {
    const Vec<T> power = _mm512_maskz_permutexvar_pd(0xff, BitCast<__m512i>(rounded), powers);
    return _mm512_maskz_scalef_pd(0xff, power + power * more, whole);
  }
}
template <typename T>
inline Vec<T> Clamp(Vec<T> x, T, T) {
  return x;  // nothing that this scaling could not do
}
#else
template <typename T>
constexpr int kFractions = 1;
template <typename T>
inline Vec<T> Exp2(Vec<T> rounded, Vec<T>, Vec<T> rest) {
  const IntVec<T> exponent = BitCast<IntVec<T>>(rounded) << Poly<T>::kMantissa;
  const IntVec<T> scale = exponent + BitCast<typename VectorOf<T>::Int>(T(1));
  return Horner<T>(rest, Poly<T>::kExp2) * BitCast<Vec<T>>(scale);
}
// Keeps whole within the exponents that there are. Comparisons with NaN are false: NaN stays.
template <typename T>
inline Vec<T> Clamp(Vec<T> x, T low, T high) {
  x = x < low ? Splat(low) : x;
  return x > high ? Splat(high) : x;
}
#endif

template <typename T>
inline Vec<T> Exp2(Vec<T> x) {
  using P = Poly<T>;
  constexpr T kMagic = P::kMagic / kFractions<T>;
  x = Clamp<T>(x, P::kMinExponent, P::kMaxExponent);
  const Vec<T> rounded = x + kMagic, whole = rounded - kMagic;
  return Exp2<T>(rounded, whole, x - whole);
}

constexpr double kLog2E = 1.4426950408889634074, kLn2 = 0.69314718055994530942;

// ln 2 in two parts, the first short enough that its products with an exponent are exact.
template <typename T>
constexpr T kLn2High = T(0.693359375);
template <typename T>
constexpr T kLn2Low = T(-2.121944400546905827679e-4);
template <>
constexpr double kLn2High<double> = 6.93145751953125e-1;
template <>
constexpr double kLn2Low<double> = 1.42860682030941723212e-6;

// e^x, which may saturate near the largest finite number: its callers need no infinity. The product
// with log2(e) is taken of what is left after the whole powers of two, so that it costs no
// accuracy.
template <typename T>
inline Vec<T> Exp(Vec<T> x) {
  using P = Poly<T>;
  constexpr T kMagic = P::kMagic / kFractions<T>;
  x = Clamp<T>(x, P::kMinExponent * T(kLn2), (P::kMaxExponent - T(0.5)) * T(kLn2));
  const Vec<T> rounded = x * T(kLog2E) + kMagic, whole = rounded - kMagic;
  const Vec<T> rest = ((x - whole * kLn2High<T>)-whole * kLn2Low<T>)*T(kLog2E);
  return Exp2<T>(rounded, whole, rest);
}

// log(1 + y) for y in [0, 1], by 2 atanh(y / (2 + y)): exact to the last bits for tiny y too.
template <typename T>
inline Vec<T> Log1p(Vec<T> y) {
  Vec<T> s = y / (y + T(2));
  return T(2) * s * Horner<T>(s * s, Poly<T>::kAtanh);
}

// e^-|x|, which softplus(x) and its slope are made of.
template <typename T>
inline Vec<T> ExpMinusMagnitude(Vec<T> x) {
  const auto sign = BitCast<typename VectorOf<T>::Int>(T(-0.0));
  return Exp<T>(BitCast<Vec<T>>(BitCast<IntVec<T>>(x) | sign));
}

// softplus(x) = log(1 + e^x), and x above 20, which floats come to by themselves.
template <typename T>
inline Vec<T> Softplus(Vec<T> x, Vec<T> exp_minus_magnitude) {
  const Vec<T> positive = x < T(0) ? Vec<T>{} : x;
  const Vec<T> soft = positive + Log1p<T>(exp_minus_magnitude);
  if constexpr (sizeof(T) == 4) return soft;
  return x > T(20) ? x : soft;
}
template <typename T>
inline Vec<T> Softplus(Vec<T> x) {
  return Softplus<T>(x, ExpMinusMagnitude<T>(x));
}

// The derivative of Softplus: a sigmoid, and 1 above 20.
template <typename T>
inline Vec<T> SoftplusSlope(Vec<T> x, Vec<T> exp_minus_magnitude) {
  const Vec<T> one = Splat(T(1)), numerator = x < T(0) ? exp_minus_magnitude : one;
  return x > T(20) ? one : numerator / (T(1) + exp_minus_magnitude);
}

template <typename T>
inline Vec<T> Sigmoid(Vec<T> x) {
  return T(1) / (T(1) + Exp<T>(-x));
}

// x sigmoid(x)
template <typename T>
inline Vec<T> Silu(Vec<T> x) {
  return x / (T(1) + Exp<T>(-x));
}

// cos and sin of (pi / 2) x: the quadrant comes off exactly, the rest is in [-1/2, 1/2].
template <typename T>
inline void CosSinQuarterTurns(Vec<T> x, Vec<T>* cosine, Vec<T>* sine) {
  using P = Poly<T>;
  Vec<T> shifted = x + P::kMagic;
  Vec<T> rest = x - (shifted - P::kMagic);
  IntVec<T> quadrant = BitCast<IntVec<T>>(shifted);
  Vec<T> square = rest * rest;
  Vec<T> s = rest * Horner<T>(square, P::kSin), c = Horner<T>(square, P::kCos);
  IntVec<T> odd = -(quadrant & 1);
  Vec<T> from_sine = odd ? c : s, from_cosine = odd ? s : c;
  *sine = (quadrant & 2) ? -from_sine : from_sine;
  *cosine = ((quadrant + 1) & 2) ? -from_cosine : from_cosine;
}

template <typename T>
inline T HorizontalSum(Vec<T> v) {
  T lanes[kLanes<T>];
  std::memcpy(lanes, &v, sizeof(v));
  for (int width = kLanes<T> / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

// One step of a transpose: swaps the blocks of lanes and rows that differ in bit kBit.
template <typename T, int kBit, size_t... kLane>
inline void ExchangeRows(Vec<T>& a, Vec<T>& b, std::index_sequence<kLane...>) {
  constexpr int kWidth = kLanes<T>;
  Vec<T> low = __builtin_shufflevector(a, b, ((kLane & kBit) ? kWidth + (kLane ^ kBit) : kLane)...);
  Vec<T> high =
      __builtin_shufflevector(a, b, ((kLane & kBit) ? kWidth + kLane : (kLane | kBit))...);
  a = low;
  b = high;
}

template <typename T, int kBit = kLanes<T> / 2>
inline void Transpose(Vec<T> (&rows)[kLanes<T>]) {
  if constexpr (kBit > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; ++i)
      if (!(i & kBit))
        ExchangeRows<T, kBit>(rows[i], rows[i | kBit], std::make_index_sequence<kLanes<T>>());
    Transpose<T, kBit / 2>(rows);
  }
}

// to[i] = the sum of the lanes of from[i], a square of vectors at a time.
template <typename T>
inline void LaneSums(const Vec<T>* from, int64_t count, T* to) {
  constexpr int kWidth = kLanes<T>;
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    Vec<T> square[kWidth];
    for (int k = 0; k < kWidth; ++k) square[k] = from[i + k];
    Transpose<T>(square);
#pragma GCC unroll 4
    for (int width = kWidth / 2; width > 0; width /= 2)
#pragma GCC unroll 8
      for (int k = 0; k < width; ++k) square[k] += square[k + width];
    std::memcpy(to + i, square, sizeof(Vec<T>));
  }
  for (; i < count; ++i) to[i] = HorizontalSum<T>(from[i]);
}

}  // namespace
}  // namespace jax_sscan
