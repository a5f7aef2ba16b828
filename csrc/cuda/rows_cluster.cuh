// Loss terms and gradient of one row of logits by one thread-block cluster: each CTA keeps a slice
// of the pair (z_s, z_t) in its shared memory, so that the pair is read from memory once.
//
//   load       z final (bias, soft-cap) into shared memory; the two maxima
//   moments    of z-scored logits: μ, then σ, of both
//   sums       Σ exp(z − max): three log-sum-exps
//   values     D = Σ f and, where it needs no Σ q g, at once
//              dz = ce_weight·(softmax(z) − onehot) + kd_weight/T·dD/da, through the soft-cap
//   gradient   dz of the divergences that need Σ q g, and of z-scored logits, from q·g kept in
//              shared memory
//
// Z-scored logits a = (z − μ)/(T(σ + ε)) have a scale per row in the place of 1/T, and with
// G = ∂D/∂a a part of dz goes back through σ: mllmkd_kernels/zscore.py has the formula.
//
// dz may overwrite the row in memory: a thread writes the columns that it has read. W: columns
// moved at once, 4 where rows are aligned to 16 bytes, whatever V is, else 1.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "divergence.cuh"

namespace mllmkd::cuda {

template <class T, int W>
struct alignas(W * sizeof(T)) Pack {
  T at[W];
};

using Memory = Reductions<5, 4>;

static_assert(sizeof(Memory) == kReductionBytes);

// One of the two rows, as it is read.
struct Source {
  const float* z;
  const void* bias;
  BiasType type;
  float cap, inverse_cap;
  float broken;  // NaN or 0
};

MLLMKD_DEVICE float bias_at(const Source& from, int64_t k) {
  switch (from.type) {
    case BiasType::bf16: return static_cast<const c10::BFloat16*>(from.bias)[k];
    case BiasType::f16: return static_cast<const c10::Half*>(from.bias)[k];
    default: return static_cast<const float*>(from.bias)[k];
  }
}

// The logit as the definitions mean it: bias, then c·tanh(z/c), NaN where a hidden state was.
MLLMKD_DEVICE float final_logit(const Source& from, float z, int64_t k) {
  if (from.bias) z += bias_at(from, k);
  if (from.cap != 0.0f) z = from.cap * tanhf(z * from.inverse_cap) + from.broken;
  return z;
}

constexpr float kSpreadEps = 1e-7f;  // beside σ: `zscore.EPS` in Python

// A pointer into the GPU's memory that is at hand: the compiler would add the row's offset anew at
// every column.
template <class T>
MLLMKD_DEVICE T* in_register(T* p) {
#ifdef __CUDA_ARCH__
  asm("" : "+l"(p));
  __builtin_assume(__isGlobal(p));
#endif
  return p;
}

template <Divergence D, bool Scored, int W, class Block>
class Row {
  static constexpr bool kTeacher = D != Divergence::none;
  static constexpr bool kMeanFirst = needs_mean(D) || Scored;
  static_assert(kTeacher || !Scored);
  // Packs of each row that a thread has in flight while it loads: 1,024 threads of an SM then wait
  // for 32 KiB or more, twice what latency times bandwidth asks for; more would spill.
  static constexpr int kInFlight = W == 4 ? 2 : 4;
  using Floats = Pack<float, W>;

 public:
  MLLMKD_DEVICE Row(const Block& block, const RowsJob& job)
      : block_(block),
        job_(job),
        row_(block.cluster),
        begin_(block.rank * job.slice),
        count_(min_of(job.vocab - begin_, job.slice)),
        memory_(*reinterpret_cast<Memory*>(block.shared)),
        z_s_(block.shared + sizeof(Memory) / sizeof(float)),
        z_t_(z_s_ + job.slice) {
    const int64_t at = row_ * job.dz_stride + begin_, entry = job.dz_bf16 ? 2 : 4;
    dz_ = static_cast<char*>(job.dz) + at * entry;
    if constexpr (!Scored) dz_ = in_register(dz_);  // with moments there is no register left for it
    const int64_t label = job.labels ? job.labels[row_] : job.ignore_index;
    has_label_ = label != job.ignore_index;
    label_in_range_ = label >= 0 && label < job.vocab;
    hot_ = has_label_ && label_in_range_ ? static_cast<int>(label) - begin_ : -1;
    ce_weight_ = has_label_ && job.ce_weight ? job.ce_weight[row_] : 0.0f;
    kd_weight_ = kTeacher ? job.kd_weight[row_] : 0.0f;
  }

