// Cross-entropy and divergence from hidden states, with gradients: two sweeps over the vocabulary
// per chunk of rows.
//
//   sweep 1  tiles of z_s and z_t are multiplied, kept (2·C·V numbers, the whole workspace), and
//   reduced to
//            log-sum-exps while still in cache;
//   sweep 2  with the log-sum-exps known, tiles are read back and become loss terms (second-order
//   small where the
//            models agree) and G = dL/dz, which is multiplied into dH and dW at once and not
//            stored; or takes the place of z_s, where dW is to be formed of it later.
// Divergences whose gradient needs Σ q g take a sweep of values in between. So do z-scored logits
// a = (z − μ)/(T(σ + ε)), whose tiles are also read for their log-sum-exps once σ is known: with
// G = ∂D/∂a, dD/dz = (G − a·T²(σ + ε)/(σV)·Σ G a)/(T(σ + ε)). All reductions over tiles are in
// double.
#include <ATen/Parallel.h>

#include <cmath>

#include "gradients.h"
#include "labels.h"
#include "softmax_stats.h"

namespace mllmkd {
namespace {

struct Options {
  Divergence divergence;
  double param, temperature, cap_s, cap_t;
  int64_t vocab, ignore_index;
  Wanted wanted;
  bool diagnostics, standardize;  // the latter of a divergence's logits
  Optional main_grad;             // what dW times `factor` is added to
  double factor;
};

template <class T>
class Distill {
 public:
  Distill(
      const at::Tensor& hs, const at::Tensor& ws, const Optional& bs, const Optional& ht,
      const Optional& wt, const Optional& bt, const Options& o, const Chunks& chunks)
      : o_(o),
        kernels_(kernels<T>()),
        chunk_(chunks.padded),
        tiles_(tiles_of(o.vocab)),
        panels_(chunk_ / kernels_.panel),
        student_(hs, ws, bs, o.cap_s, o.vocab, chunk_, "student"),
        stats_s_(o.vocab, chunk_, o.temperature, {true, o.diagnostics, o.standardize}),
        stats_t_(o.vocab, chunk_, o.temperature, {false, o.diagnostics, o.standardize}),
        rows_(chunk_),
        gradients_(
            hs, ws, o.vocab, chunk_, chunks.count > 1, o.wanted, kReal, o.main_grad,
            static_cast<T>(o.factor)),
        mean_(chunk_),
        values_(tiles_, chunk_ * sizeof(T)),
        slopes_(tiles_, chunk_ * sizeof(T)),
        pull_(o.standardize ? chunk_ : 0),
        along_(o.standardize ? tiles_ : 0, chunk_ * sizeof(T)),
        centre_(o.standardize ? tiles_ : 0, chunk_ * sizeof(T)),
        agree_(o.diagnostics ? tiles_ : 0, chunk_ * sizeof(T)) {
    if (ht) teacher_.emplace(*ht, *wt, bt, o.cap_t, o.vocab, chunk_, "teacher");
    const int64_t panel = kernels_.panel, bytes = kTile * panel * sizeof(T);
    if (o.wanted.dz) {
      const int64_t panels = (hs.size(0) + panel - 1) / panel;
      dz_ = kept_tensor({tiles_, panels, kTile, panel}, kReal);
      z_s_ = {Buffer(dz_, tiles_ * panels), panels, 0};
    } else {
      z_s_ = {Buffer::kept(tiles_ * panels_, bytes), panels_, 0};
    }
    if (ht) z_t_ = {Buffer::kept(tiles_ * panels_, bytes), panels_, 0};
  }

  void run_chunk(
      int64_t row, int64_t count, const int64_t* labels, const T* ce, const T* kd, bool last) {
    used_panels_ = (count + kernels_.panel - 1) / kernels_.panel;
    if (o_.wanted.dz) z_s_.first = row / kernels_.panel;
    student_.load(row, count);
    if (teacher_) teacher_->load(row, count);
    rows_.load(row, count, labels, ce, kd, o_.ignore_index);
    ce_ = labels != nullptr;
    sweep_logits();
    const bool early =
        teacher_ && (needs_mean(o_.divergence) || !o_.wanted.any() || o_.standardize);
    if (early) sweep_losses(true, false);
    if (!o_.wanted.any()) return;
    gradients_.load(row, count, rows_.live.get(), last);
    sweep_losses(!early && teacher_, true);
    gradients_.finish_chunk();
  }

