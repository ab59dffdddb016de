// The numbers of the recurrence: float, or Complex where A is complex. Gradients follow JAX's
// convention: plain products, nothing conjugated.
#pragma once

#include "cuda/vendor.h"

namespace jax_sscan::gpu {

struct Complex {
  float re, im;
};

__device__ inline Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
__device__ inline Complex operator*(Complex a, float b) { return {a.re * b, a.im * b}; }
__device__ inline Complex operator*(Complex a, Complex b) {
  return {fmaf(a.re, b.re, -a.im * b.im), fmaf(a.re, b.im, a.im * b.re)};
}

// a * b + c
__device__ inline float MultiplyAdd(float a, float b, float c) { return fmaf(a, b, c); }
__device__ inline Complex MultiplyAdd(Complex a, float b, Complex c) {
  return {fmaf(a.re, b, c.re), fmaf(a.im, b, c.im)};
}
__device__ inline Complex MultiplyAdd(Complex a, Complex b, Complex c) {
  return {fmaf(a.re, b.re, fmaf(-a.im, b.im, c.re)), fmaf(a.re, b.im, fmaf(a.im, b.re, c.im))};
}

// Re(a * b) + c
__device__ inline float RealMultiplyAdd(float a, float b, float c) { return fmaf(a, b, c); }
__device__ inline float RealMultiplyAdd(Complex a, Complex b, float c) {
  return fmaf(a.re, b.re, fmaf(-a.im, b.im, c));
}

// 0 where the condition holds, also in the place of a NaN.
__device__ inline float Unless(bool condition, float x) { return condition ? 0.0f : x; }
__device__ inline Complex Unless(bool condition, Complex x) {
  return {condition ? 0.0f : x.re, condition ? 0.0f : x.im};
}

template <typename Number>
struct NumberTraits;
template <>
struct NumberTraits<float> {
  static constexpr bool kComplex = false;
  static constexpr int kParts = 1;
};
template <>
struct NumberTraits<Complex> {
  static constexpr bool kComplex = true;
  static constexpr int kParts = 2;
};

// A in the unit that Decay takes: exp(delta * A) = Decay(Rate(A), delta). Padded steps have delta 0
// and must keep the state, so an infinite rate becomes a huge one.
constexpr float kLog2E = 1.4426950408889634f, kInversePi = 0.3183098861837907f;
__device__ inline float FiniteRate(float x) { return isinf(x) ? copysignf(3.0e38f, x) : x; }
__device__ inline float Rate(float A) { return FiniteRate(A * kLog2E); }
__device__ inline Complex Rate(Complex A) { return {FiniteRate(A.re * kLog2E), A.im * kInversePi}; }

// Re(x * A) / kRateUnit + c, from the rate of A.
constexpr float kRateUnit = 0.6931471805599453f;
__device__ inline float RateMultiplyAdd(float x, float rate, float c) { return fmaf(x, rate, c); }
__device__ inline float RateMultiplyAdd(Complex x, Complex rate, float c) {
  constexpr float kPi = 3.14159265358979f;
  return fmaf(x.re, rate.re, fmaf(-x.im * (kPi / kRateUnit), rate.im, c));
}

__device__ inline float Decay(float rate, float delta) { return Exp2(rate * delta); }
__device__ inline Complex Decay(Complex rate, float delta) {
  const float size = Exp2(rate.re * delta);
  float sine, cosine;
  sincospif(rate.im * delta, &sine, &cosine);
  return {size * cosine, size * sine};
}

// exp(-x) for x >= 0. kExact makes good the rounding of the scaled argument, for about an ulp;
// without it the error grows to x / 2 ulp, which data of 16 bits do not notice.
template <bool kExact>
__device__ inline float ExpMinus(float x) {
  const float scaled = x * -kLog2E, y = Exp2(scaled);
  if constexpr (!kExact) return y;
  const float rest = fmaf(x, -1.925963033500570e-8f, fmaf(x, -kLog2E, -scaled));
  return fmaf(y * 0.6931471805599453f, rest, y);
}

// Softplus and its slope, the sigmoid, from one exponential. Past x = 20 both round to x and 1 by
// themselves.
template <bool kExact>
struct Softplus {
  float value, slope;
  __device__ explicit Softplus(float x) {
    const float e = ExpMinus<kExact>(fabsf(x));
    // log(1 + e) / e on [0, 1], to 2 ulp.
    float p = 0.005253457929939032f;
    p = fmaf(p, e, -0.02958850748836994f);
    p = fmaf(p, e, 0.07836166769266129f);
    p = fmaf(p, e, -0.13674770295619965f);
    p = fmaf(p, e, 0.19111430644989014f);
    p = fmaf(p, e, -0.24844369292259216f);
    p = fmaf(p, e, 0.33319270610809326f);
    p = fmaf(p, e, -0.49999502301216125f);
    p = fmaf(p, e, 1.0f);
    value = fmaf(p, e, fmaxf(x, 0.0f));
    const float larger = Reciprocal(1.0f + e);
    slope = x >= 0.0f ? larger : e * larger;
  }
};

template <bool kExact>
__device__ inline float Sigmoid(float x) {
  if constexpr (!kExact) return Reciprocal(1.0f + Exp2(x * -kLog2E));
  const float e = ExpMinus<true>(fabsf(x)), larger = Reciprocal(1.0f + e);
  return x >= 0.0f ? larger : e * larger;
}

}  // namespace jax_sscan::gpu
