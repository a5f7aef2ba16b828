// The row kernel as an operator: checks what it was given and names what is wrong, then launches.
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "../ops.h"
#include "rows_launch.h"

namespace mllmkd {
namespace {

// The data of a tensor of `sizes` in `dtype` on the device of `beside`, null for none.
template <class T>
const T* data_of(
    const char* name, const Optional& x, at::IntArrayRef sizes, at::ScalarType dtype,
    const at::Tensor& beside) {
  if (!x) return nullptr;
  TORCH_CHECK_VALUE(x->sizes() == sizes, name, ": got shape ", x->sizes(), ", expected ", sizes);
  TORCH_CHECK_TYPE(
      x->scalar_type() == dtype, name, ": got dtype ", x->scalar_type(), ", expected ", dtype);
  TORCH_CHECK_VALUE(x->is_contiguous(), name, ": expected a contiguous tensor");
  TORCH_CHECK_VALUE(
      x->device() == beside.device(), name, ": on ", x->device(), ", expected ", beside.device());
  return static_cast<const T*>(x->const_data_ptr());
}

// The data of a block (C, V) in `dtype` with adjacent columns, and how far apart its rows lie.
const void* block_of(
    const char* name, const at::Tensor& x, at::ScalarType dtype, const at::Tensor& beside,
    int64_t* stride) {
  TORCH_CHECK_VALUE(
      x.sizes() == beside.sizes(), name, ": got shape ", x.sizes(), ", expected ", beside.sizes());
  TORCH_CHECK_TYPE(
      x.scalar_type() == dtype, name, ": got dtype ", x.scalar_type(), ", expected ", dtype);
  TORCH_CHECK_VALUE(
      x.stride(1) == 1 && x.stride(0) >= x.size(1), name, ": got strides ", x.strides(),
      ", expected adjacent columns and rows at least ", x.size(1), " apart");
  TORCH_CHECK_VALUE(
      x.device() == beside.device(), name, ": on ", x.device(), ", expected ", beside.device());
  *stride = x.stride(0);
  return x.const_data_ptr();
}

// A bias of `vocab` entries or more, in the dtype it has.
const void* bias_of(
    const char* name, const Optional& b, const at::Tensor& beside, cuda::BiasType* type) {
  if (!b) return nullptr;
  TORCH_CHECK_VALUE(
      b->dim() == 1 && b->size(0) >= beside.size(1), name, ": got shape ", b->sizes(),
      ", expected (", beside.size(1), ",) or longer");
  switch (b->scalar_type()) {
    case at::kFloat: *type = cuda::BiasType::f32; break;
    case at::kBFloat16: *type = cuda::BiasType::bf16; break;
    case at::kHalf: *type = cuda::BiasType::f16; break;
    default:
      TORCH_CHECK_TYPE(
          false, name, ": got dtype ", b->scalar_type(), ", expected float, bfloat16 or half");
  }
  return data_of<void>(name, b, b->sizes(), b->scalar_type(), beside);
}

void check_cluster(const at::Tensor& zs, bool teacher, int64_t cluster) {
  const int64_t vocab = zs.size(1);
  TORCH_CHECK_VALUE(
      cuda::cluster_of(vocab, teacher) > 0, "zs: a row of ", vocab,
      " logits does not fit the shared memory of ", cuda::kMaxCluster,
      " CTAs; use backend 'triton' for this vocabulary");
  TORCH_CHECK_VALUE(
      cluster == 0 || cuda::cluster_fits(vocab, teacher, cluster), "cluster: got ", cluster,
      ", expected 1, 2, 4, 8 or 16 CTAs that hold ", vocab, " columns, or 0 to choose");
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> cuda_rows_(
    const at::Tensor& zs, const Optional& zt, const Optional& bs, const Optional& bt,
    const Optional& labels, const Optional& ce_weight, const Optional& kd_weight,
    const Optional& broken_s, const Optional& broken_t, std::string_view divergence, double param,
    double temperature, double cap_s, double cap_t, int64_t ignore_index,
    const std::optional<at::Tensor>& dz, int64_t cluster, bool standardize) {
  TORCH_CHECK_VALUE(zs.dim() == 2, "zs: got shape ", zs.sizes(), ", expected (C, V)");
  const at::IntArrayRef row{zs.sizes().data(), 1};
  const bool kd = zt && kd_weight, ce = labels && ce_weight;
  cuda::RowsJob job{};
  job.z_s = static_cast<const float*>(block_of("zs", zs, at::kFloat, zs, &job.stride));
  if (kd) {
    int64_t stride = 0;
    job.z_t = static_cast<const float*>(block_of("zt", *zt, at::kFloat, zs, &stride));
    TORCH_CHECK_VALUE(
        stride == job.stride, "zt: rows are ", stride, " apart, those of zs ", job.stride);
  }
  if (dz) {
    job.dz_bf16 = dz->scalar_type() == at::kBFloat16;
    block_of("dz", *dz, job.dz_bf16 ? at::kBFloat16 : at::kFloat, zs, &job.dz_stride);
    job.dz = dz->mutable_data_ptr();
  }
  job.b_s = bias_of("bs", bs, zs, &job.b_s_type);
  if (kd) job.b_t = bias_of("bt", bt, zs, &job.b_t_type);
  if (ce) job.labels = data_of<int64_t>("labels", labels, row, at::kLong, zs);
  if (ce) job.ce_weight = data_of<float>("ce_weight", ce_weight, row, at::kFloat, zs);
  if (kd) job.kd_weight = data_of<float>("kd_weight", kd_weight, row, at::kFloat, zs);
  job.broken_s = data_of<bool>("broken_s", broken_s, row, at::kBool, zs);
  job.broken_t = data_of<bool>("broken_t", broken_t, row, at::kBool, zs);
  const at::Tensor ce_rows = at::zeros(row, zs.options()), kd_rows = at::zeros(row, zs.options());
  job.ce = ce_rows.mutable_data_ptr<float>();
  job.kd = kd_rows.mutable_data_ptr<float>();
  job.rows = zs.size(0);
  job.ignore_index = ignore_index;
  job.vocab = static_cast<int>(zs.size(1));
  job.param = static_cast<float>(param);
  job.scale = static_cast<float>(1 / temperature);
  job.cap_s = static_cast<float>(cap_s);
  job.cap_t = static_cast<float>(cap_t);
  job.scored = kd && standardize;
  const auto which = kd ? divergence_of(divergence) : Divergence::none;
  check_cluster(zs, kd, cluster);
  if (zs.numel() > 0) {
    const c10::cuda::CUDAGuard guard(zs.device());
    const auto stream = c10::cuda::getCurrentCUDAStream();
    C10_CUDA_CHECK(cuda::launch_rows(which, job, static_cast<int>(cluster), stream.stream()));
  }
  return {ce_rows, kd_rows};
}

}  // namespace mllmkd
