#include "labels.h"

#include <algorithm>

namespace mllmkd {

at::Tensor checked_labels(
    const at::Tensor& labels, int64_t rows, int64_t vocab, int64_t ignore_index) {
  TORCH_CHECK_TYPE(
      labels.scalar_type() == at::kLong, "labels: got dtype ", labels.scalar_type(),
      ", expected int64");
  TORCH_CHECK_VALUE(
      labels.dim() == 1 && labels.size(0) == rows, "labels: got shape ", labels.sizes(),
      ", expected (", rows, ",)");
  const at::Tensor dense = labels.contiguous();
  const int64_t* label = dense.const_data_ptr<int64_t>();
  for (int64_t n = 0; n < rows; ++n) {
    TORCH_CHECK_INDEX(
        label[n] == ignore_index || (label[n] >= 0 && label[n] < vocab), "labels: row ", n,
        " has label ", label[n], ", expected a value in [0, ", vocab, ") or ignore_index ",
        ignore_index);
  }
  return dense;
}

template <class T>
void ChunkRows<T>::load(
    int64_t row, int64_t count, const int64_t* labels, const T* ce, const T* kd,
    int64_t ignore_index) {
  std::fill(label.begin(), label.end(), -1);
  std::fill(ce_weight.begin(), ce_weight.end(), T(0));
  std::fill(kd_weight.begin(), kd_weight.end(), T(0));
  std::fill(label_logit.begin(), label_logit.end(), T(0));
  for (int64_t c = 0; c < count; ++c) {
    if (labels && labels[row + c] != ignore_index) {
      label[c] = labels[row + c];
      ce_weight[c] = ce ? ce[row + c] : T(0);
    }
    kd_weight[c] = kd ? kd[row + c] : T(0);
  }
  for (size_t c = 0; c < label.size(); ++c) live[c] = ce_weight[c] != 0 || kd_weight[c] != 0;
}

template struct ChunkRows<float>;
template struct ChunkRows<double>;

}  // namespace mllmkd
