// One lm_head and the rows it is applied to: tiles of logits, in the panel layout of kernels.h.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>

#include "isa.h"
#include "workspace.h"

namespace mllmkd {

constexpr int kTile = 224;  // vocabulary rows of a tile: 16 micro-tiles of AVX-512, and at most
                            // `depth` of every product

Dtype dtype_of(const at::Tensor& x, const char* name);

// Its sides: vocabulary rows, and tokens of a panel.
inline std::pair<int, int> tile(bool f64) {
  return {kTile, f64 ? kernels<double>().panel : kernels<float>().panel};
}

inline int64_t tiles_of(int64_t vocab) { return (vocab + kTile - 1) / kTile; }

// N rows in chunks of about equal size, none above the bound (but a panel of tokens is the least
// there is).
struct Chunks {
  int64_t count, rows, padded;  // chunks, rows of each but the last, rows in whole panels
  Chunks(int64_t n, int64_t bound, int64_t panel) {
    TORCH_CHECK_VALUE(bound > 0, "chunk_rows: got ", bound, ", expected a positive number");
    const int64_t whole = std::max<int64_t>(bound / panel * panel, std::min(bound, panel));
    count = std::max<int64_t>((n + whole - 1) / whole, 1);
    rows = std::min(whole, round_up((n + count - 1) / count, std::min(bound, panel)));
    rows = std::max<int64_t>(rows, 1);
    padded = round_up(rows, panel);
  }
};

// Rows of a matrix whose last dimension is contiguous; `ld` elements apart.
struct Rows {
  at::Tensor tensor;
  Dtype dtype;
  int64_t ld;
  Rows(const at::Tensor& x, const char* name);
  const void* at(int64_t row, int64_t column = 0) const {
    return static_cast<const char*>(tensor.const_data_ptr()) +
           (row * ld + column) * tensor.element_size();
  }
};

// f(first vocabulary row, rows, thread) for every tile of a vocabulary.
template <class T, class F>
void for_tiles(const Product<T>& product, int64_t vocab, bool any_order, const F& f) {
  deal(tiles_of(vocab), any_order, [&](int64_t i, int thread) {
    f(i * kTile, static_cast<int>(std::min<int64_t>(kTile, vocab - i * kTile)), thread);
    if (product.release) product.release();
  });
}

template <class T>
class Head {
 public:
  Head(
      const at::Tensor& hidden, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
      double cap, int64_t vocab, int64_t chunk, const char* side);

  // Packs rows [row, row + rows) of the hidden states for `logits`.
  void load(int64_t row, int64_t rows);

  // Products of vocabulary rows [v, v + m) with panels [panel, panel + panels) into z (panels,
  // kTile, panel); `finish` makes them logits. Runs inside a parallel region, on thread `thread`.
  void products(int64_t v, int m, int64_t panel, int64_t panels, int thread, T* z) const;

  // One panel of products becomes logits, in place. `SoftmaxStats::add` does the same and more.
  void finish(int64_t v, int m, T* z) const {
    StatsJob<T> job{};
    job.z = z, job.rows = m, job.bias = bias(v), job.cap = cap_;
    kernels_.stats(job);
  }

  const T* bias(int64_t v) const {
    return bias_.defined() ? bias_.template const_data_ptr<T>() + v : nullptr;
  }
  T cap() const { return cap_; }
  const Product<T>& product() const { return product_; }

 private:
  Rows hidden_, weight_;
  const Kernels<T>& kernels_;
  const Product<T>& product_;
  at::Tensor bias_;
  T cap_;
  int64_t depth_, slabs_, panels_;
  Buffer right_;  // (slabs, panels) packed panels of the chunk's hidden states
  Buffer left_;   // (threads) a slab of weight rows
};

}  // namespace mllmkd