  // Per-row results of the last chunk.
  double ce(int64_t c) const {
    return static_cast<double>(stats_s_.rest_plain()[c]) -
           (static_cast<double>(rows_.label_logit[c]) - stats_s_.top()[c]);
  }
  double kd(int64_t c) const { return total(values_, c); }
  double entropy_s(int64_t c) const { return stats_s_.entropy(c); }
  double entropy_t(int64_t c) const { return stats_t_.entropy(c); }
  bool agree(int64_t c) const { return total(agree_, c) > 0; }
  const ChunkRows<T>& rows() const { return rows_; }
  const Gradients<T>& gradients() const { return gradients_; }
  // dW, or in its place dz of all rows.
  at::Tensor dw() const { return o_.wanted.dz ? dz_ : gradients_.dw(); }

 private:
  // (tiles, panels) of (kTile, panel); the chunk's own panels begin at `first`.
  struct Logits {
    Buffer tiles;
    int64_t panels = 0, first = 0;
  };

  T* tile(const Logits& z, int64_t v, int64_t panel) {
    return z.tiles.template part<T>(v / kTile * z.panels + z.first + panel);
  }
  double total(const Buffer& tiles, int64_t c) const {
    double sum = 0;
    for (int64_t i = 0; i < tiles_; ++i) sum += tiles.part<T>(i)[c];
    return sum;
  }

  // f(first vocabulary row, rows, first panel, panels, thread) for every block of every tile.
  template <class F>
  void for_blocks(const Product<T>& product, bool any_order, const F& f) {
    const int64_t step = product.depth / kernels_.panel;
    for_tiles(product, o_.vocab, any_order, [&](int64_t v, int m, int thread) {
      for (int64_t p = 0; p < used_panels_; p += step) {
        f(v, m, p, std::min(step, used_panels_ - p), thread);
      }
    });
  }

  void sweep_logits() {
    stats_s_.start(), stats_t_.start();
    for_blocks(student_.product(), true, [&](int64_t v, int m, int64_t p, int64_t n, int thread) {
      logits_block(student_, stats_s_, z_s_, v, m, p, n, thread);
      const int panel = kernels_.panel;
      rows_.with_label_in(v, m, p * panel, n * panel, [&](int64_t c, int64_t label) {
        rows_.label_logit[c] = tile(z_s_, v, c / panel)[(label - v) * panel + c % panel];
      });
    });
    stats_s_.merge();
    if (o_.standardize) sweep_z_scores(stats_s_, z_s_);
    if (!teacher_) return;
    for_blocks(teacher_->product(), true, [&](int64_t v, int m, int64_t p, int64_t n, int thread) {
      logits_block(*teacher_, stats_t_, z_t_, v, m, p, n, thread);
    });
    stats_t_.merge();
    if (o_.standardize) sweep_z_scores(stats_t_, z_t_);
  }

  void sweep_z_scores(SoftmaxStats<T>& stats, const Logits& z) {
    stats.standardize();
    for_blocks(student_.product(), true, [&](int64_t v, int m, int64_t p, int64_t n, int) {
      for (int64_t i = p; i < p + n; ++i) stats.again(v, m, i, tile(z, v, i));
    });
    stats.merge_again();
  }

  void logits_block(
      const Head<T>& head, SoftmaxStats<T>& stats, const Logits& z, int64_t v, int m, int64_t p,
      int64_t n, int thread) {
    head.products(v, m, p, n, thread, tile(z, v, p));
    for (int64_t i = p; i < p + n; ++i) stats.add(head, v, m, i, tile(z, v, i));
  }

  void sweep_losses(bool values, bool gradients) {
    const bool any_order = !gradients || !o_.wanted.dh;
    for_blocks(
        student_.product(), any_order, [&](int64_t v, int m, int64_t p, int64_t n, int thread) {
          for (int64_t i = p; i < p + n; ++i) {
            loss_panel(v, m, i, values, gradients ? gradients_.panel(thread) : nullptr);
            if (values && o_.diagnostics) agree_panel(v, m, i);
            if (!gradients) continue;
            gradients_.add_panel(v, m, i - p, thread);
            if (o_.wanted.dz) keep(v, m, i, gradients_.panel(thread));
          }
          if (gradients) gradients_.multiply(v, m, p, n, thread);
        });
    for (int64_t c = 0; values && c < chunk_; ++c) {
      const double mean = total(slopes_, c);
      mean_[c] = static_cast<T>(mean);
      if (!o_.standardize) continue;
      const double along = total(along_, c) - mean * total(centre_, c);
      pull_[c] = static_cast<T>(stats_s_.through()[c] * along);
    }
  }

  // G in the place of z_s; the last tile is filled up, for a result that has the same bits always.
  void keep(int64_t v, int m, int64_t i, const T* g) {
    T* to = std::copy_n(g, m * kernels_.panel, tile(z_s_, v, i));
    std::fill_n(to, (kTile - m) * kernels_.panel, T(0));
  }