  MLLMKD_DEVICE void run() {
    block_.cluster_arrive(false);
    load();
    if constexpr (Scored) moments();
    sums();
    const bool live = job_.dz && (ce_weight_ != 0.0f || kd_weight_ != 0.0f);
    float totals[Scored ? 4 : 2] = {};  // D, Σ q g; Σ a G but for that mean, Σ a q
    if constexpr (kTeacher) {
      if (kMeanFirst || !live) {
        value_sweep<false>(totals);
      } else {
        value_sweep<true>(totals);
      }
      cluster_reduce<Sum>(block_, memory_, 2, true, totals);
    }
    if constexpr (Scored) pull_ *= totals[2] - totals[1] * totals[3];
    if (live && (kMeanFirst || !kTeacher)) gradient_sweep(totals[1]);
    if (job_.dz && !live) zero_gradient();
    write_terms(totals[0]);
  }

 private:
  static MLLMKD_DEVICE int min_of(int a, int b) { return a < b ? a : b; }

  MLLMKD_DEVICE Source student() const {
    const float cap = job_.cap_s;
    return {
        job_.z_s + row_ * job_.stride,
        job_.b_s,
        job_.b_s_type,
        cap,
        cap != 0 ? 1 / cap : 0,
        job_.broken_s && job_.broken_s[row_] ? NAN : 0.0f};
  }

  MLLMKD_DEVICE Source teacher() const {
    const float cap = job_.cap_t;
    return {
        job_.z_t + row_ * job_.stride,
        job_.b_t,
        job_.b_t_type,
        cap,
        cap != 0 ? 1 / cap : 0,
        job_.broken_t && job_.broken_t[row_] ? NAN : 0.0f};
  }

  // Both rows into shared memory; then the maxima.
  MLLMKD_DEVICE void load() {
    const Source s = student(), t = kTeacher ? teacher() : Source{};
    const bool as_they_are = !s.bias && s.cap == 0.0f && !t.bias && t.cap == 0.0f;
    float top[2] = {-INFINITY, -INFINITY};
    as_they_are ? copy<true>(s, t, top) : copy<false>(s, t, top);
    cluster_reduce<Max>(block_, memory_, 0, false, top);
    top_s_ = top[0], top_t_ = top[1];
  }

  template <bool AsTheyAre>
  MLLMKD_DEVICE void copy(const Source& s, const Source& t, float (&top)[2]) const {
    const float* from_s = in_register(s.z + begin_);
    const float* from_t = kTeacher ? in_register(t.z + begin_) : nullptr;
    const int step = block_.threads * W, whole = AsTheyAre ? count_ / W * W : count_;
    for (int first = block_.thread * W; first < whole; first += step * kInFlight) {
      Floats x[kInFlight], y[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int k = first + i * step;
        if (k >= whole) break;
        x[i] = *reinterpret_cast<const Floats*>(from_s + k);
        if constexpr (kTeacher) y[i] = *reinterpret_cast<const Floats*>(from_t + k);
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int k = first + i * step;
        if (k >= whole) break;
        top[0] = fmaxf(top[0], keep<AsTheyAre>(s, x[i], k, z_s_));
        if constexpr (kTeacher) top[1] = fmaxf(top[1], keep<AsTheyAre>(t, y[i], k, z_t_));
      }
    }
    if constexpr (AsTheyAre && W > 1) {
      if (block_.thread != 0 || whole >= count_) return;  // a pack that ends the row
      top[0] = fmaxf(top[0], keep<true>(s, cut(from_s, whole), whole, z_s_));
      if constexpr (kTeacher)
        top[1] = fmaxf(top[1], keep<true>(t, cut(from_t, whole), whole, z_t_));
    }
  }

  // The last pack of a row, −inf past its end.
  MLLMKD_DEVICE Floats cut(const float* from, int k) const {
    Floats x;
#pragma unroll
    for (int i = 0; i < W; ++i) x.at[i] = k + i < count_ ? from[k + i] : -INFINITY;
    return x;
  }

  // Writes one pack of final logits; returns their maximum.
  template <bool AsTheyAre>
  MLLMKD_DEVICE float keep(const Source& from, Floats x, int k, float* to) const {
    float top = -INFINITY;
#pragma unroll
    for (int i = 0; i < W; ++i) {
      if constexpr (!AsTheyAre) {
        x.at[i] = k + i < count_ ? final_logit(from, x.at[i], begin_ + k + i) : -INFINITY;
      }
      top = fmaxf(top, x.at[i]);
    }
    *reinterpret_cast<Floats*>(to + k) = x;
    return top;
  }

