// Log-probabilities of labels, and their gradient with the logits made again: no logits are ever
// kept.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "gradients.h"
#include "labels.h"
#include "softmax_stats.h"

namespace mllmkd {
namespace {

struct Options {
  double temperature, cap;
  int64_t vocab, ignore_index;
};

template <class T>
std::tuple<at::Tensor, at::Tensor> forward(
    const at::Tensor& h, const at::Tensor& w, const Optional& b, const at::Tensor& labels,
    const Options& o, int64_t chunk_rows) {
  const int64_t rows = h.size(0);
  const int panel = kernels<T>().panel;
  const Chunks chunks(rows, chunk_rows, panel);
  const auto real = c10::CppTypeToScalarType<T>::value;
  at::Tensor logp = at::zeros({rows}, real), lse = at::empty({rows}, real);
  const T scale = static_cast<T>(1 / o.temperature);
  Head<T> head(h, w, b, o.cap, o.vocab, chunks.padded, "logprob");
  SoftmaxStats<T> stats(o.vocab, chunks.padded, o.temperature, {});
  ChunkRows<T> tokens(chunks.padded);
  const int64_t block = head.product().depth / panel;
  const Buffer z(at::get_num_threads(), block * kTile * panel * sizeof(T));
  for (int64_t row = 0; row < rows; row += chunks.rows) {
    const int64_t count = std::min(chunks.rows, rows - row), panels = (count + panel - 1) / panel;
    head.load(row, count);
    stats.start();
    tokens.load(row, count, labels.const_data_ptr<int64_t>(), nullptr, nullptr, o.ignore_index);
    for_tiles(head.product(), o.vocab, true, [&](int64_t v, int m, int thread) {
      for (int64_t p = 0; p < panels; p += block) {
        const int64_t n = std::min(block, panels - p);
        T* tile = z.part<T>(thread);
        head.products(v, m, p, n, thread, tile);
        for (int64_t i = p; i < p + n; ++i, tile += kTile * panel) {
          stats.add(head, v, m, i, tile);
          tokens.with_label_in(v, m, i * panel, panel, [&](int64_t c, int64_t label) {
            tokens.label_logit[c] = tile[(label - v) * panel + c - i * panel];
          });
        }
      }
    });
    stats.merge();
    for (int64_t c = 0; c < count; ++c) {
      const double top = stats.top()[c], rest = stats.rest()[c];
      lse.mutable_data_ptr<T>()[row + c] = static_cast<T>(top * scale + rest);
      if (tokens.label[c] >= 0) {
        logp.mutable_data_ptr<T>()[row + c] =
            static_cast<T>((tokens.label_logit[c] - top) * scale - rest);
      }
    }
  }
  return {logp, lse};
}

template <class T>
std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(
    const at::Tensor& grad, const at::Tensor& h, const at::Tensor& w, const Optional& b,
    const at::Tensor& labels, const at::Tensor& lse, const Options& o, Wanted wanted,
    int64_t chunk_rows) {
  const Kernels<T>& kernel = kernels<T>();
  const int64_t rows = h.size(0), panel = kernel.panel;
  const Chunks chunks(rows, chunk_rows, panel);
  const auto real = c10::CppTypeToScalarType<T>::value;
  const T scale = static_cast<T>(1 / o.temperature);
  // minus the gradient of a log-probability is a weighted cross-entropy's
  const at::Tensor weight = grad.to(real).neg().contiguous(), row_lse = lse.to(real).contiguous();
  Head<T> head(h, w, b, o.cap, o.vocab, chunks.padded, "logprob");
  ChunkRows<T> tokens(chunks.padded);
  Gradients<T> gradients(h, w, o.vocab, chunks.padded, chunks.count > 1, wanted, w.scalar_type());
  const int64_t block = gradients.block_panels();
  const Buffer z(at::get_num_threads(), block * kTile * panel * sizeof(T));
  std::vector<T> padded_lse(chunks.padded), none(chunks.padded);
  for (int64_t row = 0; row < rows; row += chunks.rows) {
    const int64_t count = std::min(chunks.rows, rows - row), panels = (count + panel - 1) / panel;
    head.load(row, count);
    tokens.load(
        row, count, labels.const_data_ptr<int64_t>(), weight.const_data_ptr<T>(), nullptr,
        o.ignore_index);
    std::copy_n(row_lse.const_data_ptr<T>() + row, count, padded_lse.begin());
    gradients.load(row, count, tokens.live.get(), row + count == rows);
    for_tiles(head.product(), o.vocab, !wanted.dh, [&](int64_t v, int m, int thread) {
      for (int64_t p = 0; p < panels; p += block) {
        const int64_t n = std::min(block, panels - p);
        head.products(v, m, p, n, thread, z.part<T>(thread));
        for (int64_t i = 0; i < n; ++i) {
          const int64_t c0 = (p + i) * panel;
          T* tile = z.part<T>(thread) + i * kTile * panel;
          head.finish(v, m, tile);
          LossJob<T> job{};
          job.divergence = Divergence::none;
          job.z_s = tile, job.rows = m, job.ce = true;
          job.ce_scale = scale, job.cap = head.cap();
          job.top_s = job.rest_s = job.top_t = job.rest_t = none.data() + c0;
          job.kd_weight = job.mean = job.top_ce = none.data() + c0;
          job.scale_s = job.scale_t = none.data() + c0;
          job.rest_ce = padded_lse.data() + c0, job.ce_weight = tokens.ce_weight.data() + c0;
          job.g = gradients.panel(thread);
          kernel.loss(job);
          subtract_one_hot(tokens, job, v, m, c0, static_cast<int>(panel));
          gradients.add_panel(v, m, i, thread);
        }
        gradients.multiply(v, m, p, n, thread);
      }
    });
    gradients.finish_chunk();
  }
  return {gradients.dh, gradients.dw(), gradients.db};
}

// The labels, contiguous.
at::Tensor checked(const at::Tensor& h, const at::Tensor& labels, const Options& o) {
  TORCH_CHECK_VALUE(
      o.temperature > 0, "temperature: got ", o.temperature, ", expected a positive number");
  return checked_labels(labels, h.size(0), o.vocab, o.ignore_index);
}

bool in_double(const at::Tensor& h, const at::Tensor& w, const Optional& b) {
  return h.scalar_type() == at::kDouble || w.scalar_type() == at::kDouble ||
         (b && b->scalar_type() == at::kDouble);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> logprob_rows(
    const at::Tensor& h, const at::Tensor& w, const Optional& b, const at::Tensor& labels,
    double temperature, double cap, int64_t vocab, int64_t ignore_index, int64_t chunk_rows) {
  const Options o{temperature, cap, vocab, ignore_index};
  const auto run = in_double(h, w, b) ? forward<double> : forward<float>;
  return run(h, w, b, checked(h, labels, o), o, chunk_rows);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> logprob_grad(
    const at::Tensor& grad, const at::Tensor& h, const at::Tensor& w, const Optional& b,
    const at::Tensor& labels, const at::Tensor& lse, double temperature, double cap, int64_t vocab,
    int64_t ignore_index, bool want_dh, bool want_dw, bool want_db, int64_t chunk_rows) {
  const Options o{temperature, cap, vocab, ignore_index};
  const at::Tensor label = checked(h, labels, o);
  TORCH_CHECK_VALUE(
      grad.dim() == 1 && grad.size(0) == h.size(0) && lse.sizes() == grad.sizes(),
      "grad: got shape ", grad.sizes(), ", lse ", lse.sizes(), ", expected (", h.size(0), ",)");
  const auto run = in_double(h, w, b) ? backward<double> : backward<float>;
  return run(grad, h, w, b, label, lse, o, {want_dh, want_dw, want_db}, chunk_rows);
}

}  // namespace mllmkd
