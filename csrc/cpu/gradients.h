// From tiles of G = dL/dz to dH, dW and db. A tile of G becomes operands in cache; memory never
// sees it, unless the caller keeps it.
#pragma once

#include <optional>

#include "head_gradient.h"

namespace mllmkd {

struct Wanted {
  bool dh, dw, db;
  bool dz = false;  // kept by the caller, who wants nothing done with it yet
  bool any() const { return dh || dw || db || dz; }
};

// dH is a sum over tiles: every thread has its own, added in thread order at the end of a chunk.
template <class T>
class Gradients {
 public:
  // The arguments of `HeadGradient`. `dw_dtype`: T's or the weight's. With `into`, of T, dW times
  // `factor` is added to it.
  Gradients(
      const at::Tensor& hidden, const at::Tensor& weight, int64_t vocab, int64_t chunk,
      bool many_chunks, Wanted wanted, at::ScalarType dw_dtype,
      const std::optional<at::Tensor>& into = {}, T factor = 1);

  void load(int64_t row, int64_t rows, const bool* live, bool last);

  int64_t block_panels() const { return product_.depth / kernels_.panel; }
  T* panel(int thread) const {
    return g_.template part<T>(thread);
  }  // where the caller writes G (kTile, panel)
  // Takes the thread's panel, which it may change, as number `i` of the block that starts at
  // `panel`, vocabulary rows [v, v + m).
  void add_panel(int64_t v, int m, int64_t i, int thread);
  // All panels of a block are there: the products.
  void multiply(int64_t v, int m, int64_t panel, int64_t panels, int thread);
  void finish_chunk();

  at::Tensor dw() const { return head_ && !added_ ? head_->dw : none_; }
  at::Tensor dh, db;  // of T; shape (0,) where not wanted, and so is dw, also where it was added

 private:
  void multiply_dh(int64_t v, int m, int64_t panel, int64_t panels, int thread);
  int64_t columns(int64_t i) const {
    return std::min<int64_t>(kernels_.panel, features_ - i * kernels_.panel);
  }

  Rows weight_;
  const Kernels<T>& kernels_;
  const Product<T>& product_;
  Wanted wanted_;
  const bool added_;
  const T factor_;
  int64_t features_, feature_panels_, chunk_, row_ = 0, rows_ = 0;
  std::optional<HeadGradient<T>> head_;
  at::Tensor none_;    // in the place of dw
  Buffer right_w_;     // (threads) one panel of weight rows
  Buffer g_, left_c_;  // (threads) G: as written, by token
  Buffer dh_;          // (threads)
};

}  // namespace mllmkd
