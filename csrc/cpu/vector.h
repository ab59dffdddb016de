// Vectors of one instruction set, and the few functions of them that a selective scan needs.
//
// Built on the vector extensions of GCC and Clang, so that one source serves every target: a file
// that includes this one is compiled once per instruction set, with JAX_SSCAN_VECTOR_BYTES saying
// how wide a vector is there. Everything lives in an anonymous namespace, since the same names mean
// other code in each of those files.
//
// Accuracy: the polynomials of Exp2 are within 5e-9 (float) and 3e-18 (double) of 2^x, so that it
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

// Powers of two by a table: 2^(i / lanes), and between two of its entries (2^x - 1) / x or, for
// floats, a cubic in x that is 18.15... times 2^x and has no factor at x^3; their table is divided
// by that number. It was chosen of thousands of floats such that rounding hurts least: no entry is
// off by more than 2^-25 of it, and the last four, where an ulp is smallest, by 2^-27.
template <typename T>
struct Fractions;
template <>
struct Fractions<float> {
  static constexpr float kPowers[] = {0.0550913773f, 0.0575304814f, 0.0600775741f, 0.0627374351f,
                                      0.0655150563f, 0.0684156567f, 0.0714446753f, 0.0746078044f,
                                      0.0779109746f, 0.0813603848f, 0.084962517f,  0.0887241289f,
                                      0.0926522836f, 0.0967543498f, 0.101038031f,  0.105511367f};
  static constexpr float kExp2[] = {18.151660919f, 12.581778f, 4.3606787f};
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

// Logarithms by a table: scale is 0.7069... / (1 + c) for sixteen c from 0 to 1, rounded such that
// the values, log(1 + c), err by 0.01 ulp at most.
struct Logarithms {
  static constexpr float kLast = 0.96f;  // rounds to the last sixteenth below 1
  static constexpr float kScales[] = {0.7069485784f, 0.6653615832f, 0.6283981204f, 0.5953261256f,
                                      0.5655593872f, 0.5386270285f, 0.5141422153f, 0.4917904139f,
                                      0.4712989032f, 0.4524485767f, 0.4350448251f, 0.4189321697f,
                                      0.4039708078f, 0.3900418878f, 0.377040416f,  0.3619579673f};
  static constexpr float kValues[] = {0.0f,          0.06062730402f, 0.1177840158f, 0.1718485653f,
                                      0.2231426239f, 0.2719345689f,  0.3184580207f, 0.3629052937f,
                                      0.4054654241f, 0.4462838173f,  0.4855088592f, 0.5232489109f,
                                      0.559615314f,  0.5947037935f,  0.6286055446f, 0.6694298387f};
  static constexpr float kLog1p[] = {1.41453f, -1.0004479f, 0.94388807f};  // then -1
};

template <typename T, int kCount>
inline Vec<T> Horner(Vec<T> x, const T (&c)[kCount]) {
  Vec<T> y = Splat(c[kCount - 1]);
#pragma GCC unroll 16
  for (int i = kCount - 2; i >= 0; --i) y = y * x + c[i];
  return y;
}

#if defined(__AVX512F__)
// In the form with a mask of ones, since the plain ones make GCC warn of its own undefined vectors.
inline Vec<float> Lookup(Vec<float> index, const float (&table)[16]) {
  return _mm512_maskz_permutexvar_ps(0xffff, BitCast<__m512i>(index),
                                     LoadUnaligned<Vec<float>>(table));
}
inline Vec<double> Lookup(Vec<double> index, const double (&table)[8]) {
  return _mm512_maskz_permutexvar_pd(0xff, BitCast<__m512i>(index),
                                     LoadUnaligned<Vec<double>>(table));
}
inline Vec<float> Scale(Vec<float> x, Vec<float> exponent) {
  return _mm512_maskz_scalef_ps(0xffff, x, exponent);
}
inline Vec<double> Scale(Vec<double> x, Vec<double> exponent) {
  return _mm512_maskz_scalef_pd(0xff, x, exponent);
}
inline Vec<float> FusedMultiplyAdd(Vec<float> a, Vec<float> b, Vec<float> c) {
  return _mm512_fmadd_ps(a, b, c);
}
inline Vec<double> FusedMultiplyAdd(Vec<double> a, Vec<double> b, Vec<double> c) {
  return _mm512_fmadd_pd(a, b, c);
}
// The larger or smaller of two. If either is NaN, it is the second operand that these instructions
// return: NaN stays.
inline Vec<float> AtLeast(float low, Vec<float> x) {
  return _mm512_maskz_max_ps(0xffff, Splat(low), x);
}
inline Vec<double> AtLeast(double low, Vec<double> x) {
  return _mm512_maskz_max_pd(0xff, Splat(low), x);
}
inline Vec<float> AtMost(float high, Vec<float> x) {
  return _mm512_maskz_min_ps(0xffff, Splat(high), x);
}
inline Vec<double> AtMost(double high, Vec<double> x) {
  return _mm512_maskz_min_pd(0xff, Splat(high), x);
}
#else
// The larger or smaller of two. Comparisons with NaN are false: NaN stays.
template <typename T>
inline Vec<T> AtLeast(T low, Vec<T> x) {
  return x < low ? Splat(low) : x;
}
template <typename T>
inline Vec<T> AtMost(T high, Vec<T> x) {
  return x > high ? Splat(high) : x;
}
#endif

// 2^whole 2^rest of a number that was split by rounding: whole is a multiple of 1 / kFractions,
// rest at most half of that, and the last bits of rounded are those of whole * kFractions.
#if defined(__AVX512F__)
// The fraction of whole comes from a register, by a permutation, which leaves the polynomial little
// to do. One more instruction scales, infinities and underflow included. The multiplier is what
// binds the scan's inner loop on a Zen 4, and additions go elsewhere: hence the cubic without a
// factor at its third power.
template <typename T>
constexpr int kFractions = kLanes<T>;
template <typename T>
inline Vec<T> Exp2(Vec<T> rounded, Vec<T> whole, Vec<T> rest) {
  const Vec<T> power = Lookup(rounded, Fractions<T>::kPowers);
  constexpr auto& c = Fractions<T>::kExp2;
  if constexpr (sizeof(T) == 4) {
    return Scale(power * (((rest + c[2]) * rest + c[1]) * rest + c[0]), whole);
  } else {
    const Vec<T> more = rest * Horner<T>(rest, c);  // 2^rest - 1
    return Scale(power + power * more, whole);
  }
}
constexpr bool kScales = true;
#else
template <typename T>
constexpr int kFractions = 1;
template <typename T>
inline Vec<T> Exp2(Vec<T> rounded, Vec<T>, Vec<T> rest) {
  const IntVec<T> exponent = BitCast<IntVec<T>>(rounded) << Poly<T>::kMantissa;
  const IntVec<T> scale = exponent + BitCast<typename VectorOf<T>::Int>(T(1));
  return Horner<T>(rest, Poly<T>::kExp2) * BitCast<Vec<T>>(scale);
}
constexpr bool kScales = false;
#endif

template <typename T>
inline Vec<T> Exp2(Vec<T> x) {
  using P = Poly<T>;
  constexpr T kMagic = P::kMagic / kFractions<T>;
  // Without scaling, whole has to stay within the exponents that there are.
  if (!kScales) x = AtMost(P::kMaxExponent, AtLeast(P::kMinExponent, x));
  const Vec<T> rounded = x + kMagic, whole = rounded - kMagic;
  return Exp2<T>(rounded, whole, x - whole);
}

constexpr double kLog2E = 1.4426950408889634074, kLn2 = 0.69314718055994530942;

// log2(e), what it lacks as a T.
template <typename T>
constexpr T kLog2ELow = T(kLog2E - T(kLog2E));
template <>
constexpr double kLog2ELow<double> = 2.0355273740931033e-17;

// ln 2 in two parts, the first short enough that its products with an exponent are exact.
template <typename T>
constexpr T kLn2High = T(0.693359375);
template <typename T>
constexpr T kLn2Low = T(-2.121944400546905827679e-4);
template <>
constexpr double kLn2High<double> = 6.93145751953125e-1;
template <>
constexpr double kLn2Low<double> = 1.42860682030941723212e-6;

// Where e^x has long saturated, and its argument can still be split. Scaling makes 0 and infinity
// of twice the exponents that there are.
template <typename T>
constexpr T kLeastExp = Poly<T>::kMinExponent * T(kLn2) * (kScales ? 2 : 1);
template <typename T>
constexpr T kMostExp = (Poly<T>::kMaxExponent - T(0.5)) * T(kLn2) * (kScales ? 2 : 1);

// e^x for an x between these two.
template <typename T>
inline Vec<T> ExpWithin(Vec<T> x) {
  constexpr T kMagic = Poly<T>::kMagic / kFractions<T>;
  const Vec<T> rounded = x * T(kLog2E) + kMagic, whole = rounded - kMagic;
#if defined(__AVX512F__)
  // The product with log2(e) once more, exact until whole is off it.
  const Vec<T> nearly = FusedMultiplyAdd(x, Splat(T(kLog2E)), -whole);
  const Vec<T> rest = FusedMultiplyAdd(x, Splat(kLog2ELow<T>), nearly);
#else
  // The product with log2(e) is taken of what is left after the whole powers of two, so that it
  // costs no accuracy.
  const Vec<T> rest = ((x - whole * kLn2High<T>)-whole * kLn2Low<T>)*T(kLog2E);
#endif
  return Exp2<T>(rounded, whole, rest);
}

// e^x, which may saturate near the largest finite number: its callers need no infinity.
template <typename T>
inline Vec<T> Exp(Vec<T> x) {
  return ExpWithin<T>(AtMost(kMostExp<T>, AtLeast(kLeastExp<T>, x)));
}

// log(1 + y) for y in [0, 1], exact to the last bits for tiny y too.
template <typename T>
inline Vec<T> Log1p(Vec<T> y) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    // Of 16 parts of the interval, about whose middles are c (0 in the first, for tiny y):
    // log(1 + c) + log(1 + t), with a t of (y - c) / (1 + c) that is scaled so that the polynomial
    // has no factor at its last power.
    using L = Logarithms;
    const Vec<T> part = AtMost(L::kLast, y) + Poly<T>::kMagic / 16;
    const Vec<T> scale = Lookup(part, L::kScales);
    const Vec<T> t = FusedMultiplyAdd(y, scale, scale - L::kScales[0]);
    constexpr auto& c = L::kLog1p;
    return (((c[2] - t) * t + c[1]) * t + c[0]) * t + Lookup(part, L::kValues);
  }
#endif
  // 2 atanh(y / (2 + y))
  Vec<T> s = y / (y + T(2));
  return T(2) * s * Horner<T>(s * s, Poly<T>::kAtanh);
}

// e^-|x|, which softplus(x) and its slope are made of.
template <typename T>
inline Vec<T> ExpMinusMagnitude(Vec<T> x) {
  const auto sign = BitCast<typename VectorOf<T>::Int>(T(-0.0));
  return ExpWithin<T>(AtLeast(kLeastExp<T>, BitCast<Vec<T>>(BitCast<IntVec<T>>(x) | sign)));
}

// softplus(x) = log(1 + e^x), and x above 20, which floats come to by themselves.
template <typename T>
inline Vec<T> Softplus(Vec<T> x, Vec<T> exp_minus_magnitude) {
  const Vec<T> soft = AtLeast(T(0), x) + Log1p<T>(exp_minus_magnitude);
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
