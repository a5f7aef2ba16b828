// One token's share of a divergence: the CUDA twin of csrc/cpu/divergence_terms.h and of
// mllmkd_kernels/divergence.py, row for row, under their names.
//
// With u = log q − log p (a, b the scaled logits; p teacher, q student):
//   value(f)  up to a multiple of q − p, which sums to zero: every term second-order small where
//             the models agree;
//   slope(g)  ∂f/∂q up to a constant, vanishing at u = 0;
//   dD/da = q·(g − Σ q g), or q − p directly.
// Near (|u| < 1/2) the terms come from series; far they are in p and q, because p·expm1(u) may
// overflow. Both are formed and one is chosen: lanes of a warp would wait for each other anyway.
//
// Logarithms come to the base 2, as the hardware takes them. Of a token that both models mask
// (-inf minus -inf) u is NaN, hence far: without mass it contributes 0 to whatever is asked.
#pragma once

#include <cmath>

#include "cluster.cuh"
#include "rows.h"

namespace mllmkd::cuda {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

MLLMKD_DEVICE float exp2_of(float x) {
#ifdef __CUDA_ARCH__
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(x) : "f"(x));
  return x;
#else
  return std::exp2(x);
#endif
}

// exp(x) in two instructions instead of eight: exp is most of what the kernel does. Its error,
// 2e-7 + 6e-8·|x|, is that of a product rounded before 2ˣ, no more than the fp32 logits themselves
// carry; where models agree it scales a term, and cancels nothing. Below 1e-38: 0.
MLLMKD_DEVICE float exp_of(float x) { return exp2_of(x * kLog2e); }

// log(x) in two instructions: as near as x is known, 1e-7 of |log x| or of 1, the larger.
MLLMKD_DEVICE float log_of(float x) {
#ifdef __CUDA_ARCH__
  return __logf(x);
#else
  return std::log(x);
#endif
}

MLLMKD_DEVICE float reciprocal(float x) {
#ifdef __CUDA_ARCH__
  return __fdividef(1.0f, x);
#else
  return 1.0f / x;
#endif
}

// exp(u) − 1 − u for |u| <= 1/2: no cancellation. The polynomial of least relative error there,
// 2e-8, in one step less than the series.
MLLMKD_DEVICE float exp_minus_line(float u) {
  float sum = 1.9875629e-4f;
  sum = fmaf(sum, u, 1.3981997e-3f);
  sum = fmaf(sum, u, 8.3334522e-3f);
  sum = fmaf(sum, u, 4.1665796e-2f);
  sum = fmaf(sum, u, 0.16666665f);
  sum = fmaf(sum, u, 0.5f);
  return u * u * sum;
}

// x − log1p(x), given l = log1p(x): by its series for |x| < 0.1.
MLLMKD_DEVICE float log_defect(float x, float l) {
  float sum = 1.0f / 8;
  sum = fmaf(sum, x, -1.0f / 7);
  sum = fmaf(sum, x, 1.0f / 6);
  sum = fmaf(sum, x, -1.0f / 5);
  sum = fmaf(sum, x, 1.0f / 4);
  sum = fmaf(sum, x, -1.0f / 3);
  sum = fmaf(sum, x, 1.0f / 2);
  return fabsf(x) < 0.1f ? x * x * sum : x - l;
}

// p·x with 0·inf = 0: a token without mass contributes nothing.
MLLMKD_DEVICE float times(float p, float x) { return p == 0.0f ? 0.0f : p * x; }

// What u is cut to where p·u must be 0 for p = 0: one instruction less than `times`.
constexpr float kFinite = 1e30f;

struct Token {
  float p, q;
  float log2_q;
  float log2_u;  // log2 q − log2 p
  float u;       // log q − log p
  bool near;     // |u| < 1/2
  float bend;    // eᵘ − 1 − u where near, else anything
};

MLLMKD_DEVICE Token make_token(float log2_p, float log2_q) {
  Token t;
  t.p = exp2_of(log2_p);
  t.q = exp2_of(log2_q);
  t.log2_q = log2_q;
  t.log2_u = log2_q - log2_p;
  t.u = t.log2_u * kLn2;
  t.near = fabsf(t.u) < 0.5f;
  t.bend = exp_minus_line(t.u);
  return t;
}

