#include "gradients.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <cstring>

#include "../ops.h"

namespace mllmkd {
namespace {

// factor times n numbers of `src` in `dtype` at `dst`, which may be `src` itself; the only rounding
// of dW.
template <class T>
void round_rows(const T* src, T factor, int64_t n, at::ScalarType dtype, void* dst) {
  constexpr int64_t block = 512;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, dtype, "gradient", [&] {
    scalar_t rounded[block];
    for (int64_t i = 0; i < n; i += block) {
      const int64_t count = std::min(block, n - i);
      for (int64_t j = 0; j < count; ++j) rounded[j] = static_cast<scalar_t>(src[i + j] * factor);
      std::memcpy(static_cast<scalar_t*>(dst) + i, rounded, count * sizeof(scalar_t));
    }
  });
}

// Pieces of `piece` bytes (the last shorter), spread `spread` bytes apart, move together in place.
// Those of [n, 2n) go where [n/2, n) were, as long as they are no more than half as dense: so each
// doubling is parallel, and reads nothing that it writes.
void move_together(char* data, int64_t bytes, int64_t piece, int64_t spread) {
  const int64_t pieces = (bytes + piece - 1) / piece;
  for (int64_t n = 1; n < pieces; n *= 2) {
    at::parallel_for(n, std::min(2 * n, pieces), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        std::memcpy(data + i * piece, data + i * spread, std::min(piece, bytes - i * piece));
      }
    });
  }
}

std::vector<int64_t> shape_if(bool wanted, std::vector<int64_t> shape) {
  return wanted ? shape : std::vector<int64_t>{0};
}

}  // namespace

template <class T>
Gradients<T>::Gradients(
    const at::Tensor& hidden, const at::Tensor& weight, int64_t vocab, int64_t chunk,
    bool many_chunks, Wanted wanted, at::ScalarType dw_dtype)
    : hidden_(hidden, "hidden"),
      weight_(weight, "weight"),
      kernels_(kernels<T>()),
      product_(product_for<T>(hidden, weight)),
      wanted_(wanted),
      features_(hidden.size(1)),
      feature_panels_((features_ + kernels_.panel - 1) / kernels_.panel),
      chunk_(chunk),
      vocab_(hidden.size(0) ? vocab : 0),
      many_(many_chunks) {
  const auto real = c10::CppTypeToScalarType<T>::value;
  const int64_t threads = at::get_num_threads(), panel = kernels_.panel,
                bytes = product_.element_size;
  const int64_t blocks = (chunk + product_.depth - 1) / product_.depth,
                left_row = product_.stride * bytes;
  dh = at::zeros(shape_if(wanted.dh, {hidden.size(0), features_}), real);
  db = at::zeros(shape_if(wanted.db, {weight.size(0)}), real);
  const auto shape = shape_if(wanted.dw, {weight.size(0), features_});
  in_place_ = wanted.dw && many_chunks && dw_dtype != real;
  if (in_place_) {
    // summed in T; at the end the rounded numbers take the first half of the same memory
    const at::Tensor sum = kept_tensor(shape, real);
    sum_ = sum.mutable_data_ptr<T>();
    dw = at::from_blob(sum_, shape, [sum](void*) {}, at::TensorOptions(dw_dtype));
  } else {
    dw = kept_tensor(shape, dw_dtype);
  }
  if (!wanted.any()) return;
  g_ = Buffer(threads, kTile * panel * sizeof(T));
  if (wanted.dw) {
    if (!in_place_) tail().zero_();
    right_h_ = Buffer(blocks * feature_panels_, product_.depth * panel * bytes);
    left_v_ = Buffer(threads, kTile * left_row);
    edge_ = Buffer(threads, kTile * panel * sizeof(T));
    if (dw_dtype == real) {
      sum_ = dw.mutable_data_ptr<T>();
    } else if (!in_place_) {
      dw_tile_ = Buffer(threads, kTile * features_ * sizeof(T));
    }
    rounds_ = dw_dtype != real;
  }
  if (wanted.dh) {
    right_w_ = Buffer(threads, (kTile + 1) * panel * bytes);
    left_c_ = Buffer(threads, product_.depth * left_row);
    dh_ = Buffer(threads, chunk * feature_panels_ * panel * sizeof(T));
  }
}

template <class T>
void Gradients<T>::load(int64_t row, int64_t rows, const bool* live, bool last) {
  row_ = row, rows_ = rows, last_ = last;
  const int64_t panel = kernels_.panel, blocks = (chunk_ + product_.depth - 1) / product_.depth;
  if (wanted_.dh) {
    for (int t = 0; t < at::get_num_threads(); ++t) {
      std::memset(dh_.part(t), 0, chunk_ * feature_panels_ * panel * sizeof(T));
    }
  }
  if (!wanted_.dw) return;
  // a dead row may hold NaN, and 0 · NaN is NaN: it must be zero in the operand, not only in G
  at::Tensor h = hidden_.tensor.narrow(0, row, rows);
  if (!std::all_of(live, live + rows, [](bool x) { return x; })) {
    const at::Tensor dead =
        at::from_blob(const_cast<bool*>(live), {rows, 1}, at::kBool).logical_not();
    h = h.masked_fill(dead, 0);
  }
  const Rows source(h, "hidden");
  at::parallel_for(0, blocks * feature_panels_, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t c = i / feature_panels_ * product_.depth, d = i % feature_panels_;
      const int64_t size = std::clamp<int64_t>(rows - c, 0, product_.depth);
      std::memset(right_h_.part(i), 0, product_.depth * panel * product_.element_size);
      if (!size) continue;
      product_.pack_right(
          source.dtype, source.at(c, d * panel), source.ld, static_cast<int>(size),
          static_cast<int>(columns(d)), right_h_.part(i));
    }
  });
}

