// Log-sum-exps of the rows of a chunk, from the statistics of each tile.
#pragma once

#include "head.h"

namespace mllmkd {

// Every tile keeps its own (max, Σ exp) per token; `merge` adds them in double, tile after tile:
// the result does not depend on how tiles were dealt out to threads.
template <class T>
class SoftmaxStats {
 public:
  SoftmaxStats(int64_t tiles, int64_t chunk, T scale, bool plain, bool entropy = false);

  // One panel of products becomes logits, in place.
  void add(const Head<T>& head, int64_t v, int m, int64_t panel, T* z);
  void merge();

  // log Σ exp(scale·z) = scale·top + rest, in two parts (see LossJob); `rest_plain` is at scale 1.
  // All (chunk).
  const T* top() const { return merged_.template part<T>(0); }
  const T* rest() const { return merged_.template part<T>(1); }
  const T* rest_plain() const { return merged_.template part<T>(2); }

  // −Σ q log q of the softmax at `scale` of token c, if it was asked for.
  double entropy(int64_t c) const;

 private:
  const Kernels<T>& kernels_;
  int64_t tiles_, chunk_;
  T scale_;
  bool plain_, entropy_;
  Buffer max_, sum_, sum_plain_;  // (tiles) of (chunk)
  Buffer weighted_;               // (tiles) of (chunk) where the entropy is wanted
  Buffer merged_;                 // (3) of (chunk)
};

}  // namespace mllmkd
