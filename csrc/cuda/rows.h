// The row kernel of the chunk algorithm: what is asked of it, and how a row is dealt to a cluster;
// none of its code.
#pragma once

#include <cstdint>

#include "../divergences.h"
#include "series.h"

namespace mllmkd::cuda {

// CTAs of one cluster; more than 8 is not portable, but every GPU this is compiled for has it.
constexpr int kMaxCluster = 16;

enum class BiasType : int { f32, bf16, f16 };

// One block of logits, C rows of V columns. Null pointers stand for "none".
struct RowsJob {
  const float* z_s;  // (C, V) products h·w, rows `stride` apart
  const float* z_t;  // (C, V) likewise, of the teacher
  void* dz;          // (C, V) out, fp32 or bf16, rows `dz_stride` apart, each where that of z_s is
                     // or out of its way
  int64_t stride;    // what lies between V and the strides is read and written, and means nothing
  int64_t dz_stride;
  const void* b_s;  // (>= V) bias of `b_s_type`
  const void* b_t;  // (>= V)
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
  bool dz_bf16;
  bool scored;    // the divergence sees z-scored logits
  Series series;  // of the JSD, else unread
};

// Shared memory a CTA may have on sm_90 and sm_100, what leaves room for a second one on the SM
// (228 KiB, of which every CTA takes 1 KiB for the system), and what the reductions take.
constexpr int64_t kSharedBytes = 227 * 1024;
constexpr int64_t kSharedBytesOfTwo = 113 * 1024;
constexpr int64_t kReductionBytes = 1792;

// Columns of one of `size` CTAs: a multiple of 4, so that rows moved 16 bytes at a time are dealt
// whole.
constexpr int slice_of(int64_t vocab, int size) {
  return static_cast<int>((vocab + size - 1) / size + 3) / 4 * 4;
}

// Shared memory of one CTA.
constexpr int64_t shared_bytes(int64_t slice, bool teacher) {
  return kReductionBytes + slice * (teacher ? 8 : 4);
}

// Can `size` CTAs hold the row?
constexpr bool cluster_fits(int64_t vocab, bool teacher, int64_t size) {
  const bool known = size == 1 || size == 2 || size == 4 || size == 8 || size == kMaxCluster;
  return known && shared_bytes(slice_of(vocab, static_cast<int>(size)), teacher) <= kSharedBytes;
}

// CTAs for a row: the fewest that put two CTAs on an SM, so that one loads while the other
// computes; 16 where none does and it still fits; 0: the row is too long.
constexpr int cluster_of(int64_t vocab, bool teacher) {
  for (int size = 1; size <= kMaxCluster; size *= 2) {
    if (shared_bytes(slice_of(vocab, size), teacher) <= kSharedBytesOfTwo) return size;
  }
  return cluster_fits(vocab, teacher, kMaxCluster) ? kMaxCluster : 0;
}

}  // namespace mllmkd::cuda
