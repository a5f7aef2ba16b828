// One token's share of a divergence: the C++ twin of mllmkd_kernels/divergence.py, row for row,
// under its names.
//
// With u = log q − log p (a, b the scaled logits; p teacher, q student):
//   value(f)  up to a multiple of q − p, which sums to zero: every term second-order small where
//   the models agree; slope(g)  ∂f/∂q up to a constant, vanishing at u = 0; dD/da = q·(g − Σ q g),
//   or q − p directly.
// Near (|u| < 1/2) the terms come from series; far they are in p and q, because p·expm1(u) may
// overflow.
#pragma once

#include "kernels.h"
#include "vecmath.h"

namespace mllmkd::CPU_CAPABILITY {
namespace {

template <class V>
struct Token {
  V p, q, log_q;
  V u;       // log q − log p
  V near;    // mask |u| < 1/2
  V u_near;  // u where near, else 0
};

template <class V>
inline Token<V> make_token(const V& log_p, const V& log_q) {
  using T = typename V::value_type;
  Token<V> t;
  t.p = exp_of(log_p);
  t.q = exp_of(log_q);
  t.log_q = log_q;
  t.u = log_q - log_p;
  // both masked: -inf minus -inf says nothing about the token, it has no mass in either model
  const V masked(-std::numeric_limits<T>::infinity());
  t.u = select(t.u, V(static_cast<T>(0)), (log_p == masked) & (log_q == masked));
  t.near = t.u.abs() < V(static_cast<T>(0.5));
  t.u_near = select(V(static_cast<T>(0)), t.u, t.near);
  return t;
}

// p·x with 0·inf = 0: a token without mass contributes nothing.
template <class V>
inline V times(const V& p, const V& x) {
  const V zero(static_cast<typename V::value_type>(0));
  return select(p * x, zero, p == zero);
}

// q − p, as p·expm1(u) where the two are close.
template <class V>
inline V difference(const Token<V>& t) {
  return select(t.q - t.p, t.p * (exp_minus_line(t.u_near) + t.u_near), t.near);
}

template <class V>
struct Mixture {
  V value;  // p·(x − log1p x), x = w·expm1(u): a term of KL(p ‖ (1−w)p + w q)
  V log;    // log1p(x) = log((1−w) + w eᵘ)
  V share;  // x/(1+x) = 1 − 1/((1−w) + w eᵘ)
};

template <class V>
inline Mixture<V> mixture(
    const V& p, const V& q, const V& u, const V& u_near, const V& near,
    typename V::value_type weight) {
  using T = typename V::value_type;
  const V one(static_cast<T>(1)), zero(static_cast<T>(0)), w(weight);
  const V x = w * (exp_minus_line(u_near) + u_near);
  // far from u = 0 only expm1(−|u|) is formed: log((1−w) + w eᵘ) = u + log1p((1−w) expm1(−u)) for u
  // > 0
  const V up = u > zero;
  const V e = exp_of(u.abs().neg());
  const V t = select(select(w, one - w, up) * (e - one), x, near);
  const V l = log1p_of(t), inverse = one / (one + t);
  Mixture<V> m;
  m.share = select(one - select(inverse, e * inverse, up), x * inverse, near);
  m.log = l + select(select(zero, u, up), zero, near);
  m.value = select(w * (q - p) - times(p, m.log), p * log_defect(x, l), near);
  return m;
}

template <class V>
struct Terms {
  V value, slope;
};

template <Divergence D, class V>
inline Terms<V> terms(const Token<V>& t, typename V::value_type param) {
  using T = typename V::value_type;
  const V zero(static_cast<T>(0));
  if constexpr (D == Divergence::forward_kl) {
    return {select(t.q - t.p - times(t.p, t.u), t.p * exp_minus_line(t.u_near), t.near), zero};
  } else if constexpr (D == Divergence::reverse_kl) {
    return {select(t.p - t.q + times(t.q, t.u), t.q * exp_minus_line(t.u_near.neg()), t.near), t.u};
  } else if constexpr (D == Divergence::soft_cross_entropy) {
    return {times(t.p, t.log_q).neg(), zero};
  } else if constexpr (D == Divergence::total_variation) {
    const V d = difference(t), half(static_cast<T>(0.5));
    const V sign = select(select(zero, half, d > zero), half.neg(), d < zero);
    return {half * d.abs(), sign + (d - d)};  // the sign of NaN is NaN
  } else if constexpr (D == Divergence::skew_forward_kl) {
    const T w = static_cast<T>(1) - param;
    const Mixture<V> m = mixture(t.p, t.q, t.u, t.u_near, t.near, w);
    return {m.value, V(w) * m.share};
  } else if constexpr (D == Divergence::skew_reverse_kl) {
    const T w = static_cast<T>(1) - param;
    const Mixture<V> m = mixture(t.q, t.p, t.u.neg(), t.u_near.neg(), t.near, w);
    return {m.value, V(param) * m.share - m.log};
  } else {  // jsd
    const T rest = static_cast<T>(1) - param;
    const Mixture<V> m_p = mixture(t.p, t.q, t.u, t.u_near, t.near, rest);
    const Mixture<V> m_q = mixture(t.q, t.p, t.u.neg(), t.u_near.neg(), t.near, param);
    return {V(param) * m_p.value + V(rest) * m_q.value, V(-rest) * m_q.log};
  }
}

}  // namespace
}  // namespace mllmkd::CPU_CAPABILITY
