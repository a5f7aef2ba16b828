#include "gradients.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstring>

namespace mllmkd {
namespace {

std::vector<int64_t> shape_if(bool wanted, std::vector<int64_t> shape) {
  return wanted ? shape : std::vector<int64_t>{0};
}

}  // namespace

template <class T>
Gradients<T>::Gradients(
    const at::Tensor& hidden, const at::Tensor& weight, int64_t vocab, int64_t chunk,
    bool many_chunks, Wanted wanted, at::ScalarType dw_dtype, const std::optional<at::Tensor>& into,
    T factor)
    : weight_(weight, "weight"),
      kernels_(kernels<T>()),
      product_(product_for<T>(hidden, weight)),
      wanted_(wanted),
      added_(into.has_value()),
      factor_(factor),
      features_(hidden.size(1)),
      feature_panels_((features_ + kernels_.panel - 1) / kernels_.panel),
      chunk_(chunk),
      none_(at::empty({0}, dw_dtype)) {
  const auto real = c10::CppTypeToScalarType<T>::value;
  const int64_t threads = at::get_num_threads(), panel = kernels_.panel,
                bytes = product_.element_size;
  dh = at::zeros(shape_if(wanted.dh, {hidden.size(0), features_}), real);
  db = at::zeros(shape_if(wanted.db, {weight.size(0)}), real);
  if (wanted.any()) g_ = Buffer(threads, kTile * panel * sizeof(T));
  if (wanted.dw) {
    head_.emplace(
        hidden, product_, weight.size(0), vocab, chunk, many_chunks, dw_dtype, T(1), into);
  }
  if (wanted.dh) {
    right_w_ = Buffer(threads, (kTile + 1) * panel * bytes);
    left_c_ = Buffer(threads, product_.depth * product_.stride * bytes);
    dh_ = Buffer(threads, chunk * feature_panels_ * panel * sizeof(T));
  }
}

template <class T>
void Gradients<T>::load(int64_t row, int64_t rows, const bool* live, bool last) {
  row_ = row, rows_ = rows;
  if (wanted_.dh) {
    for (int t = 0; t < at::get_num_threads(); ++t) {
      std::memset(dh_.part(t), 0, chunk_ * feature_panels_ * kernels_.panel * sizeof(T));
    }
  }
  if (head_) head_->load(row, rows, live, last);
}

template <class T>
void Gradients<T>::add_panel(int64_t v, int m, int64_t i, int thread) {
  T* g = panel(thread);
  const int64_t panel = kernels_.panel, bytes = product_.element_size;
  if (wanted_.dh)
    product_.store_left_t(g, m, left_c_.part(thread) + i * panel * product_.stride * bytes);
  if (wanted_.db) {
    T* out = db.template mutable_data_ptr<T>() + v;
    for (int j = 0; j < m; ++j) {
      double sum = 0;
      for (int64_t lane = 0; lane < panel; ++lane) sum += g[j * panel + lane];
      out[j] += static_cast<T>(sum);
    }
  }
  if (!head_) return;
  if (factor_ != 1) std::for_each_n(g, m * panel, [this](T& x) { x *= factor_; });
  head_->add_panel(g, m, i, thread);
}

template <class T>
void Gradients<T>::multiply(int64_t v, int m, int64_t panel, int64_t panels, int thread) {
  if (head_) head_->multiply(v, m, panel, panels, thread);
  if (wanted_.dh) multiply_dh(v, m, panel, panels, thread);
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
  if (head_) head_->finish_chunk();
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

}  // namespace mllmkd
