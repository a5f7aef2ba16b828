// What can one processor do to one tile? The table of functions that is compiled once per
// instruction set.
//
// A tile is a block of vocabulary rows times a block of tokens. Logits are kept transposed and in
// panels: `panel` tokens side by side, one line of `panel` numbers per vocabulary row. So a lane of
// a vector register is a token, every reduction over the vocabulary is a plain vertical sum, and
// the same bytes are what the matrix products read.
//
// Two operand formats, both in the element type of the product (float, double or bf16):
//   left   rows × depth, depth contiguous, row stride `stride` (a constant, so that addresses are
//   immediates and
//          no two rows fall into the same cache set, whatever the hidden size is);
//   right  one panel: depth × panel, for bf16 two consecutive depths interleaved (what a bf16 dot
//   product reads).
// Depths are padded with zeros to an even number.
//
// Legend: V vocabulary, C chunk rows (tokens), D hidden size; m, n, k the sizes of one product.
#pragma once

#include <cstdint>

#include "../divergences.h"

namespace mllmkd {

enum class Dtype : int { f32, f64, bf16, f16 };

// Packing and multiplying in one element type; sums are always T.
template <class T>
struct Product {
  const char* name;
  int element_size;  // bytes of a packed element
  int depth;         // largest k of one call
  int stride;        // elements between rows of a left operand, > depth
  // src (m, k), k contiguous, `ld` elements between rows
  void (*pack_left)(Dtype dtype, const void* src, int64_t ld, int m, int k, void* dst);
  // one panel from src (k, n), n contiguous; n <= panel, the rest is zero
  void (*pack_right)(Dtype dtype, const void* src, int64_t ld, int k, int n, void* dst);
  // one panel from src (n, k), k contiguous
  void (*pack_right_t)(Dtype dtype, const void* src, int64_t ld, int k, int n, void* dst);
  // a gradient panel (m, panel) as `panel` columns of a left operand, and transposed as `panel`
  // rows of one
  void (*store_left)(const T* g, int m, void* dst);
  void (*store_left_t)(const T* g, int m, void* dst);
  // c (m, panel) (+)= a (m, k) · b (k, panel)
  void (*multiply)(int m, int k, const void* a, const void* b, T* c, int64_t ldc, bool add);
  // called after the products of a tile (AMX tiles are a state to give back), or null
  void (*release)() = nullptr;
};

// One panel of logits (v rows of `panel` tokens) made final, and its part of the softmax
// statistics.
template <class T>
struct StatsJob {
  T* z;  // in: products h·w; out: logits with bias and soft-cap
  int rows;
  const T* bias;   // (rows) or null
  T cap;           // 0: none
  const T* scale;  // (panel) of the softmax: 1/T, or 1/(T(σ + ε)) of z-scored logits
  bool plain;      // also the sum at temperature 1
  bool again;      // z is final and `max` known: only the sums are made, at another scale
  T* max;          // (panel) of z; null: only the logits are wanted
  T* sum;          // (panel) Σ exp(scale · (z − max))
  T* sum_plain;    // (panel) Σ exp(z − max)
  T* weighted;     // (panel) Σ x·exp(x), x = scale · (z − max), for the entropy; null: not wanted
  T* mean;         // (panel) of z; null: not wanted
  T* square;       // (panel) Σ (z − mean)²
};

// Has some vocabulary row of a panel the largest logit of both models?
template <class T>
struct AgreeJob {
  const T* z_s;
  const T* z_t;
  int rows;
  const T *top_s, *top_t;  // (panel)
  T* found;                // out (panel): 1 or 0
};

// What the loss of a panel needs besides the logits; per-token arrays point at the panel's first
// token.
template <class T>
struct LossJob {
  Divergence divergence;
  T param;
  const T* z_s;
  const T* z_t;  // null: no teacher
  int rows;
  const T *scale_s, *scale_t;  // (panel) of the divergence: 1/T, or 1/(T(σ + ε))
  T ce_scale;                  // 1/T of the cross-entropy
  T cap;                       // the student's soft-cap, 0: none
  bool ce;                     // any cross-entropy at all
  bool shared;                 // the cross-entropy's softmax is the divergence's
  // log q = scale·(z − top) − rest: the log-sum-exp in two parts, since a sum of 60 would round log
  // q by 4e-6
  const T *top_s, *rest_s;    // at `scale_s`
  const T *top_t, *rest_t;    // at `scale_t`
  const T *top_ce, *rest_ce;  // at `ce_scale`
  const T* ce_weight;         // 0 switches the term off, NaN or not
  const T* kd_weight;
  const T* mean;  // Σ q g, for divergences whose gradient needs it
  T* value;       // out (panel): this tile's part of D, null: not wanted
  T* slope;       // out (panel): this tile's part of Σ q g
  T* g;           // out (rows, panel): dL/dz without the one-hot part, null: not wanted
  // Of z-scored logits a = scale_s·(z − top_s) + shift, whose mean is 0; null: they are not.
  const T* shift;
  const T* pull;  // with G = ∂D/∂a, what goes back through σ is −pull·a, pull ~ Σ G a
  T* along;       // out (panel) with `value`: this tile's part of Σ G a, but for the mean Σ q g
  T* centre;      // out (panel) with `value`: this tile's part of Σ q a
};

template <class T>
struct Kernels {
  const char* name;
  int panel;
  Product<T> product;
  void (*stats)(const StatsJob<T>& job);
  void (*loss)(const LossJob<T>& job);
  void (*agree)(const AgreeJob<T>& job);
};

// The tables of the instruction sets this build has; isa.cpp chooses.
const Kernels<float>& kernels_default_f32();
const Kernels<double>& kernels_default_f64();
const Kernels<float>& kernels_avx2_f32();
const Kernels<float>& kernels_avx512_f32();
const Product<float>& product_avx512_bf16();
const Product<float>& product_amx_bf16();

}  // namespace mllmkd
