#include "head_gradient.h"

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

}  // namespace

template <class T>
HeadGradient<T>::HeadGradient(
    const at::Tensor& hidden, const Product<T>& product, int64_t rows, int64_t vocab, int64_t chunk,
    bool many_chunks, at::ScalarType dtype, T factor, const std::optional<at::Tensor>& into)
    : hidden_(hidden, "hidden"),
      kernels_(kernels<T>()),
      product_(product),
      features_(hidden.size(1)),
      feature_panels_((features_ + kernels_.panel - 1) / kernels_.panel),
      blocks_((chunk + product_.depth - 1) / product_.depth),
      vocab_(hidden.size(0) ? vocab : 0),
      many_(many_chunks || into),
      factor_(factor),
      started_(into.has_value()) {
  const auto real = c10::CppTypeToScalarType<T>::value;
  const int64_t threads = at::get_num_threads(), panel = kernels_.panel,
                bytes = product_.element_size;
  const int64_t shape[] = {rows, features_};
  rounds_ = dtype != real || factor != 1;
  in_place_ = many_ && dtype != real;
  if (in_place_) {
    // summed in T; at the end the rounded numbers take the first half of the same memory
    const at::Tensor sum = kept_tensor(shape, real);
    sum_ = sum.mutable_data_ptr<T>();
    dw = at::from_blob(sum_, shape, [sum](void*) {}, at::TensorOptions(dtype));
  } else {
    dw = into ? *into : kept_tensor(shape, dtype);
    if (!into) tail().zero_();
    if (dtype == real) {
      sum_ = dw.mutable_data_ptr<T>();
    } else {
      tile_ = Buffer(threads, kTile * features_ * sizeof(T));
    }
  }
  right_ = Buffer(blocks_ * feature_panels_, product_.depth * panel * bytes);
  left_ = Buffer(threads, kTile * product_.stride * bytes);
  edge_ = Buffer(threads, kTile * panel * sizeof(T));
}

template <class T>
void HeadGradient<T>::load(int64_t row, int64_t rows, const bool* live, bool last) {
  rows_ = rows, last_ = last;
  const int64_t panel = kernels_.panel;
  // a dead row may hold NaN, and 0 · NaN is NaN: it must be zero in the operand, not only in G
  at::Tensor h = hidden_.tensor.narrow(0, row, rows);
  if (live && !std::all_of(live, live + rows, [](bool x) { return x; })) {
    const at::Tensor dead =
        at::from_blob(const_cast<bool*>(live), {rows, 1}, at::kBool).logical_not();
    h = h.masked_fill(dead, 0);
  }
  const Rows source(h, "hidden");
  at::parallel_for(0, blocks_ * feature_panels_, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t c = i / feature_panels_ * product_.depth, d = i % feature_panels_;
      const int64_t size = std::clamp<int64_t>(rows - c, 0, product_.depth);
      std::memset(right_.part(i), 0, product_.depth * panel * product_.element_size);
      if (!size) continue;
      product_.pack_right(
          source.dtype, source.at(c, d * panel), source.ld, static_cast<int>(size),
          static_cast<int>(columns(d)), right_.part(i));
    }
  });
}

template <class T>
void HeadGradient<T>::multiply(int64_t v, int m, int64_t panel, int64_t panels, int thread) {
  const int64_t block = panel / block_panels();
  const bool add = (many_ && started_) || block > 0;
  T* out = sum_ ? sum_ + v * features_ : tile_.template part<T>(thread);
  const int k = static_cast<int>(panels * kernels_.panel);
  for (int64_t i = 0; i < feature_panels_; ++i) {
    multiply_columns(m, k, block, i, left_.part(thread), out + i * kernels_.panel, add, thread);
  }
  const bool complete = last_ && (panel + panels) * kernels_.panel >= rows_;
  if (!complete || !rounds_) return;
  char* place = static_cast<char*>(dw.mutable_data_ptr()) + v * features_ * dw.element_size();
  round_rows(
      out, factor_, m * features_, dw.scalar_type(), in_place_ ? static_cast<void*>(out) : place);
}

// One panel of columns of dW. The last may be narrower than a panel: then by way of a buffer.
template <class T>
void HeadGradient<T>::multiply_columns(
    int m, int k, int64_t block, int64_t i, const void* left, T* out, bool add, int thread) const {
  const void* right = right_.part(block * feature_panels_ + i);
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
void HeadGradient<T>::finish_chunk() {
  started_ = true;
  if (!in_place_ || !last_) return;
  const int64_t tile = kTile * features_, size = dw.element_size();
  move_together(
      static_cast<char*>(dw.mutable_data_ptr()), vocab_ * features_ * size, tile * size,
      tile * static_cast<int64_t>(sizeof(T)));
  tail().zero_();
}

template class HeadGradient<float>;
template class HeadGradient<double>;

namespace {

template <class T>
at::Tensor of_kept(
    const at::Tensor& dz, const at::Tensor& h, T factor, int64_t rows, int64_t vocab,
    at::ScalarType dtype) {
  const int64_t panel = kernels<T>().panel, panels = dz.size(1), tokens = h.size(0);
  TORCH_CHECK_VALUE(
      dz.dim() == 4 && dz.is_contiguous() && dz.size(0) == tiles_of(vocab) &&
          panels == (tokens + panel - 1) / panel && dz.size(2) == kTile && dz.size(3) == panel,
      "dz: got shape ", dz.sizes(), ", expected tiles of ", tokens, " rows and ", vocab,
      " columns, and contiguous");
  const Product<T>& product = product_for<T>(h, at::empty({0}, dtype));
  HeadGradient<T> out(h, product, rows, vocab, panels * panel, false, dtype, factor);
  if (!tokens) return out.dw;
  out.load(0, tokens, nullptr, true);
  const int64_t step = out.block_panels();
  for_tiles(product, vocab, true, [&](int64_t v, int m, int thread) {
    const T* g = dz.const_data_ptr<T>() + v / kTile * panels * kTile * panel;
    for (int64_t p = 0; p < panels; p += step) {
      const int64_t count = std::min(step, panels - p);
      for (int64_t i = 0; i < count; ++i, g += kTile * panel) out.add_panel(g, m, i, thread);
      out.multiply(v, m, p, count, thread);
    }
  });
  return out.dw;
}

}  // namespace

at::Tensor head_gradient(
    const at::Tensor& dz, const at::Tensor& h, const at::Tensor& factor, int64_t rows,
    int64_t vocab, at::ScalarType dtype) {
  return dz.scalar_type() == at::kDouble
             ? of_kept<double>(dz, h, factor.item<double>(), rows, vocab, dtype)
             : of_kept<float>(dz, h, factor.item<float>(), rows, vocab, dtype);
}

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
