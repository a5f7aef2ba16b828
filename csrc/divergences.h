// Which divergences are there? Rows of the table in mllmkd_kernels/divergence.py, by name, for
// every kernel in C++ and CUDA.
#pragma once

namespace mllmkd {

enum class Divergence : int {
  forward_kl,
  reverse_kl,
  jsd,
  skew_forward_kl,
  skew_reverse_kl,
  total_variation,
  soft_cross_entropy,
  none,  // no teacher: only the cross-entropy
};

constexpr const char* kDivergenceNames[] = {
    "forward_kl",      "reverse_kl",        "jsd", "skew_forward_kl", "skew_reverse_kl",
    "total_variation", "soft_cross_entropy"};

// Gradients that are q − p need no Σ q g first.
constexpr bool needs_mean(Divergence d) {
  return d != Divergence::forward_kl && d != Divergence::soft_cross_entropy &&
         d != Divergence::none;
}

}  // namespace mllmkd