  // μ and σ of both rows, about the maximum and then about μ, so that nothing cancels: the scales,
  // where the mean is in units of a, and what goes back through σ for each unit of Σ G a.
  MLLMKD_DEVICE void moments() {
    float below[2] = {0.0f, 0.0f}, square[2] = {0.0f, 0.0f};
    const float count = static_cast<float>(job_.vocab);
    for_logits([&](float x, float y) { below[0] += x - top_s_, below[1] += y - top_t_; });
    cluster_reduce<Sum>(block_, memory_, 3, true, below);
    below[0] /= count, below[1] /= count;
    for_logits([&](float x, float y) {
      const float off_s = x - top_s_ - below[0], off_t = y - top_t_ - below[1];
      square[0] += off_s * off_s, square[1] += off_t * off_t;
    });
    cluster_reduce<Sum>(block_, memory_, 4, true, square);
    const float std = sqrtf(square[0] / count), spread = std + kSpreadEps;
    scale_s_ = job_.scale / spread;
    scale_t_ = job_.scale / (sqrtf(square[1] / count) + kSpreadEps);
    shift_ = -below[0] * scale_s_;
    pull_ = std == 0.0f ? 0.0f : spread / (std * count * job_.scale * job_.scale);
  }

  // f(z_s, z_t) of every column of this thread.
  template <class F>
  MLLMKD_DEVICE void for_logits(const F& f) const {
    for (int k = block_.thread * W; k < count_; k += block_.threads * W) {
      const Floats x = *reinterpret_cast<const Floats*>(z_s_ + k);
      const Floats y = *reinterpret_cast<const Floats*>(z_t_ + k);
#pragma unroll
      for (int i = 0; i < W; ++i) {
        if (W == 1 || k + i < count_) f(x.at[i], y.at[i]);
      }
    }
  }

  // The log-sum-exps, in two parts each: log q = (z − top)/T − rest, since a sum of 60 would round
  // log q by 4e-6. To the base 2, but for the cross-entropy's own.
  MLLMKD_DEVICE void sums() {
    float sum[3] = {0.0f, 0.0f, 0.0f};  // student at T, student at 1, teacher at T
    for (int k = block_.thread * W; k < count_; k += block_.threads * W) {
      const Floats x = *reinterpret_cast<const Floats*>(z_s_ + k);
      if constexpr (kTeacher) {
        const Floats y = *reinterpret_cast<const Floats*>(z_t_ + k);
        sum[0] += sum_exp(x, top_s_, scale_s());
        sum[2] += sum_exp(y, top_t_, scale_t());
      }
      if (own_softmax()) sum[1] += sum_exp(x, top_s_, 1.0f);
    }
    cluster_reduce<Sum>(block_, memory_, 1, true, sum);
    rest_s_ = log2f(sum[0]), rest_t_ = log2f(sum[2]);
    rest_plain_ = logf(own_softmax() ? sum[1] : sum[0]);
  }