  void agree_panel(int64_t v, int m, int64_t i) {
    const int64_t c0 = i * kernels_.panel;
    kernels_.agree(
        {tile(z_s_, v, i), tile(z_t_, v, i), m, stats_s_.top() + c0, stats_t_.top() + c0,
         agree_.part<T>(v / kTile) + c0});
  }

  void loss_panel(int64_t v, int m, int64_t i, bool values, T* g) {
    const int panel = kernels_.panel;
    const int64_t c0 = i * panel;
    LossJob<T> job{};
    job.divergence = teacher_ ? o_.divergence : Divergence::none;
    job.param = static_cast<T>(o_.param);
    job.z_s = tile(z_s_, v, i), job.z_t = teacher_ ? tile(z_t_, v, i) : nullptr, job.rows = m;
    job.ce_scale = 1, job.cap = student_.cap();
    job.ce = ce_, job.shared = teacher_ && o_.temperature == 1 && !o_.standardize;
    const SoftmaxStats<T>& other = teacher_ ? stats_t_ : stats_s_;
    job.top_s = job.top_ce = stats_s_.top() + c0, job.top_t = other.top() + c0;
    job.rest_s = stats_s_.rest() + c0, job.rest_t = other.rest() + c0;
    job.rest_ce = stats_s_.rest_plain() + c0;
    job.scale_s = stats_s_.scale() + c0, job.scale_t = other.scale() + c0;
    if (o_.standardize) {
      job.shift = stats_s_.shift() + c0, job.pull = pull_.data() + c0;
      job.along = along_.part<T>(v / kTile) + c0, job.centre = centre_.part<T>(v / kTile) + c0;
    }
    job.ce_weight = rows_.ce_weight.data() + c0, job.kd_weight = rows_.kd_weight.data() + c0;
    job.mean = mean_.data() + c0;
    if (values)
      job.value = values_.part<T>(v / kTile) + c0, job.slope = slopes_.part<T>(v / kTile) + c0;
    job.g = g;
    kernels_.loss(job);
    if (g) subtract_one_hot(rows_, job, v, m, c0, panel);
  }

  static constexpr at::ScalarType kReal = c10::CppTypeToScalarType<T>::value;
  const Options o_;
  const Kernels<T>& kernels_;
  const int64_t chunk_, tiles_, panels_;
  int64_t used_panels_ = 0;
  bool ce_ = false;
  Head<T> student_;
  std::optional<Head<T>> teacher_;
  SoftmaxStats<T> stats_s_, stats_t_;
  ChunkRows<T> rows_;
  Gradients<T> gradients_;
  std::vector<T> mean_;     // (chunk) Σ q g
  Buffer values_, slopes_;  // (tiles) of (chunk)
  std::vector<T> pull_;     // (chunk) of z-scored logits, see LossJob
  Buffer along_, centre_;   // (tiles) of (chunk)
  Buffer agree_;            // (tiles) of (chunk) where diagnostics are wanted
  at::Tensor dz_;           // of all rows, in the place of z_s_, where it is wanted
  Logits z_s_, z_t_;
};

using Result = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

template <class T>
const T* weights(const Optional& x, int64_t rows, const char* name) {
  if (!x) return nullptr;
  TORCH_CHECK_TYPE(
      x->scalar_type() == c10::CppTypeToScalarType<T>::value, name, ": got dtype ",
      x->scalar_type(), ", expected ", c10::CppTypeToScalarType<T>::value);
  TORCH_CHECK_VALUE(
      x->dim() == 1 && x->size(0) == rows && x->is_contiguous(), name, ": got shape ", x->sizes(),
      ", expected (", rows, ",) and contiguous");
  return x->template const_data_ptr<T>();
}

// Of the last chunk, `count` rows from `row`: both entropies and the agreement.
template <class T>
void write_diagnostics(
    const Distill<T>& distill, int64_t row, int64_t count, bool teacher, T* out, int64_t rows) {
  at::parallel_for(0, count, 16, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      out[row + c] = static_cast<T>(distill.entropy_s(c));
      if (!teacher) continue;
      out[rows + row + c] = static_cast<T>(distill.entropy_t(c));
      out[2 * rows + row + c] = distill.agree(c) ? T(1) : T(0);
    }
  });
}

