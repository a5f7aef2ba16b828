#include "softmax_stats.h"

#include <ATen/Parallel.h>

#include <cmath>
#include <limits>

namespace mllmkd {
namespace {

// log Σ_i sums[i] · exp(scale · (maxima[i] − top)) over tiles. NaN where every logit is −inf (top
// is), or any is NaN or +inf (then so is a sum).
template <class T>
double merged(
    const Buffer& maxima, const Buffer& sums, int64_t tiles, int64_t c, double scale, double top) {
  constexpr double inf = std::numeric_limits<double>::infinity();
  if (top == -inf) return std::numeric_limits<double>::quiet_NaN();
  double sum = 0;
  for (int64_t i = 0; i < tiles; ++i) {
    const double max = maxima.part<T>(i)[c];
    if (max != -inf) sum += sums.part<T>(i)[c] * std::exp(scale * (max - top));
  }
  return std::log(sum);
}

}  // namespace

template <class T>
SoftmaxStats<T>::SoftmaxStats(int64_t tiles, int64_t chunk, T scale, bool plain, bool entropy)
    : kernels_(kernels<T>()),
      tiles_(tiles),
      chunk_(chunk),
      scale_(scale),
      plain_(plain && scale != 1),
      entropy_(entropy),
      max_(tiles, chunk * sizeof(T)),
      sum_(tiles, chunk * sizeof(T)),
      sum_plain_(tiles, chunk * sizeof(T)),
      weighted_(entropy ? tiles : 0, chunk * sizeof(T)),
      merged_(3, chunk * sizeof(T)) {}

template <class T>
void SoftmaxStats<T>::add(const Head<T>& head, int64_t v, int m, int64_t panel, T* z) {
  const int64_t tile = v / kTile, c = panel * kernels_.panel;
  kernels_.stats(
      {z, m, head.bias(v), head.cap(), scale_, plain_, max_.part<T>(tile) + c,
       sum_.part<T>(tile) + c, sum_plain_.part<T>(tile) + c,
       entropy_ ? weighted_.part<T>(tile) + c : nullptr});
}

// With x = scale·(z − top): H = log Σ eˣ − Σ x eˣ / Σ eˣ, two terms that are never negative. A tile
// knows the sums from its own maximum, `below` lower: then x is less by that.
template <class T>
double SoftmaxStats<T>::entropy(int64_t c) const {
  const double top = merged_.template part<T>(0)[c];
  double sum = 0, weighted = 0;
  for (int64_t i = 0; i < tiles_; ++i) {
    const double max = max_.part<T>(i)[c];
    if (max == -std::numeric_limits<double>::infinity()) continue;
    const double below = scale_ * (top - max), share = std::exp(-below), own = sum_.part<T>(i)[c];
    sum += share * own;
    weighted += share * (weighted_.part<T>(i)[c] - below * own);
  }
  return std::log(sum) - weighted / sum;  // NaN where every logit is −inf
}

template <class T>
void SoftmaxStats<T>::merge() {
  T* top = merged_.template part<T>(0);
  T* rest = merged_.template part<T>(1);
  T* rest_plain = merged_.template part<T>(2);
  at::parallel_for(0, chunk_, 16, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      T max = -std::numeric_limits<T>::infinity();
      // a NaN maximum has a NaN sum beside it, so it need not be carried here, but it must not hide
      // the others
      for (int64_t i = 0; i < tiles_; ++i)
        max = max_.part<T>(i)[c] <= max ? max : max_.part<T>(i)[c];
      top[c] = max;
      rest[c] = static_cast<T>(merged<T>(max_, sum_, tiles_, c, scale_, max));
      rest_plain[c] =
          plain_ ? static_cast<T>(merged<T>(max_, sum_plain_, tiles_, c, 1.0, max)) : rest[c];
    }
  });
}

template class SoftmaxStats<float>;
template class SoftmaxStats<double>;

}  // namespace mllmkd
