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
#pragma once

#include <cmath>

#include "cluster.cuh"
#include "rows.h"

namespace mllmkd::cuda {

constexpr float kLog2e = 1.4426950408889634f;

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

MLLMKD_DEVICE float reciprocal(float x) {
#ifdef __CUDA_ARCH__
  return __fdividef(1.0f, x);
#else
  return 1.0f / x;
#endif
}

// exp(u) − 1 − u for |u| <= 1/2, by its series: no cancellation.
MLLMKD_DEVICE float exp_minus_line(float u) {
  float sum = 1.0f / 40320;
  sum = fmaf(sum, u, 1.0f / 5040);
  sum = fmaf(sum, u, 1.0f / 720);
  sum = fmaf(sum, u, 1.0f / 120);
  sum = fmaf(sum, u, 1.0f / 24);
  sum = fmaf(sum, u, 1.0f / 6);
  sum = fmaf(sum, u, 1.0f / 2);
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

struct Token {
  float p, q, log_q;
  float u;       // log q − log p
  bool near;     // |u| < 1/2
  float u_near;  // u where near, else 0
  float bend;    // eᵘ − 1 − u of u_near
};

MLLMKD_DEVICE Token make_token(float log_p, float log_q) {
  Token t;
  t.p = exp_of(log_p);
  t.q = exp_of(log_q);
  t.log_q = log_q;
  // both masked: -inf minus -inf says nothing about the token, it has no mass in either model
  t.u = log_p == -INFINITY && log_q == -INFINITY ? 0.0f : log_q - log_p;
  t.near = fabsf(t.u) < 0.5f;
  t.u_near = t.near ? t.u : 0.0f;
  t.bend = exp_minus_line(t.u_near);
  return t;
}

// q − p, as p·expm1(u) where the two are close.
MLLMKD_DEVICE float difference(const Token& t) {
  return t.near ? t.p * (t.bend + t.u_near) : t.q - t.p;
}

struct Mixture {
  float value;  // p·(x − log1p x), x = w·expm1(u): a term of KL(p ‖ (1−w)p + w q)
  float log;    // log1p(x) = log((1−w) + w eᵘ)
  float share;  // x/(1+x) = 1 − 1/((1−w) + w eᵘ)
};

MLLMKD_DEVICE Mixture mixture(float p, float q, float u, float u_near, bool near, float w) {
  const float x = w * (exp_minus_line(u_near) + u_near);
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

// JSD, (1−w)·KL(p ‖ m) + w·KL(q ‖ m), m = (1−w)p + w q. One logarithm serves both: log m/p =
// log m/q + u.
MLLMKD_DEVICE Terms middle(const Token& t, float w) {
  const float x_p = w * (t.bend + t.u_near);  // m/p − 1, and m/q − 1
  const float x_q = (1.0f - w) * (exp_minus_line(-t.u_near) - t.u_near);
  // far from u = 0 only expm1(−|u|) is formed, as in `mixture`; there w(1−w)(q − p) cancels
  const bool of_q = t.near || t.u > 0.0f;
  const float far = (of_q ? 1.0f - w : w) * (exp_of(-fabsf(t.u)) - 1.0f);
  const float l = log1pf(t.near ? x_q : far);
  const float log_p = of_q ? l + t.u : l, log_q = of_q ? l : l - t.u;
  const float value_p = t.near ? t.p * log_defect(x_p, log_p) : -times(t.p, log_p);
  const float value_q = t.near ? t.q * log_defect(x_q, log_q) : -times(t.q, log_q);
  return {(1.0f - w) * value_p + w * value_q, -w * log_q};
}

template <Divergence D>
MLLMKD_DEVICE Terms terms(const Token& t, float param) {
  if constexpr (D == Divergence::forward_kl) {
    return {t.near ? t.p * t.bend : t.q - t.p - times(t.p, t.u), 0.0f};
  } else if constexpr (D == Divergence::reverse_kl) {
    return {t.near ? t.q * exp_minus_line(-t.u_near) : t.p - t.q + times(t.q, t.u), t.u};
  } else if constexpr (D == Divergence::soft_cross_entropy) {
    return {-times(t.p, t.log_q), 0.0f};
  } else if constexpr (D == Divergence::total_variation) {
    const float d = difference(t);
    const float sign = d > 0.0f ? 0.5f : (d < 0.0f ? -0.5f : 0.0f);
    return {0.5f * fabsf(d), sign + (d - d)};  // the sign of NaN is NaN
  } else if constexpr (D == Divergence::skew_forward_kl) {
    const float w = 1.0f - param;
    const Mixture m = mixture(t.p, t.q, t.u, t.u_near, t.near, w);
    return {m.value, w * m.share};
  } else if constexpr (D == Divergence::skew_reverse_kl) {
    const float w = 1.0f - param;
    const Mixture m = mixture(t.q, t.p, -t.u, -t.u_near, t.near, w);
    return {m.value, param * m.share - m.log};
  } else if constexpr (D == Divergence::jsd) {
    return middle(t, 1.0f - param);
  } else {
    return {0.0f, 0.0f};
  }
}

}  // namespace mllmkd::cuda