  static MLLMKD_DEVICE float sum_exp(const Floats& x, float top, float scale) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < W; ++i) sum += exp2_of((x.at[i] - top) * (scale * kLog2e));
    return sum;
  }

  // Does the cross-entropy, which takes no temperature, need a softmax of its own?
  MLLMKD_DEVICE bool own_softmax() const { return !kTeacher || Scored || job_.scale != 1.0f; }

  // One pass over shared memory: D and Σ q g. `Gradient`: write dz as well. Where dz has to wait
  // for Σ q g, each q·g takes the place of the teacher's logit, which nobody needs again; q − p
  // where it waits for σ alone.
  template <bool Gradient, int N>
  MLLMKD_DEVICE void value_sweep(float (&totals)[N]) const {
    for (int k = block_.thread * W; k < count_; k += block_.threads * W) {
      const Floats x = *reinterpret_cast<const Floats*>(z_s_ + k);
      const Floats y = *reinterpret_cast<const Floats*>(z_t_ + k);
      Floats da, q, qg;
#pragma unroll
      for (int i = 0; i < W; ++i) {
        const Token token =
            make_token((y.at[i] - top_t_) * (scale_t() * kLog2e) - rest_t_, log2_q(x.at[i]));
        const Terms term = terms<D>(token, job_.param, job_.series);
        totals[0] += term.value;
        q.at[i] = token.q;
        if constexpr (needs_mean(D)) {
          qg.at[i] = times(token.q, term.slope);
          totals[1] += qg.at[i];
        } else {
          da.at[i] = qg.at[i] = difference(token);
        }
        if constexpr (Scored) {
          const float a = score(x.at[i]);
          totals[2] += qg.at[i] * a, totals[3] += token.q * a;
        }
      }
      if constexpr (kMeanFirst) *reinterpret_cast<Floats*>(z_t_ + k) = qg;
      if constexpr (Gradient) write_gradient(k, gradient(x, da, q, hot_ - k));
    }
  }

  // dz from Σ q g and what goes back through σ, or of the cross-entropy alone.
  MLLMKD_DEVICE void gradient_sweep(float mean) const {
    for (int k = block_.thread * W; k < count_; k += block_.threads * W) {
      const Floats x = *reinterpret_cast<const Floats*>(z_s_ + k);
      Floats da{}, q{};
      if constexpr (kTeacher) {
        const Floats qg = *reinterpret_cast<const Floats*>(z_t_ + k);
#pragma unroll
        for (int i = 0; i < W; ++i) {
          q.at[i] = exp2_of(log2_q(x.at[i]));
          da.at[i] = needs_mean(D) ? qg.at[i] - q.at[i] * mean : qg.at[i];
          if constexpr (Scored) da.at[i] -= score(x.at[i]) * pull_;
        }
      }
      write_gradient(k, gradient(x, da, q, hot_ - k));
    }
  }

  // Of the logits that the divergence sees: one a row where they are z-scored.
  MLLMKD_DEVICE float scale_s() const { return Scored ? scale_s_ : job_.scale; }
  MLLMKD_DEVICE float scale_t() const { return Scored ? scale_t_ : job_.scale; }

  MLLMKD_DEVICE float log2_q(float z) const {
    return (z - top_s_) * (scale_s() * kLog2e) - rest_s_;
  }

  // The student's z-score divided by T; 0 past the end of the row.
  MLLMKD_DEVICE float score(float z) const {
    return z == -INFINITY ? 0.0f : (z - top_s_) * scale_s_ + shift_;
  }

  // dL/d(product) of one pack of tokens. `da` = dD/da, `q` the softmax at T, `hot` the place of the
  // label. A term of zero weight is 0, NaN or not.
  MLLMKD_DEVICE Floats gradient(const Floats& z, const Floats& da, Floats q, int hot) const {
    const float kd_factor = kd_weight_ * scale_s();
    Floats dz;
#pragma unroll
    for (int i = 0; i < W; ++i) dz.at[i] = kd_factor * da.at[i];
    if (kd_weight_ == 0.0f) [[unlikely]]
      dz = Floats{};
    if (ce_weight_ != 0.0f) {
      if (own_softmax()) [[unlikely]] {  // a jump: it would be issued and thrown away
#pragma unroll
        for (int i = 0; i < W; ++i) q.at[i] = exp_of((z.at[i] - top_s_) - rest_plain_);
      }
      if (0 <= hot && hot < W) [[unlikely]] {
#pragma unroll
        for (int i = 0; i < W; ++i) q.at[i] -= i == hot;
      }
#pragma unroll
      for (int i = 0; i < W; ++i) dz.at[i] += ce_weight_ * q.at[i];
    }
    if (job_.cap_s != 0.0f) {
      const float inverse_cap = 1.0f / job_.cap_s;
#pragma unroll
      for (int i = 0; i < W; ++i) {
        const float r = z.at[i] * inverse_cap;
        dz.at[i] *= 1.0f - r * r;
      }
    }
    return dz;
  }

  MLLMKD_DEVICE void write_gradient(int k, const Floats& dz) const {
    if (job_.dz_bf16) {
      Pack<c10::BFloat16, W> half;
#pragma unroll
      for (int i = 0; i < W; ++i) half.at[i] = c10::BFloat16(dz.at[i]);
      *reinterpret_cast<Pack<c10::BFloat16, W>*>(dz_ + sizeof(c10::BFloat16) * k) = half;
    } else {
      *reinterpret_cast<Floats*>(dz_ + sizeof(float) * k) = dz;
    }
  }

  MLLMKD_DEVICE void zero_gradient() const {
    for (int k = block_.thread * W; k < count_; k += block_.threads * W) {
      write_gradient(k, Floats{});
    }
  }

  // CE by the CTA that holds the label's logit, D by the first.
  MLLMKD_DEVICE void write_terms(float value) const {
    if (block_.thread != 0) return;
    if (block_.rank == 0) job_.kd[row_] = value;
    if (has_label_ && job_.ce_weight) {
      if (hot_ >= 0 && hot_ < count_) job_.ce[row_] = rest_plain_ - (z_s_[hot_] - top_s_);
      if (!label_in_range_ && block_.rank == 0) job_.ce[row_] = NAN;
    } else if (block_.rank == 0) {
      job_.ce[row_] = 0.0f;
    }
  }

  const Block& block_;
  const RowsJob& job_;
  int64_t row_;
  int begin_, count_;  // this CTA's columns; count_ <= 0: none
  char* dz_;           // of the first of them
  Memory& memory_;
  float *z_s_, *z_t_;  // final logits, in shared memory
  int hot_;            // the label's column, relative to begin_
  bool has_label_, label_in_range_;
  float ce_weight_, kd_weight_;
  float top_s_, top_t_;
  float rest_s_, rest_plain_, rest_t_;
  // Of z-scored logits: 1/(T(σ + ε)), (top − μ) times that, what is taken from G for each a.
  float scale_s_, scale_t_, shift_, pull_;
};

}  // namespace mllmkd::cuda
