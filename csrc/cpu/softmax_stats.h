// Log-sum-exps of the rows of a chunk, from the statistics of each tile.
#pragma once

#include "head.h"

namespace mllmkd {

constexpr double kSpreadEps = 1e-7;  // beside σ: `logits.EPS` in Python

// Every tile keeps its own (max, Σ exp) per token; `merge` adds them in double, tile after tile:
// the result does not depend on how tiles were dealt out to threads.
//
// Z-scored logits have a scale per token, 1/(T(σ + ε)), which is known when the whole row is: tiles
// then also keep (mean, Σ (z − mean)²), the first sums are at scale 1, `standardize` finds σ, and
// the sums are made `again`.
template <class T>
class SoftmaxStats {
 public:
  struct Wanted {
    bool plain = false;    // also `rest_plain`
    bool entropy = false;  // also `entropy`
    bool moments = false;  // of z-scored logits
  };
  SoftmaxStats(int64_t vocab, int64_t chunk, double temperature, Wanted wanted);

  void start();  // a chunk
  // One panel of products becomes logits, in place.
  void add(const Head<T>& head, int64_t v, int m, int64_t panel, T* z);
  void merge();

  void standardize();  // after `merge`, then `again` for every panel and `merge_again`
  void again(int64_t v, int m, int64_t panel, const T* z);
  void merge_again();

  // log Σ exp(scale·z) = scale·top + rest, in two parts (see LossJob); `rest_plain` is at scale 1.
  // All (chunk).
  const T* top() const { return merged_.template part<T>(0); }
  const T* rest() const { return merged_.template part<T>(1); }
  const T* rest_plain() const { return merged_.template part<T>(2); }
  const T* scale() const { return merged_.template part<T>(3); }
  // Of z-scored logits: scale·(top − mean), and `through`, which makes LossJob::pull of Σ ∂D/∂a·a.
  const T* shift() const { return merged_.template part<T>(4); }
  const T* through() const { return merged_.template part<T>(5); }

  // −Σ q log q of the softmax at `scale` of token c, if it was asked for.
  double entropy(int64_t c) const;

 private:
  T* merged(int part) const { return merged_.template part<T>(part); }

  const Kernels<T>& kernels_;
  int64_t vocab_, tiles_, chunk_;
  double temperature_;
  Wanted wanted_;
  bool plain_;                    // apart from `sum_`
  Buffer max_, sum_, sum_plain_;  // (tiles) of (chunk)
  Buffer weighted_;               // (tiles) of (chunk) where the entropy is wanted
  Buffer mean_, square_;          // (tiles) of (chunk) where the moments are wanted
  Buffer merged_;                 // (6) of (chunk)
};

}  // namespace mllmkd
