#include "softmax_stats.h"

#include <ATen/Parallel.h>

#include <cmath>
#include <limits>

namespace mllmkd {
namespace {

// log Σ_i sums[i] · exp(scale · maxima[i]) over tiles; NaN where every logit is −inf, or any is NaN or +inf.
template <class T>
double merged(const Buffer& maxima, const Buffer& sums, int64_t tiles, int64_t c, double scale) {
  constexpr double inf = std::numeric_limits<double>::infinity();
  double max = -inf, sum = 0;
  for (int64_t i = 0; i < tiles; ++i) max = std::max<double>(max, maxima.part<T>(i)[c]);
  for (int64_t i = 0; i < tiles; ++i) {
    const double tile_max = maxima.part<T>(i)[c];
    if (tile_max != -inf) sum += sums.part<T>(i)[c] * std::exp(scale * (tile_max - max));
  }
  return max == -inf && !std::isnan(sum) ? std::numeric_limits<double>::quiet_NaN() : scale * max + std::log(sum);
}

}  // namespace

template <class T>
SoftmaxStats<T>::SoftmaxStats(int64_t tiles, int64_t chunk, T scale, bool plain)
    : kernels_(kernels<T>()),
      tiles_(tiles),
      chunk_(chunk),
      scale_(scale),
      plain_(plain && scale != 1),
      max_(tiles, chunk * sizeof(T)),
      sum_(tiles, chunk * sizeof(T)),
      sum_plain_(tiles, chunk * sizeof(T)),
      lse_(2, chunk * sizeof(T)) {}

template <class T>
void SoftmaxStats<T>::add(const Head<T>& head, int64_t v, int m, int64_t panel, T* z) {
  const int64_t tile = v / kTile, c = panel * kernels_.panel;
  kernels_.stats({z, m, head.bias(v), head.cap(), scale_, plain_, max_.part<T>(tile) + c, sum_.part<T>(tile) + c,
                  sum_plain_.part<T>(tile) + c});
}

template <class T>
void SoftmaxStats<T>::merge() {
  T* out = lse_.template part<T>(0);
  T* plain = lse_.template part<T>(1);
  at::parallel_for(0, chunk_, 16, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      out[c] = static_cast<T>(merged<T>(max_, sum_, tiles_, c, scale_));
      plain[c] = plain_ ? static_cast<T>(merged<T>(max_, sum_plain_, tiles_, c, 1.0)) : out[c];
    }
  });
}

template class SoftmaxStats<float>;
template class SoftmaxStats<double>;

}  // namespace mllmkd
