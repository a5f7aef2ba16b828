#include "head.h"

#include <ATen/Parallel.h>

#include <algorithm>

namespace mllmkd {

Dtype dtype_of(const at::Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case at::kFloat: return Dtype::f32;
    case at::kDouble: return Dtype::f64;
    case at::kBFloat16: return Dtype::bf16;
    case at::kHalf: return Dtype::f16;
    default:
      TORCH_CHECK_TYPE(
          false, name, ": got dtype ", x.scalar_type(), ", expected a floating-point tensor");
  }
}

Rows::Rows(const at::Tensor& x, const char* name) : tensor(x), dtype(dtype_of(x, name)), ld(0) {
  TORCH_CHECK_VALUE(x.dim() == 2, name, ": got shape ", x.sizes(), ", expected two dimensions");
  TORCH_CHECK_VALUE(x.device().is_cpu(), name, ": got device ", x.device(), ", expected cpu");
  if (x.stride(1) != 1 || x.stride(0) < x.size(1)) tensor = x.contiguous();
  ld = tensor.stride(0);
}

template <class T>
Head<T>::Head(
    const at::Tensor& hidden, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    double cap, int64_t vocab, int64_t chunk, const char* side)
    : hidden_(hidden, side),
      weight_(weight, side),
      kernels_(kernels<T>()),
      product_(product_for<T>(hidden, weight)),
      cap_(static_cast<T>(cap)),
      depth_(hidden.size(1)),
      slabs_((hidden.size(1) + product_.depth - 1) / product_.depth),
      panels_(chunk / kernels_.panel),
      right_(slabs_ * panels_, int64_t{product_.depth} * kernels_.panel * product_.element_size),
      left_(at::get_num_threads(), int64_t{kTile} * product_.stride * product_.element_size) {
  TORCH_CHECK_VALUE(
      hidden.size(1) == weight.size(1), side, ": hidden states have ", hidden.size(1),
      " features, the weight ", weight.size(1));
  TORCH_CHECK_VALUE(
      vocab <= weight.size(0), side, ": vocabulary ", vocab, " of a weight with ", weight.size(0),
      " rows");
  if (bias) {
    TORCH_CHECK_VALUE(
        bias->dim() == 1 && bias->size(0) == weight.size(0), side, ": bias of shape ",
        bias->sizes(), " for a weight with ", weight.size(0), " rows");
    bias_ = bias->to(c10::CppTypeToScalarType<T>::value).contiguous();
  }
}

template <class T>
void Head<T>::load(int64_t row, int64_t rows) {
  const int panel = kernels_.panel;
  at::parallel_for(0, slabs_ * panels_, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t k = i / panels_ * product_.depth, n = i % panels_ * panel;
      const int64_t size = std::clamp<int64_t>(rows - n, 0, panel);
      product_.pack_right_t(
          hidden_.dtype, hidden_.at(row + (size ? n : 0), k), hidden_.ld,
          static_cast<int>(std::min<int64_t>(product_.depth, depth_ - k)), static_cast<int>(size),
          right_.part(i));
    }
  });
}

template <class T>
void Head<T>::products(int64_t v, int m, int64_t panel, int64_t panels, int thread, T* z) const {
  void* left = left_.part(thread);
  for (int64_t slab = 0; slab < slabs_; ++slab) {
    const int64_t k = slab * product_.depth;
    const int size = static_cast<int>(std::min<int64_t>(product_.depth, depth_ - k));
    product_.pack_left(weight_.dtype, weight_.at(v, k), weight_.ld, m, size, left);
    for (int64_t i = 0; i < panels; ++i) {
      product_.multiply(
          m, size, left, right_.part(slab * panels_ + panel + i), z + i * kTile * kernels_.panel,
          kernels_.panel, slab > 0);
    }
  }
}

template class Head<float>;
template class Head<double>;

}  // namespace mllmkd
