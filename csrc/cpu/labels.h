// Labels and weights of the rows: checked once, and the label's logit picked out of tiles as they
// pass.
#pragma once

#include "../ops.h"
#include "head.h"

namespace mllmkd {

// The labels, contiguous. Raises an IndexError unless every one is ignore_index or in [0, vocab).
at::Tensor checked_labels(
    const at::Tensor& labels, int64_t rows, int64_t vocab, int64_t ignore_index);

// Rows of one chunk, padded to whole panels: padding has no label and no weight.
template <class T>
struct ChunkRows {
  explicit ChunkRows(int64_t chunk)
      : label(chunk),
        ce_weight(chunk),
        kd_weight(chunk),
        label_logit(chunk),
        live(new bool[chunk]) {}

  // Null pointers stand for "none"; a row whose label is ignore_index gets no label and no CE
  // weight.
  void load(
      int64_t row, int64_t count, const int64_t* labels, const T* ce, const T* kd,
      int64_t ignore_index);

  // Calls f(c, v) for every token c of [first, first + count) whose label v lies in [v0, v0 + m).
  template <class F>
  void with_label_in(int64_t v0, int m, int64_t first, int64_t count, const F& f) const {
    for (int64_t c = first; c < first + count; ++c) {
      if (label[c] >= v0 && label[c] < v0 + m) f(c, label[c]);
    }
  }

  std::vector<int64_t> label;  // −1: none
  std::vector<T> ce_weight, kd_weight;
  std::vector<T> label_logit;
  std::unique_ptr<bool[]> live;  // has any weight
};

// The one-hot half of the cross-entropy's gradient, on the panel `job.g` of tokens c0 and up.
template <class T>
void subtract_one_hot(
    const ChunkRows<T>& rows, const LossJob<T>& job, int64_t v, int m, int64_t c0, int panel) {
  rows.with_label_in(v, m, c0, panel, [&](int64_t c, int64_t label) {
    const int64_t at = (label - v) * panel + c - c0;
    const T ratio = job.cap != 0 ? job.z_s[at] / job.cap : T(0);
    if (rows.ce_weight[c] != 0) job.g[at] -= rows.ce_weight[c] * job.ce_scale * (1 - ratio * ratio);
  });
}

}  // namespace mllmkd