// q − p, as p·expm1(u) where the two are close.
MLLMKD_DEVICE float difference(const Token& t) {
  return t.near ? fmaf(t.p, t.u, t.p * t.bend) : t.q - t.p;
}

struct Mixture {
  float value;  // p·(x − log1p x), x = w·expm1(u): a term of KL(p ‖ (1−w)p + w q)
  float log;    // log1p(x) = log((1−w) + w eᵘ)
  float share;  // x/(1+x) = 1 − 1/((1−w) + w eᵘ)
};

MLLMKD_DEVICE Mixture mixture(float p, float q, float u, bool near, float w) {
  const float x = w * (exp_minus_line(u) + u);
  // far from u = 0 only expm1(−|u|) is formed: log((1−w) + w eᵘ) = u + log1p((1−w) expm1(−u)) for
  // u > 0
  const bool up = u > 0.0f;
  const float e = exp_of(-fabsf(u));
  const float t = near ? x : (up ? 1.0f - w : w) * (e - 1.0f);
  const float l = log1pf(t), inverse = reciprocal(1.0f + t);
  Mixture m;
  m.share = near ? x * inverse : 1.0f - (up ? e * inverse : inverse);
  m.log = near || !up ? l : l + u;
  m.value = near ? p * log_defect(x, l) : w * (q - p) - times(p, m.log);
  return m;
}

struct Terms {
  float value, slope;
};

MLLMKD_DEVICE float sum_of(const float (&series)[Series::kTerms], float u) {
  float sum = series[Series::kTerms - 1];
#pragma unroll
  for (int i = Series::kTerms - 2; i >= 0; --i) sum = fmaf(sum, u, series[i]);
  return sum;
}

// JSD, (1−w)·KL(p ‖ m) + w·KL(q ‖ m), m = (1−w)p + w q.
MLLMKD_DEVICE Terms middle(const Token& t, float w, const Series& series) {
  // far from u = 0 only exp(−|u|) is formed: 1 − s + s·exp(−|u|) is m/q where u > 0, else m/p
  const bool up = t.u > 0.0f;
  const float share = up ? 1.0f - w : w;
  const float l = log_of(1.0f + share * (exp2_of(-fabsf(t.log2_u)) - 1.0f));
  const float log_p = up ? l + t.u : l, log_q = up ? l : l - t.u;
  const float far = (w - 1.0f) * times(t.p, log_p) - w * times(t.q, log_q);
  const float near = t.p * (t.u * t.u * sum_of(series.value, t.u));
  const float log = t.near ? t.u * sum_of(series.log, t.u) : log_q;
  return {t.near ? near : far, -w * log};
}

template <Divergence D>
MLLMKD_DEVICE Terms terms(const Token& t, float param, const Series& series) {
  if constexpr (D == Divergence::forward_kl) {
    const float far = fmaf(-t.p, fminf(t.u, kFinite), t.q - t.p);
    return {t.near ? t.p * t.bend : far, 0.0f};
  } else if constexpr (D == Divergence::reverse_kl) {
    const float far = fmaf(t.q, fmaxf(t.u, -kFinite), t.p - t.q);
    return {t.near ? t.q * exp_minus_line(-t.u) : far, t.u};
  } else if constexpr (D == Divergence::soft_cross_entropy) {
    return {-times(t.p, t.log2_q * kLn2), 0.0f};
  } else if constexpr (D == Divergence::total_variation) {
    const float d = difference(t);
    const float sign = d > 0.0f ? 0.5f : (d < 0.0f ? -0.5f : 0.0f);
    return {0.5f * fabsf(d), sign + (d - d)};  // the sign of NaN is NaN
  } else if constexpr (D == Divergence::skew_forward_kl) {
    const float w = 1.0f - param;
    const Mixture m = mixture(t.p, t.q, t.u, t.near, w);
    return {m.value, w * m.share};
  } else if constexpr (D == Divergence::skew_reverse_kl) {
    const float w = 1.0f - param;
    const Mixture m = mixture(t.q, t.p, -t.u, t.near, w);
    return {m.value, param * m.share - m.log};
  } else if constexpr (D == Divergence::jsd) {
    return middle(t, 1.0f - param, series);
  } else {
    return {0.0f, 0.0f};
  }
}

}  // namespace mllmkd::cuda