template <class T>
void Gradients<T>::add_panel(int64_t v, int m, int64_t i, int thread) {
  const T* g = panel(thread);
  const int64_t panel = kernels_.panel, bytes = product_.element_size;
  if (wanted_.dw) product_.store_left(g, m, left_v_.part(thread) + i * panel * bytes);
  if (wanted_.dh)
    product_.store_left_t(g, m, left_c_.part(thread) + i * panel * product_.stride * bytes);
  if (!wanted_.db) return;
  T* out = db.template mutable_data_ptr<T>() + v;
  for (int j = 0; j < m; ++j) {
    double sum = 0;
    for (int64_t lane = 0; lane < panel; ++lane) sum += g[j * panel + lane];
    out[j] += static_cast<T>(sum);
  }
}

template <class T>
void Gradients<T>::multiply(int64_t v, int m, int64_t panel, int64_t panels, int thread) {
  if (wanted_.dw) multiply_dw(v, m, panel, panels, thread);
  if (wanted_.dh) multiply_dh(v, m, panel, panels, thread);
}

template <class T>
void Gradients<T>::multiply_dw(int64_t v, int m, int64_t panel, int64_t panels, int thread) {
  const int64_t block = panel / block_panels();
  const bool add = (many_ && started_) || block > 0;
  T* out = sum_ ? sum_ + v * features_ : dw_tile_.template part<T>(thread);
  const int k = static_cast<int>(panels * kernels_.panel);
  for (int64_t i = 0; i < feature_panels_; ++i) {
    add_panel_dw(m, k, block, i, left_v_.part(thread), out + i * kernels_.panel, add, thread);
  }
  const bool complete = last_ && (panel + panels) * kernels_.panel >= rows_;
  if (!complete || !rounds_) return;
  char* place = static_cast<char*>(dw.mutable_data_ptr()) + v * features_ * dw.element_size();
  round_rows(
      out, T(1), m * features_, dw.scalar_type(), in_place_ ? static_cast<void*>(out) : place);
}

// One panel of columns of dW. The last may be narrower than a panel: then by way of a buffer.
template <class T>
void Gradients<T>::add_panel_dw(
    int m, int k, int64_t block, int64_t i, const void* left, T* out, bool add, int thread) const {
  const void* right = right_h_.part(block * feature_panels_ + i);
  const int64_t n = columns(i), panel = kernels_.panel;
  if (n == panel) return product_.multiply(m, k, left, right, out, features_, add);
  T* edge = edge_.template part<T>(thread);
  product_.multiply(m, k, left, right, edge, panel, false);
  for (int j = 0; j < m; ++j) {
    for (int64_t d = 0; d < n; ++d)
      out[j * features_ + d] = edge[j * panel + d] + (add ? out[j * features_ + d] : 0);
  }
}

template <class T>
void Gradients<T>::multiply_dh(int64_t v, int m, int64_t panel, int64_t panels, int thread) {
  const int64_t ld = feature_panels_ * kernels_.panel;
  T* out = dh_.template part<T>(thread) + panel * kernels_.panel * ld;
  for (int64_t i = 0; i < feature_panels_; ++i) {
    product_.pack_right(
        weight_.dtype, weight_.at(v, i * kernels_.panel), weight_.ld, m,
        static_cast<int>(columns(i)), right_w_.part(thread));
    product_.multiply(
        static_cast<int>(panels * kernels_.panel), m, left_c_.part(thread), right_w_.part(thread),
        out + i * kernels_.panel, ld, true);
  }
}

template <class T>
void Gradients<T>::finish_chunk() {
  started_ = true;
  if (in_place_ && last_) {
    const int64_t tile = kTile * features_, size = dw.element_size();
    move_together(
        static_cast<char*>(dw.mutable_data_ptr()), vocab_ * features_ * size, tile * size,
        tile * static_cast<int64_t>(sizeof(T)));
    tail().zero_();
  }
  if (!wanted_.dh) return;
  const int threads = at::get_num_threads();
  const int64_t ld = feature_panels_ * kernels_.panel;
  T* out = dh.template mutable_data_ptr<T>() + row_ * features_;
  at::parallel_for(0, rows_, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      for (int64_t d = 0; d < features_; ++d) {
        T sum = 0;
        for (int t = 0; t < threads; ++t) sum += dh_.template part<T>(t)[c * ld + d];
        out[c * features_ + d] = sum;
      }
    }
  });
}

template class Gradients<float>;
template class Gradients<double>;

at::Tensor scaled(const at::Tensor& x, const at::Tensor& factor, at::ScalarType dtype) {
  at::Tensor out = kept_tensor(x.sizes(), dtype);
  const at::Tensor dense = x.contiguous();
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "scaled", [&] {
    const scalar_t* from = dense.const_data_ptr<scalar_t>();
    const scalar_t by = factor.item<scalar_t>();
    char* to = static_cast<char*>(out.mutable_data_ptr());
    at::parallel_for(0, x.numel(), 1 << 15, [&](int64_t begin, int64_t end) {
      round_rows(from + begin, by, end - begin, dtype, to + begin * out.element_size());
    });
  });
  return out;
}

}  // namespace mllmkd
