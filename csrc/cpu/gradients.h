// From tiles of G = dL/dz to dH, dW and db. A tile of G is never written to memory: it becomes
// operands in cache.
#pragma once

#include "head.h"

namespace mllmkd {

struct Wanted {
  bool dh, dw, db;
  bool any() const { return dh || dw || db; }
};

// dW rows belong to one tile, so to one thread. dH is a sum over tiles: every thread has its own,
// added in thread order at the end of a chunk. Both are sums in T; a dW that nobody scales any more
// is rounded once, to the weight's dtype.
template <class T>
class Gradients {
 public:
  // `many_chunks`: rows of dW are sums over chunks. Without, each chunk writes its own rows of dW.
  // `dw_dtype`: T's or the weight's.
  Gradients(
      const at::Tensor& hidden, const at::Tensor& weight, int64_t vocab, int64_t chunk,
      bool many_chunks, Wanted wanted, at::ScalarType dw_dtype);

  // Starts a chunk of rows [row, row + rows). Rows with live[c] false have no part in dW, NaN or
  // not.
  void load(int64_t row, int64_t rows, const bool* live, bool last);

  int64_t block_panels() const { return product_.depth / kernels_.panel; }
  T* panel(int thread) const {
    return g_.template part<T>(thread);
  }  // where the caller writes G (kTile, panel)
  // Takes the thread's panel as number `i` of the block that starts at `panel`, vocabulary rows [v,
  // v + m).
  void add_panel(int64_t v, int m, int64_t i, int thread);
  // All panels of a block are there: the products.
  void multiply(int64_t v, int m, int64_t panel, int64_t panels, int thread);
  void finish_chunk();

  at::Tensor dh, dw, db;  // of T, `dw_dtype`, T; shape (0,) where not wanted

 private:
  void multiply_dw(int64_t v, int m, int64_t panel, int64_t panels, int thread);
  void multiply_dh(int64_t v, int m, int64_t panel, int64_t panels, int thread);
  void add_panel_dw(
      int m, int k, int64_t block, int64_t i, const void* left, T* out, bool add, int thread) const;
  // Rows of the weight beyond the vocabulary; all of them if there are no tokens.
  at::Tensor tail() const { return dw.narrow(0, vocab_, dw.size(0) - vocab_); }
  int64_t columns(int64_t i) const {
    return std::min<int64_t>(kernels_.panel, features_ - i * kernels_.panel);
  }

  Rows hidden_, weight_;
  const Kernels<T>& kernels_;
  const Product<T>& product_;
  Wanted wanted_;
  int64_t features_, feature_panels_, chunk_, vocab_, row_ = 0, rows_ = 0;
  const bool many_;
  bool started_ = false, last_ = false;
  Buffer right_h_;              // (blocks, feature panels) hidden states, token depth
  Buffer right_w_;              // (threads) one panel of weight rows
  Buffer g_, left_v_, left_c_;  // (threads) G: as written, by vocabulary row, by token
  Buffer dh_, dw_tile_, edge_;  // (threads)
  T* sum_ = nullptr;            // where dW is summed: in its own memory, or null for dw_tile_
  bool rounds_ = false, in_place_ = false;  // in_place_: summed in T where it will lie rounded
};

}  // namespace mllmkd
