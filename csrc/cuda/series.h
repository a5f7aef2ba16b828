// The power series of a divergence whose coefficients depend on its parameter: found once a launch,
// on the host.
#pragma once

namespace mllmkd::cuda {

// In u = log q − log p, for |u| <= 1/2. The nearest singularity is at |u| >= π whatever the
// parameter is, so what is left out is (1/2π)⁹ of the first term: 6e-8.
struct Series {
  static constexpr int kTerms = 9;
  float value[kTerms];  // a token's share of the divergence, over p·u²
  float log[kTerms];    // log m/q, over u
};

// JSD with m = (1−w)p + w q: log m/q = L − u with L = log M, M = (1−w) + w eᵘ; its terms are
// p·(w u eᵘ − M L).
inline Series middle_series(double w) {
  constexpr int n = Series::kTerms + 2;
  double m[n] = {1.0}, l[n] = {}, inverse_factorial = 1.0;
  Series found{};
  for (int k = 1; k < n; ++k) {
    const double of_u = w * inverse_factorial;  // of w u eᵘ
    inverse_factorial /= k;
    m[k] = w * inverse_factorial;
    l[k] = m[k];  // M L' = M'
    for (int j = 1; j < k; ++j) l[k] -= j * l[j] * m[k - j] / k;
    double value = of_u;
    for (int j = 0; j < k; ++j) value -= m[j] * l[k - j];
    if (k > 1) found.value[k - 2] = static_cast<float>(value);
    if (k <= Series::kTerms) found.log[k - 1] = static_cast<float>(k == 1 ? l[k] - 1 : l[k]);
  }
  return found;
}

}  // namespace mllmkd::cuda
