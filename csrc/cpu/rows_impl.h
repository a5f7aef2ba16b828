// The row maths of one panel: statistics of the logits, then loss terms and their gradient. Lanes
// are tokens.
//
// Sums run over the tile's vocabulary rows in T; the driver adds tiles in double, in a fixed order.
#pragma once

#include <limits>

#include "divergence_terms.h"

namespace mllmkd::CPU_CAPABILITY {
namespace {

// Σ exp and, if wanted, Σ exp at temperature 1 and Σ x·exp(x) of the logits from `z`, less
// `offset`.
template <bool Weighted, class T>
void sum_lanes(const StatsJob<T>& job, const T* z, const Vec<T>& offset, int lane) {
  using V = Vec<T>;
  constexpr int panel = 2 * V::size();
  const V scale = V::loadu(job.scale + lane);
  V sum(T(0)), sum_plain(T(0)), weighted(T(0));
  for (int v = 0; v < job.rows; ++v) {
    const V x = V::loadu(z + v * panel) - offset;
    const V e = exp_of(x * scale);
    sum = sum + e;
    if constexpr (Weighted) weighted = weighted + times(e, x * scale);
    if (job.plain) sum_plain = sum_plain + exp_of(x);
  }
  sum.store(job.sum + lane);
  sum_plain.store(job.sum_plain + lane);
  if constexpr (Weighted) weighted.store(job.weighted + lane);
}

// Σ (z − mean)² of the tile about its own mean: `total` is Σ z.
template <class T>
void moments(const StatsJob<T>& job, const T* z, const Vec<T>& total, int lane) {
  using V = Vec<T>;
  constexpr int panel = 2 * V::size();
  const V mean = total * V(T(1) / static_cast<T>(job.rows));
  V square(T(0));
  for (int v = 0; v < job.rows; ++v) {
    const V off = V::loadu(z + v * panel) - mean;
    square = square + off * off;
  }
  mean.store(job.mean + lane);
  square.store(job.square + lane);
}

// Logits final in place (bias, soft-cap), then max and Σ exp of every token over this tile. The
// maximum is the tile's own, so one tile needs no other; a tile of −inf only gives (−inf, 0); NaN
// and +inf give NaN sums.
template <class T>
void stats_panel(const StatsJob<T>& job) {
  using V = Vec<T>;
  constexpr int W = V::size(), panel = 2 * W;
  constexpr T inf = std::numeric_limits<T>::infinity();
  const V cap(job.cap), inverse_cap(job.cap != 0 ? 1 / job.cap : 0), zero(T(0));
  for (int lane = 0; lane < panel; lane += W) {
    T* z = job.z + lane;
    V max(-inf), total(T(0));
    for (int v = 0; v < job.rows && !job.again; ++v) {
      V x = V::loadu(z + v * panel);
      const V hidden_inf = x - x;  // NaN where a hidden state was not finite: tanh would hide it
      if (job.bias) x = x + V(job.bias[v]);
      if (job.cap != 0) x = cap * tanh_of(x * inverse_cap) + hidden_inf;
      if (job.bias || job.cap != 0) x.store(z + v * panel);
      max = at::vec::maximum(max, x);
      total = total + x;
    }
    if (!job.max) continue;
    if (job.again) max = V::loadu(job.max + lane);
    const V offset = select(max, zero, max == V(-inf));
    if (!job.again) max.store(job.max + lane);
    if (job.mean) moments(job, z, total, lane);
    if (job.weighted) {
      sum_lanes<true, T>(job, z, offset, lane);
    } else {
      sum_lanes<false, T>(job, z, offset, lane);
    }
  }
}

template <class T>
void agree_panel(const AgreeJob<T>& job) {
  using V = Vec<T>;
  constexpr int W = V::size(), panel = 2 * W;
  const V zero(T(0)), one(T(1));
  for (int lane = 0; lane < panel; lane += W) {
    const V top_s = V::loadu(job.top_s + lane), top_t = V::loadu(job.top_t + lane);
    V found = zero;
    for (int64_t v = lane; v < lane + static_cast<int64_t>(job.rows) * panel; v += panel) {
      found = found | ((V::loadu(job.z_s + v) == top_s) & (V::loadu(job.z_t + v) == top_t));
    }
    select(zero, one, found).store(job.found + lane);
  }
}

// d(logit)/d(product): 1 − (z/c)² of a soft-capped head.
template <class V>
inline V cap_factor(const V& z, const V& inverse_cap) {
  const V r = z * inverse_cap;
  return V(static_cast<typename V::value_type>(1)) - r * r;
}

// One half of a panel. `Values`: sum D and Σ q g; `Gradient`: write g.
template <Divergence D, bool Values, bool Gradient, class T>
void loss_lanes(const LossJob<T>& job, int lane) {
  using V = Vec<T>;
  constexpr int panel = 2 * V::size();
  const V zero(T(0)), ce_scale(job.ce_scale);
  const V scale_s = V::loadu(job.scale_s + lane), scale_t = V::loadu(job.scale_t + lane);
  const V inverse_cap(job.cap != 0 ? 1 / job.cap : 0);
  const V kd_weight = V::loadu(job.kd_weight + lane), ce_weight = V::loadu(job.ce_weight + lane);
  const V kd_factor = kd_weight * scale_s, ce_factor = ce_weight * ce_scale;
  const V no_kd = kd_weight == zero, no_ce = ce_weight == zero;
  const V top_s = V::loadu(job.top_s + lane), rest_s = V::loadu(job.rest_s + lane);
  const V top_t = V::loadu(job.top_t + lane), rest_t = V::loadu(job.rest_t + lane);
  const V top_ce = V::loadu(job.top_ce + lane), rest_ce = V::loadu(job.rest_ce + lane);
  const V mean = V::loadu(job.mean + lane);
  const bool standard = D != Divergence::none && job.shift;
  const V shift = standard ? V::loadu(job.shift + lane) : zero;
  const V pull = standard ? V::loadu(job.pull + lane) : zero;
  V value(T(0)), slope(T(0)), along(T(0)), centre(T(0));
  for (int v = 0; v < job.rows; ++v) {
    const V z = V::loadu(job.z_s + v * panel + lane);
    V g = zero, q = zero;
    if constexpr (D != Divergence::none) {
      const V z_t = V::loadu(job.z_t + v * panel + lane);
      const Token<V> token =
          make_token<V>((z_t - top_t) * scale_t - rest_t, (z - top_s) * scale_s - rest_s);
      const Terms<V> t = terms<D>(token, job.param);
      q = token.q;
      if constexpr (Values) value = value + t.value;
      if constexpr (needs_mean(D)) {
        const V qg = times(token.q, t.slope);
        if constexpr (Values) slope = slope + qg, g = qg;
        if constexpr (Gradient) g = qg - token.q * mean;
      } else {
        g = difference(token);
      }
      if (standard) {
        const V a = (z - top_s) * scale_s + shift;
        if constexpr (Values) along = along + g * a, centre = centre + token.q * a;
        if constexpr (Gradient) g = g - a * pull;
      }
      g = g * kd_factor;
    }
    if constexpr (Gradient) {
      const V factor = job.cap != 0 ? cap_factor(z, inverse_cap) : V(T(1));
      g = select(g * factor, zero, no_kd);
      if (job.ce) {
        if (!job.shared) q = exp_of((z - top_ce) * ce_scale - rest_ce);
        g = g + select(q * ce_factor * factor, zero, no_ce);
      }
      g.store(job.g + v * panel + lane);
    }
  }
  if constexpr (Values) {
    value.store(job.value + lane);
    slope.store(job.slope + lane);
    if (standard) along.store(job.along + lane), centre.store(job.centre + lane);
  }
}

template <Divergence D, class T>
void loss_of(const LossJob<T>& job) {
  constexpr int W = Vec<T>::size();
  for (int lane = 0; lane < 2 * W; lane += W) {
    if (job.value && job.g) {
      loss_lanes<D, true, true>(job, lane);
    } else if (job.value) {
      loss_lanes<D, true, false>(job, lane);
    } else {
      loss_lanes<D, false, true>(job, lane);
    }
  }
}

template <class T>
void loss_panel(const LossJob<T>& job) {
  switch (job.divergence) {
    case Divergence::forward_kl: return loss_of<Divergence::forward_kl>(job);
    case Divergence::reverse_kl: return loss_of<Divergence::reverse_kl>(job);
    case Divergence::jsd: return loss_of<Divergence::jsd>(job);
    case Divergence::skew_forward_kl: return loss_of<Divergence::skew_forward_kl>(job);
    case Divergence::skew_reverse_kl: return loss_of<Divergence::skew_reverse_kl>(job);
    case Divergence::total_variation: return loss_of<Divergence::total_variation>(job);
    case Divergence::soft_cross_entropy: return loss_of<Divergence::soft_cross_entropy>(job);
    case Divergence::none: return loss_of<Divergence::none>(job);
  }
}

}  // namespace
}  // namespace mllmkd::CPU_CAPABILITY
