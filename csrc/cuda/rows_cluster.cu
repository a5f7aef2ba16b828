// The row kernel on the GPU: instances of Row (rows_cluster.cuh), and how they are launched.
#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <tuple>

#include "rows_cluster.cuh"
#include "rows_launch.h"

namespace mllmkd::cuda {
namespace {

// 64 registers a thread let two CTAs share an SM, where their slices do.
constexpr int kThreads = 512;

template <Divergence D, bool Scored, int W>
__global__ void __launch_bounds__(kThreads, 2) rows_kernel(const __grid_constant__ RowsJob job) {
  extern __shared__ __align__(16) float shared[];
  const DeviceBlock block(shared);
  Row<D, Scored, W, DeviceBlock>(block, job).run();
}

using Kernel = void (*)(RowsJob);

template <bool Scored, int W>
Kernel kernel_of(Divergence divergence) {
  switch (divergence) {
    case Divergence::forward_kl: return rows_kernel<Divergence::forward_kl, Scored, W>;
    case Divergence::reverse_kl: return rows_kernel<Divergence::reverse_kl, Scored, W>;
    case Divergence::jsd: return rows_kernel<Divergence::jsd, Scored, W>;
    case Divergence::skew_forward_kl: return rows_kernel<Divergence::skew_forward_kl, Scored, W>;
    case Divergence::skew_reverse_kl: return rows_kernel<Divergence::skew_reverse_kl, Scored, W>;
    case Divergence::total_variation: return rows_kernel<Divergence::total_variation, Scored, W>;
    case Divergence::soft_cross_entropy:
      return rows_kernel<Divergence::soft_cross_entropy, Scored, W>;
    default: return rows_kernel<Divergence::none, false, W>;
  }
}

template <int W>
Kernel kernel_of(Divergence divergence, bool scored) {
  return scored ? kernel_of<true, W>(divergence) : kernel_of<false, W>(divergence);
}

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// A launch of `job` by clusters of `size` CTAs, and what the kernel must be told before one.
class Launch {
 public:
  Launch(Kernel kernel, const RowsJob& job, int size, cudaStream_t stream)
      : kernel_(kernel), job_(job), size_(size) {
    job_.slice = slice_of(job.vocab, size);
    cluster_.id = cudaLaunchAttributeClusterDimension;
    cluster_.val.clusterDim = {static_cast<unsigned>(size), 1, 1};
    config_.gridDim = static_cast<unsigned>(job.rows * size);
    config_.blockDim = kThreads;
    config_.dynamicSmemBytes = shared_bytes(job_.slice, job.z_t != nullptr);
    config_.stream = stream;
    config_.attrs = &cluster_;
    config_.numAttrs = 1;
  }
  Launch(const Launch&) = delete;  // the configuration points into it

  cudaError_t prepare() const {
    const auto bytes = static_cast<int>(config_.dynamicSmemBytes);
    const cudaError_t error =
        cudaFuncSetAttribute(kernel_, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
    return cudaFuncSetAttribute(kernel_, cudaFuncAttributeNonPortableClusterSizeAllowed, size_ > 8);
  }

  // Can the GPU place one such cluster? Not 16 CTAs where its processors come in smaller groups.
  // The driver is asked once.
  bool possible() const {
    static std::mutex mutex;
    static std::map<std::tuple<Kernel, int, int, size_t>, bool> known;
    int device = 0;
    cudaGetDevice(&device);
    const std::lock_guard lock(mutex);
    const auto [at, unknown] =
        known.try_emplace({kernel_, device, size_, config_.dynamicSmemBytes});
    if (unknown) at->second = asked();
    return at->second;
  }

  cudaError_t run() const {
    const cudaError_t error = prepare();
    return error == cudaSuccess ? cudaLaunchKernelEx(&config_, kernel_, job_) : error;
  }

 private:
  bool asked() const {
    int clusters = 0;
    const bool known = prepare() == cudaSuccess &&
                       cudaOccupancyMaxActiveClusters(&clusters, kernel_, &config_) == cudaSuccess;
    cudaGetLastError();  // the answer "no" is not an error of anything later
    return known && clusters > 0;
  }

  Kernel kernel_;
  RowsJob job_;
  int size_;
  cudaLaunchAttribute cluster_{};
  cudaLaunchConfig_t config_{};
};

}  // namespace

cudaError_t launch_rows(Divergence divergence, RowsJob job, int size, cudaStream_t stream) {
  const bool wide = job.stride % 4 == 0 && job.dz_stride % 4 == 0 && aligned(job.z_s) &&
                    aligned(job.z_t) && aligned(job.dz);
  const Kernel kernel =
      wide ? kernel_of<4>(divergence, job.scored) : kernel_of<1>(divergence, job.scored);
  const bool teacher = job.z_t != nullptr;
  job.series = middle_series(1.0f - job.param);
  if (size == 0) {
    size = cluster_of(job.vocab, teacher);
    const bool smaller = size > 8 && cluster_fits(job.vocab, teacher, 8);
    if (smaller && !Launch(kernel, job, size, stream).possible()) size = 8;
  }
  return Launch(kernel, job, size, stream).run();
}

}  // namespace mllmkd::cuda
