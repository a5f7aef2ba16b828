// The operators of this extension, in plain C++. Schemas and registration: bindings.cpp.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "divergences.h"

namespace mllmkd {

using Optional = std::optional<at::Tensor>;

inline Divergence divergence_of(std::string_view name) {
  for (int i = 0; i < static_cast<int>(Divergence::none); ++i) {
    if (name == kDivergenceNames[i]) return static_cast<Divergence>(i);
  }
  TORCH_CHECK_VALUE(
      false, "divergence: got '", name,
      "', expected forward_kl, reverse_kl, jsd, skew_forward_kl, ",
      "skew_reverse_kl, total_variation or soft_cross_entropy");
}

// L = Σ_n ce_weight[n]·CE_n + kd_weight[n]·D_n over N rows, and its gradients: (loss, ce, kd, dh,
// dw, db). `diagnostics` (3, N), if given, is filled with the entropies of student and teacher and
// with 1 where some token is the most likely of both, else 0; without a teacher with the first
// only. `standardize`: the divergence sees each row's logits z-scored. `factored`: dz = dL/dz of
// all rows takes the place of dW, as tiles (tiles, panels, kTile, panel), for `head_gradient`.
// `main_grad` (≥V, D), if given: dW times `factor` is added to it, and dw is empty.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> distill_rows(
    const at::Tensor& hs, const at::Tensor& ws, const Optional& bs, const Optional& ht,
    const Optional& wt, const Optional& bt, const Optional& labels, const Optional& ce_weight,
    const Optional& kd_weight, std::string_view divergence, double param, double temperature,
    double cap_s, double cap_t, int64_t vocab, int64_t ignore_index, bool want_dh, bool want_dw,
    bool want_db, int64_t chunk_rows, const Optional& diagnostics, bool standardize, bool factored,
    const Optional& main_grad, double factor);

// dW = factor · dzᵀ h (rows, D), rounded once, to `dtype`; 0 beyond `vocab` rows. `h` (N, D) is
// zero in rows that have no part, so that a NaN there is none.
at::Tensor head_gradient(
    const at::Tensor& dz, const at::Tensor& h, const at::Tensor& factor, int64_t rows,
    int64_t vocab, at::ScalarType dtype);

// log softmax(z/T)[label] and log Σ exp(z/T) of every row: (logp, lse).
std::tuple<at::Tensor, at::Tensor> logprob_rows(
    const at::Tensor& h, const at::Tensor& w, const Optional& b, const at::Tensor& labels,
    double temperature, double cap, int64_t vocab, int64_t ignore_index, int64_t chunk_rows);

// Gradient of Σ_n grad[n]·logp[n], with the logits made again: (dh, dw, db).
std::tuple<at::Tensor, at::Tensor, at::Tensor> logprob_grad(
    const at::Tensor& grad, const at::Tensor& h, const at::Tensor& w, const Optional& b,
    const at::Tensor& labels, const at::Tensor& lse, double temperature, double cap, int64_t vocab,
    int64_t ignore_index, bool want_dh, bool want_dw, bool want_db, int64_t chunk_rows);

// x · factor (fp32 or fp64, factor 0-dim) rounded once to `dtype`, in memory kept from the last
// step: a head's gradient is new every step, and the page faults of fresh memory cost more than the
// product.
at::Tensor scaled(const at::Tensor& x, const at::Tensor& factor, at::ScalarType dtype);

// (images, 3) fp64: <R_s,R_s>, <R_t,R_t>, <R_s,R_t> with R = K Hᵀ of each image's rows.
at::Tensor relation_stats(
    const at::Tensor& hs, const at::Tensor& ks, const at::Tensor& ht, const at::Tensor& kt,
    const at::Tensor& cu_seqlens);

// (N, Ds): (coef[i,0]·R_t + coef[i,1]·R_s) H_s per image i.
at::Tensor relation_grad(
    const at::Tensor& hs, const at::Tensor& ks, const at::Tensor& ht, const at::Tensor& kt,
    const at::Tensor& cu_seqlens, const at::Tensor& coef);

// The row kernel of the chunk algorithm on a GPU, in a build with CUDA: (ce, kd) of C rows of V
// logits, and their gradient in `dz`, fp32 or bf16, where it is wanted; in fp32 it may be `zs`.
// `cluster`: CTAs for a row, 0 to choose.
std::tuple<at::Tensor, at::Tensor> cuda_rows_(
    const at::Tensor& zs, const Optional& zt, const Optional& bs, const Optional& bt,
    const Optional& labels, const Optional& ce_weight, const Optional& kd_weight,
    const Optional& broken_s, const Optional& broken_t, std::string_view divergence, double param,
    double temperature, double cap_s, double cap_t, int64_t ignore_index,
    const std::optional<at::Tensor>& dz, int64_t cluster, bool standardize);

}  // namespace mllmkd
