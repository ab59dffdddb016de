// How far the functions of csrc/cpu/vector.h are from the truth, in units of the last place: prints
// one line "name worst-ulp" per function and type, for tests/test_cpu.py to judge. The truth is
// long double; x goes over every 997th float of the domain, and as many doubles.
#include "cpu/vector.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>

namespace {

using jax_sscan::Vec;

template <typename T>
long double Ulp(long double exact) {
  int exponent = 0;
  std::frexp(exact, &exponent);
  exponent = std::max(exponent, std::numeric_limits<T>::min_exponent);
  return std::ldexp(1.0L, exponent - std::numeric_limits<T>::digits);
}

// The floats in their order, as consecutive integers.
int32_t Rank(float x) {
  const int32_t bits = jax_sscan::BitCast<int32_t>(x);
  return bits < 0 ? -(bits & 0x7fffffff) : bits;
}
float FloatOfRank(int32_t rank) {
  return rank < 0 ? -jax_sscan::BitCast<float>(-rank) : jax_sscan::BitCast<float>(rank);
}

template <typename T, typename Vector, typename Exact>
void Compare(const char* name, float low, float high, Vector vector, Exact exact) {
  long double worst = 0;
  T x[jax_sscan::kLanes<T>], y[jax_sscan::kLanes<T>];
  int64_t rank = Rank(low);
  while (rank < Rank(high)) {
    for (T& lane : x) {
      const float next = FloatOfRank(static_cast<int32_t>(rank));
      lane = T(next);
      // Not only doubles that are floats.
      if (sizeof(T) == 8) lane *= 1 + T(next) * T(1e-12);
      rank += 997;
    }
    Vec<T> v;
    std::memcpy(&v, x, sizeof(v));
    v = vector(v);
    std::memcpy(y, &v, sizeof(v));
    for (int i = 0; i < jax_sscan::kLanes<T>; ++i) {
      const long double wanted = exact(static_cast<long double>(x[i]));
      worst = std::max(worst, std::fabs(y[i] - wanted) / Ulp<T>(wanted));
    }
  }
  std::printf("%s %.3Lf\n", name, worst);
}

// Far from 0, up to what masks are made of, softplus is x or next to nothing.
template <typename T>
bool SoftplusHoldsFar() {
  for (T x : {T(1e3), T(1e6), T(1e9), T(1e20), T(1e30), std::numeric_limits<T>::max(),
              std::numeric_limits<T>::infinity()}) {
    const T above = jax_sscan::Softplus<T>(jax_sscan::Splat(x))[0];
    const T below = jax_sscan::Softplus<T>(jax_sscan::Splat(-x))[0];
    if (!(above == x && below >= 0 && below <= 2 * std::numeric_limits<T>::min())) return false;
  }
  return true;
}

template <typename T>
void CompareAll(const char* type) {
  char name[64];
  auto label = [&](const char* function) {
    std::snprintf(name, sizeof(name), "%s<%s>", function, type);
    return name;
  };
  const long double half_pi = std::acos(0.0L);
  using jax_sscan::CosSinQuarterTurns;
  Compare<T>(
      label("Exp2"), -125.0f, 127.0f, [](Vec<T> x) { return jax_sscan::Exp2<T>(x); },
      [](long double x) { return std::exp2(x); });
  Compare<T>(
      label("Exp"), -80.0f, 80.0f, [](Vec<T> x) { return jax_sscan::Exp<T>(x); },
      [](long double x) { return std::exp(x); });
  Compare<T>(
      label("Softplus"), -80.0f, 19.9f, [](Vec<T> x) { return jax_sscan::Softplus<T>(x); },
      [](long double x) { return std::log1p(std::exp(x)); });
  Compare<T>(
      label("Sigmoid"), -80.0f, 80.0f, [](Vec<T> x) { return jax_sscan::Sigmoid<T>(x); },
      [](long double x) { return 1 / (1 + std::exp(-x)); });
  std::printf("%s %d\n", label("SoftplusFar"), SoftplusHoldsFar<T>() ? 0 : 1);
  // Near its zeros a cosine is as exact as its argument lets it be; so these go over one quadrant.
  Compare<T>(
      label("Cos"), -0.5f, 0.5f,
      [](Vec<T> x) {
        Vec<T> c, s;
        CosSinQuarterTurns<T>(x, &c, &s);
        return c;
      },
      [=](long double x) { return std::cos(half_pi * x); });
  Compare<T>(
      label("Sin"), -0.5f, 0.5f,
      [](Vec<T> x) {
        Vec<T> c, s;
        CosSinQuarterTurns<T>(x, &c, &s);
        return s;
      },
      [=](long double x) { return std::sin(half_pi * x); });
}

}  // namespace

int main() {
  CompareAll<float>("float");
  CompareAll<double>("double");
}
