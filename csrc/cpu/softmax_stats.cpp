#include "softmax_stats.h"

#include <ATen/Parallel.h>

#include <cmath>
#include <limits>

namespace mllmkd {
namespace {

// log Σ_i sums[i] · exp(scale · (maxima[i] − top)) over tiles. NaN where every logit is −inf (top
// is), or any is NaN or +inf (then so is a sum).
template <class T>
double log_of_sums(
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

template <class F>
void for_tokens(int64_t chunk, const F& f) {
  at::parallel_for(0, chunk, 16, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) f(c);
  });
}

}  // namespace

template <class T>
SoftmaxStats<T>::SoftmaxStats(int64_t vocab, int64_t chunk, double temperature, Wanted wanted)
    : kernels_(kernels<T>()),
      vocab_(vocab),
      tiles_(tiles_of(vocab)),
      chunk_(chunk),
      temperature_(temperature),
      wanted_(wanted),
      plain_(wanted.plain && temperature != 1 && !wanted.moments),
      max_(tiles_, chunk * sizeof(T)),
      sum_(tiles_, chunk * sizeof(T)),
      sum_plain_(tiles_, chunk * sizeof(T)),
      weighted_(wanted.entropy ? tiles_ : 0, chunk * sizeof(T)),
      mean_(wanted.moments ? tiles_ : 0, chunk * sizeof(T)),
      square_(wanted.moments ? tiles_ : 0, chunk * sizeof(T)),
      merged_(6, chunk * sizeof(T)) {}

template <class T>
void SoftmaxStats<T>::start() {
  std::fill_n(merged(3), chunk_, static_cast<T>(wanted_.moments ? 1 : 1 / temperature_));
}

template <class T>
void SoftmaxStats<T>::add(const Head<T>& head, int64_t v, int m, int64_t panel, T* z) {
  const int64_t tile = v / kTile, c = panel * kernels_.panel;
  StatsJob<T> job{z, m, head.bias(v), head.cap(), scale() + c, plain_};
  job.max = max_.part<T>(tile) + c, job.sum = sum_.part<T>(tile) + c;
  job.sum_plain = sum_plain_.part<T>(tile) + c;
  if (wanted_.moments) {
    job.mean = mean_.part<T>(tile) + c, job.square = square_.part<T>(tile) + c;
  } else if (wanted_.entropy) {
    job.weighted = weighted_.part<T>(tile) + c;
  }
  kernels_.stats(job);
}

template <class T>
void SoftmaxStats<T>::again(int64_t v, int m, int64_t panel, const T* z) {
  const int64_t tile = v / kTile, c = panel * kernels_.panel;
  StatsJob<T> job{};
  job.z = const_cast<T*>(z), job.rows = m, job.again = true;  // which leaves z as it is
  job.scale = scale() + c, job.max = max_.part<T>(tile) + c, job.sum = sum_.part<T>(tile) + c;
  job.sum_plain = sum_plain_.part<T>(tile) + c;
  if (wanted_.entropy) job.weighted = weighted_.part<T>(tile) + c;
  kernels_.stats(job);
}

// With x = scale·(z − top): H = log Σ eˣ − Σ x eˣ / Σ eˣ, two terms that are never negative. A tile
// knows the sums from its own maximum, `below` lower: then x is less by that.
template <class T>
double SoftmaxStats<T>::entropy(int64_t c) const {
  const double top = merged(0)[c];
  double sum = 0, weighted = 0;
  for (int64_t i = 0; i < tiles_; ++i) {
    const double max = max_.part<T>(i)[c];
    if (max == -std::numeric_limits<double>::infinity()) continue;
    const double below = scale()[c] * (top - max), share = std::exp(-below);
    const double own = sum_.part<T>(i)[c];
    sum += share * own;
    weighted += share * (weighted_.part<T>(i)[c] - below * own);
  }
  return std::log(sum) - weighted / sum;  // NaN where every logit is −inf
}

template <class T>
void SoftmaxStats<T>::merge() {
  for_tokens(chunk_, [&](int64_t c) {
    T max = -std::numeric_limits<T>::infinity();
    // a NaN maximum has a NaN sum beside it, so it need not be carried here, but it must not hide
    // the others
    for (int64_t i = 0; i < tiles_; ++i) max = max_.part<T>(i)[c] <= max ? max : max_.part<T>(i)[c];
    merged(0)[c] = max;
    merged(1)[c] = static_cast<T>(log_of_sums<T>(max_, sum_, tiles_, c, scale()[c], max));
    merged(2)[c] =
        plain_ ? static_cast<T>(log_of_sums<T>(max_, sum_plain_, tiles_, c, 1.0, max)) : rest()[c];
  });
}

// From (mean, Σ (z − mean)²) of every tile to those of the row: the squares of a tile about the
// row's mean are its own and those of the distance of the means.
template <class T>
void SoftmaxStats<T>::standardize() {
  for_tokens(chunk_, [&](int64_t c) {
    const auto rows = [&](int64_t i) {
      return static_cast<double>(std::min<int64_t>(kTile, vocab_ - i * kTile));
    };
    double mean = 0, square = 0;
    for (int64_t i = 0; i < tiles_; ++i) mean += rows(i) / vocab_ * mean_.part<T>(i)[c];
    for (int64_t i = 0; i < tiles_; ++i) {
      const double off = mean_.part<T>(i)[c] - mean;
      square += square_.part<T>(i)[c] + rows(i) * off * off;
    }
    const double std = std::sqrt(square / vocab_), spread = std + kSpreadEps;
    const double scale = 1 / (temperature_ * spread);
    merged(3)[c] = static_cast<T>(scale);
    merged(4)[c] = static_cast<T>(scale * (top()[c] - mean));
    merged(5)[c] =
        std == 0 ? T(0) : static_cast<T>(temperature_ * temperature_ * spread / (std * vocab_));
  });
}

// The sums at the scales that `standardize` found.
template <class T>
void SoftmaxStats<T>::merge_again() {
  for_tokens(chunk_, [&](int64_t c) {
    merged(1)[c] = static_cast<T>(log_of_sums<T>(max_, sum_, tiles_, c, scale()[c], top()[c]));
  });
}

template class SoftmaxStats<float>;
template class SoftmaxStats<double>;

}  // namespace mllmkd
