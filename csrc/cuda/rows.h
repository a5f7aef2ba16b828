// The row kernel of the chunk algorithm: what is asked of it, without any of its code.
#pragma once

#include <cstdint>

namespace mllmkd::cuda {

// CTAs of one cluster; more than 8 is not portable, but every GPU this is compiled for has it.
constexpr int kMaxCluster = 16;

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

enum class BiasType : int { f32, bf16, f16 };

// One block of logits, C rows of V columns. Null pointers stand for "none".
struct RowsJob {
  float* z_s;         // (C, V) products h·w; out: dz, if wanted
  const float* z_t;   // (C, V) likewise, of the teacher
  const void* b_s;    // (>= V) bias of `b_s_type`
  const void* b_t;    // (>= V)
  BiasType b_s_type;
  BiasType b_t_type;
  const int64_t* labels;   // (C)
  const float* ce_weight;  // (C)
  const float* kd_weight;  // (C)
  const bool* broken_s;    // (C) the hidden state was not finite, which a soft-cap would hide
  const bool* broken_t;    // (C)
  float* ce;               // (C) out
  float* kd;               // (C) out
  int64_t rows;
  int64_t ignore_index;
  int vocab;
  int slice;    // columns of one CTA, a multiple of 4
  float param;  // of the divergence
  float scale;  // 1/T
  float cap_s;  // soft-cap, 0: none
  float cap_t;
  bool want_dz;
  bool dz_bf16;  // dz as bf16 in the front half of each row, else fp32
};

}  // namespace mllmkd::cuda
