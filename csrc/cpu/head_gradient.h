// From tiles of G = dL/dz to the gradient of the head, dW = Gᵀ H.
#pragma once

#include <optional>

#include "head.h"

namespace mllmkd {

// A row of dW belongs to one tile, so to one thread. It is a sum in T over blocks of tokens and
// over chunks of them, and is rounded once, to `dtype`, when it is complete.
template <class T>
class HeadGradient {
 public:
  // `rows` of the head, of which `vocab` take part. `many_chunks`: rows of dW are sums over chunks.
  // Without, each chunk writes its own rows of dW. What is complete is multiplied by `factor`.
  // `into` (rows, D) of T, if given, is added to, and is dW.
  HeadGradient(
      const at::Tensor& hidden, const Product<T>& product, int64_t rows, int64_t vocab,
      int64_t chunk, bool many_chunks, at::ScalarType dtype, T factor = 1,
      const std::optional<at::Tensor>& into = {});

  // Starts a chunk of rows [row, row + rows). Rows with live[c] false have no part in dW, NaN or
  // not; null: all are live.
  void load(int64_t row, int64_t rows, const bool* live, bool last);

  int64_t block_panels() const { return product_.depth / kernels_.panel; }
  // Takes G (m, panel) as number `i` of a block of panels.
  void add_panel(const T* g, int m, int64_t i, int thread) {
    product_.store_left(g, m, left_.part(thread) + i * kernels_.panel * product_.element_size);
  }
  // The block that starts at `panel` is there: its product, for vocabulary rows [v, v + m).
  void multiply(int64_t v, int m, int64_t panel, int64_t panels, int thread);
  void finish_chunk();

  at::Tensor dw;  // (rows, D) of `dtype`

 private:
  void multiply_columns(
      int m, int k, int64_t block, int64_t i, const void* left, T* out, bool add, int thread) const;
  // Rows of the weight beyond the vocabulary; all of them if there are no tokens.
  at::Tensor tail() const { return dw.narrow(0, vocab_, dw.size(0) - vocab_); }
  int64_t columns(int64_t i) const {
    return std::min<int64_t>(kernels_.panel, features_ - i * kernels_.panel);
  }

  Rows hidden_;
  const Kernels<T>& kernels_;
  const Product<T>& product_;
  const int64_t features_, feature_panels_, blocks_, vocab_;
  const bool many_;
  const T factor_;
  bool started_, last_ = false;
  int64_t rows_ = 0;        // of the chunk
  Buffer right_;            // (blocks, feature panels) hidden states, token depth
  Buffer left_;             // (threads) G by vocabulary row
  Buffer tile_, edge_;      // (threads)
  T* sum_ = nullptr;        // where dW is summed: in its own memory, or null for tile_
  bool rounds_, in_place_;  // in_place_: summed in T where it will lie rounded
};

}  // namespace mllmkd