template <class T>
T* diagnostics_of(const Optional& x, int64_t rows) {
  if (!x) return nullptr;
  TORCH_CHECK_TYPE(
      x->scalar_type() == c10::CppTypeToScalarType<T>::value, "diagnostics: got dtype ",
      x->scalar_type(), ", expected ", c10::CppTypeToScalarType<T>::value);
  TORCH_CHECK_VALUE(
      x->dim() == 2 && x->size(0) == 3 && x->size(1) == rows && x->is_contiguous(),
      "diagnostics: got shape ", x->sizes(), ", expected (3, ", rows, ") and contiguous");
  return x->template mutable_data_ptr<T>();
}

template <class T>
Result run(
    const at::Tensor& hs, const at::Tensor& ws, const Optional& bs, const Optional& ht,
    const Optional& wt, const Optional& bt, const Optional& labels, const Optional& ce_weight,
    const Optional& kd_weight, const Options& o, int64_t chunk_rows, const Optional& diagnostics) {
  const int64_t rows = hs.size(0);
  const at::Tensor label =
      labels ? checked_labels(*labels, rows, o.vocab, o.ignore_index) : at::Tensor();
  const auto real = c10::CppTypeToScalarType<T>::value;
  // tiles of dz have one order whatever the chunks, so these are whole panels
  const int64_t panel = kernels<T>().panel;
  const Chunks chunks(rows, o.wanted.dz ? std::max(chunk_rows, panel) : chunk_rows, panel);
  const T* ce_w = weights<T>(ce_weight, rows, "ce_weight");
  const T* kd_w = weights<T>(kd_weight, rows, "kd_weight");
  T* diagnostics_out = diagnostics_of<T>(diagnostics, rows);
  at::Tensor loss = at::zeros({}, real), ce = at::zeros({rows}, real), kd = at::zeros({rows}, real);
  T* ce_out = ce.mutable_data_ptr<T>();
  T* kd_out = kd.mutable_data_ptr<T>();
  Distill<T> distill(hs, ws, bs, ht, wt, bt, o, chunks);
  double sum = 0;
  for (int64_t row = 0; row < rows; row += chunks.rows) {
    const int64_t count = std::min(chunks.rows, rows - row);
    distill.run_chunk(
        row, count, label.defined() ? label.const_data_ptr<int64_t>() : nullptr, ce_w, kd_w,
        row + count == rows);
    for (int64_t c = 0; c < count; ++c) {
      const ChunkRows<T>& r = distill.rows();
      if (r.label[c] >= 0) ce_out[row + c] = static_cast<T>(distill.ce(c));
      if (ht) kd_out[row + c] = static_cast<T>(distill.kd(c));
      if (r.ce_weight[c] != 0) sum += static_cast<double>(r.ce_weight[c]) * ce_out[row + c];
      if (ht && r.kd_weight[c] != 0) sum += static_cast<double>(r.kd_weight[c]) * kd_out[row + c];
    }
    if (diagnostics_out) {
      write_diagnostics(distill, row, count, ht.has_value(), diagnostics_out, rows);
    }
  }
  loss.fill_(sum);
  return {loss, ce, kd, distill.gradients().dh, distill.dw(), distill.gradients().db};
}

}  // namespace

Result distill_rows(
    const at::Tensor& hs, const at::Tensor& ws, const Optional& bs, const Optional& ht,
    const Optional& wt, const Optional& bt, const Optional& labels, const Optional& ce_weight,
    const Optional& kd_weight, std::string_view divergence, double param, double temperature,
    double cap_s, double cap_t, int64_t vocab, int64_t ignore_index, bool want_dh, bool want_dw,
    bool want_db, int64_t chunk_rows, const Optional& diagnostics, bool standardize, bool factored,
    const Optional& main_grad, double factor) {
  TORCH_CHECK_VALUE(
      ht.has_value() == wt.has_value(), "teacher: hidden states and weight come together");
  TORCH_CHECK_VALUE(
      !ht || ht->size(0) == hs.size(0), "rows: student has ", hs.size(0), ", teacher ",
      ht ? ht->size(0) : 0);
  TORCH_CHECK_VALUE(
      temperature > 0, "temperature: got ", temperature, ", expected a positive number");
  const Options o{
      divergence_of(divergence),
      param,
      temperature,
      cap_s,
      cap_t,
      vocab,
      ignore_index,
      {want_dh, want_dw && !factored, want_db, want_dw && factored},
      diagnostics.has_value(),
      standardize && ht,
      main_grad,
      factor};
  const auto f64 = [](const Optional& x) { return x && x->scalar_type() == at::kDouble; };
  const auto chosen =
      f64(hs) || f64(ws) || f64(bs) || f64(ht) || f64(wt) || f64(bt) ? run<double> : run<float>;
  return chosen(hs, ws, bs, ht, wt, bt, labels, ce_weight, kd_weight, o, chunk_rows, diagnostics);
}

}  // namespace mllmkd
