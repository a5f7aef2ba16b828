// The row kernel on the GPU: instances of Row (rows_cluster.cuh), and how they are launched.
#include <cuda_runtime.h>

#include "rows_cluster.cuh"
#include "rows_launch.h"

namespace mllmkd::cuda {
namespace {

// Two CTAs of 512 threads share an SM where their slices let them: one loads while one computes.
constexpr int kThreads = 512;

template <Divergence D, int W>
__global__ void __launch_bounds__(kThreads, 2) rows_kernel(const __grid_constant__ RowsJob job) {
  extern __shared__ __align__(16) float shared[];
  const DeviceBlock block(shared);
  Row<D, W, DeviceBlock>(block, job).run();
}

using Kernel = void (*)(RowsJob);

template <int W>
Kernel kernel_of(Divergence divergence) {
  switch (divergence) {
    case Divergence::forward_kl: return rows_kernel<Divergence::forward_kl, W>;
    case Divergence::reverse_kl: return rows_kernel<Divergence::reverse_kl, W>;
    case Divergence::jsd: return rows_kernel<Divergence::jsd, W>;
    case Divergence::skew_forward_kl: return rows_kernel<Divergence::skew_forward_kl, W>;
    case Divergence::skew_reverse_kl: return rows_kernel<Divergence::skew_reverse_kl, W>;
    case Divergence::total_variation: return rows_kernel<Divergence::total_variation, W>;
    case Divergence::soft_cross_entropy: return rows_kernel<Divergence::soft_cross_entropy, W>;
    default: return rows_kernel<Divergence::none, W>;
  }
}

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

#define RETURN_IF_ERROR(call) \
  if (const cudaError_t error = (call); error != cudaSuccess) return error

// Attributes, configuration and, unless `clusters` asks only how many fit on the device, a launch.
cudaError_t start(
    Kernel kernel, const RowsJob& job, int size, cudaStream_t stream, int* clusters = nullptr) {
  const int64_t bytes = shared_bytes(job.slice, job.z_t != nullptr);
  RETURN_IF_ERROR(cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
  RETURN_IF_ERROR(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, size > 8));
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(size), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(job.rows * size);
  config.blockDim = kThreads;
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  if (clusters) return cudaOccupancyMaxActiveClusters(clusters, kernel, &config);
  return cudaLaunchKernelEx(&config, kernel, job);
}

}  // namespace

bool cluster_fits(int64_t vocab, bool teacher, int64_t size) {
  const bool known = size == 1 || size == 2 || size == 4 || size == 8 || size == kMaxCluster;
  return known && shared_bytes(slice_of(vocab, static_cast<int>(size)), teacher) <= kSharedBytes;
}

int cluster_of(int64_t vocab, bool teacher) {
  for (int size = 1; size <= kMaxCluster; size *= 2) {
    if (shared_bytes(slice_of(vocab, size), teacher) <= kSharedBytesOfTwo) return size;
  }
  return cluster_fits(vocab, teacher, kMaxCluster) ? kMaxCluster : 0;
}

cudaError_t launch_rows(Divergence divergence, RowsJob job, int size, cudaStream_t stream) {
  const bool wide = job.vocab % 4 == 0 && aligned(job.z_s) && aligned(job.z_t);
  const Kernel kernel = wide ? kernel_of<4>(divergence) : kernel_of<1>(divergence);
  job.slice = slice_of(job.vocab, size);
  return start(kernel, job, size, stream);
}

}  // namespace mllmkd::cuda
