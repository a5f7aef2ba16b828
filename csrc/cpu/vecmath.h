// exp and its relatives on at::vec::Vectorized, inline so that a loop over a tile stays in
// registers.
//
// float: own polynomials, about 1 ulp, no library call. double (used to check gradients, never for
// speed): ATen's. Included only by per-instruction-set files, inside their CPU_CAPABILITY;
// everything here is static.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <type_traits>

namespace mllmkd::CPU_CAPABILITY {
namespace {

template <class T>
using Vec = at::vec::Vectorized<T>;

// b where mask, else a
template <class V>
inline V select(const V& a, const V& b, const V& mask) {
  return V::blendv(a, b, mask);
}

template <class V, int N>
inline V horner(const V& x, const double (&c)[N]) {
  using T = typename V::value_type;
  V sum(static_cast<T>(c[N - 1]));
  for (int i = N - 2; i >= 0; --i) sum = at::vec::fmadd(sum, x, V(static_cast<T>(c[i])));
  return sum;
}

inline Vec<double> exp_of(const Vec<double>& x) { return x.exp(); }

// x = n·ln2 + r; exp(r) by a polynomial on |r| <= ln2/2; below the normal range 0; NaN stays NaN.
inline Vec<float> exp_of(const Vec<float>& x) {
  using V = Vec<float>;
  using I = at::vec::Vectorized<int32_t>;
  const V lo(-87.3f), y = at::vec::clamp(x, lo, V(88.0f));
  const V n = (y * V(1.44269504088896341f)).round();
  V r = at::vec::fmadd(n, V(-0.693359375f), y);
  r = at::vec::fmadd(n, V(2.12194440e-4f), r);
  static constexpr double c[] = {
      0.5, 1.6666665459e-1, 4.1665795894e-2, 8.3334519073e-3, 1.3981999507e-3, 1.9875691500e-4};
  const V p = at::vec::fmadd(r * r, horner(r, c), r) + V(1.0f);
  const I bits = (at::vec::convert_to_int_of_same_size(n) + I(127)) << I(23);
  return select(p * at::vec::cast<float, int32_t>(bits), V(0.0f), x < lo);
}

inline Vec<double> log1p_of(const Vec<double>& x) { return x.log1p(); }

// For −1 < x < 2^20, which is where the divergences ask. 1 + x = m·2^e with m in [√½, √2), log m by
// a polynomial in m − 1, and what the sum 1 + x rounded away put back. NaN stays NaN.
inline Vec<float> log1p_of(const Vec<float>& x) {
  using V = Vec<float>;
  using I = at::vec::Vectorized<int32_t>;
  const V one(1.0f), y = x + one, lost = (x - (y - one)) / y;
  const I bits = at::vec::cast<int32_t, float>(y), e = (bits - I(0x3f3504f3)) >> I(23);
  const V t = at::vec::cast<float, int32_t>(bits - (e << I(23))) - one,
          n = at::vec::convert_to_fp_of_same_size<float>(e);
  static constexpr double c[] = {3.3333331174e-1,  -2.4999993993e-1, 2.0000714765e-1,
                                 -1.6668057665e-1, 1.4249322787e-1,  -1.2420140846e-1,
                                 1.1676998740e-1,  -1.1514610310e-1, 7.0376836292e-2};
  const V square = t * t;
  V tail = at::vec::fmadd(t * square, horner(t, c), n * V(-2.12194440e-4f));
  tail = tail - V(0.5f) * square + lost;
  return at::vec::fmadd(n, V(0.693359375f), t + tail) + (x - x);
}

// exp(u) − 1 − u for |u| <= 1/2, by its series: no cancellation.
template <class V>
inline V exp_minus_line(const V& u) {
  static constexpr double c[] = {
      1.0 / 2,         1.0 / 6,          1.0 / 24,          1.0 / 120,          1.0 / 720,
      1.0 / 5040,      1.0 / 40320,      1.0 / 362880,      1.0 / 3628800,      1.0 / 39916800,
      1.0 / 479001600, 1.0 / 6227020800, 1.0 / 87178291200, 1.0 / 1307674368000};
  static constexpr double c_float[] = {1.0 / 2,   1.0 / 6,    1.0 / 24,   1.0 / 120,
                                       1.0 / 720, 1.0 / 5040, 1.0 / 40320};
  if constexpr (std::is_same_v<typename V::value_type, float>) {
    return u * u * horner(u, c_float);
  } else {
    return u * u * horner(u, c);
  }
}

// x − log1p(x), given l = log1p(x): by its series for |x| < 0.1.
template <class V>
inline V log_defect(const V& x, const V& l) {
  using T = typename V::value_type;
  static constexpr double c[] = {1.0 / 2,  -1.0 / 3,  1.0 / 4,  -1.0 / 5, 1.0 / 6,
                                 -1.0 / 7, 1.0 / 8,   -1.0 / 9, 1.0 / 10, -1.0 / 11,
                                 1.0 / 12, -1.0 / 13, 1.0 / 14, -1.0 / 15};
  static constexpr double c_float[] = {1.0 / 2, -1.0 / 3, 1.0 / 4, -1.0 / 5,
                                       1.0 / 6, -1.0 / 7, 1.0 / 8};
  const V near = x.abs() < V(static_cast<T>(0.1));
  if constexpr (std::is_same_v<T, float>) {
    return select(x - l, x * x * horner(x, c_float), near);
  } else {
    return select(x - l, x * x * horner(x, c), near);
  }
}

// tanh through expm1(2|x|): relative accuracy near 0 as well.
template <class V>
inline V tanh_of(const V& x) {
  using T = typename V::value_type;
  if constexpr (std::is_same_v<T, double>) {
    return x.tanh();
  } else {
    const V one(static_cast<T>(1)), y = x.abs() * V(static_cast<T>(2));
    const V small = y < V(static_cast<T>(0.5));
    const V y_small = select(V(static_cast<T>(0)), y, small);
    const V e = select(exp_of(y) - one, exp_minus_line(y_small) + y_small, small);
    const V t = e / (e + V(static_cast<T>(2)));
    return select(t, t.neg(), x < V(static_cast<T>(0)));
  }
}

}  // namespace
}  // namespace mllmkd::CPU_CAPABILITY
