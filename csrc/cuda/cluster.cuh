// What may a kernel ask of the hardware? One CTA of a thread-block cluster, as an object.
//
// A kernel body is a template over the class of this object: DeviceBlock is the GPU's, and a host
// program can hand in its own, so that the very same source runs (slowly) where there is no GPU.
//
//   thread, threads   index in the CTA and its size, a multiple of 32
//   rank, size        of the CTA in its cluster
//   cluster           index of the cluster in the grid
//   shared            the CTA's dynamic shared memory
//   sync              barrier of the CTA
//   cluster_arrive    first half of a barrier of the cluster; `wrote` publishes what the thread has
//                     written before, for which it waits until all of that is out
//   cluster_wait      second half: what others published can be seen
//   remote            where another CTA of the cluster keeps what this one keeps at `p`
//   shuffle_xor       the value of the lane whose index differs in the bits `lanes`
#pragma once

#include <cmath>
#include <cstdint>

#include "rows.h"

#ifdef __CUDACC__
#  include <cooperative_groups.h>
#  define MLLMKD_DEVICE __device__ __forceinline__
#else
#  define MLLMKD_DEVICE inline
#endif

namespace mllmkd::cuda {

constexpr int kWarp = 32;
constexpr int kMaxWarps = 32;

#ifdef __CUDACC__
struct DeviceBlock {
  int thread, threads, rank, size;
  int64_t cluster;
  float* shared;

  __device__ explicit DeviceBlock(float* memory)
      : thread(threadIdx.x), threads(blockDim.x), shared(memory) {
    const auto group = cooperative_groups::this_cluster();
    rank = group.block_rank();
    size = group.num_blocks();
    cluster = blockIdx.x / group.num_blocks();
  }

  __device__ __forceinline__ void sync() const { __syncthreads(); }

  __device__ __forceinline__ void cluster_arrive(bool wrote) const {
    if (wrote) {
      asm volatile("barrier.cluster.arrive.release;" ::: "memory");
    } else {
      asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
    }
  }

  __device__ __forceinline__ void cluster_wait() const {
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
  }

  __device__ __forceinline__ float* remote(float* p, int of) const {
    return cooperative_groups::this_cluster().map_shared_rank(p, of);
  }

  __device__ __forceinline__ float shuffle_xor(float x, int lanes) const {
    return __shfl_xor_sync(0xffffffffu, x, lanes);
  }
};
#endif

struct Sum {
  static constexpr float identity = 0.0f;
  MLLMKD_DEVICE static float of(float a, float b) { return a + b; }
};

// Ignores NaN, as fmaxf does: a NaN among the logits shows in the sum of exponentials instead.
struct Max {
  static constexpr float identity = -INFINITY;
  MLLMKD_DEVICE static float of(float a, float b) { return fmaxf(a, b); }
};

// Shared memory of the reductions of one row: `Stages` of them, of up to `Values` numbers each.
template <int Stages, int Values>
struct Reductions {
  float parts[Values][kMaxWarps];
  // A stage has a place of its own, so that no barrier is needed before it is written.
  float totals[Stages][Values][kMaxCluster];
};

template <class Op, class Block>
MLLMKD_DEVICE float warp_reduce(const Block& block, float x) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x = Op::of(x, block.shuffle_xor(x, lanes));
  return x;
}

// Every thread's `x` combined over the whole cluster, in an order that depends on nothing but its
// shape; every thread gets the same bits. Warp shuffles, then shared memory, then each CTA writes
// its part into the shared memory of all others: nobody reads remotely, so a CTA may leave after
// the last of these barriers.
//
// `opened`: the caller has met all CTAs of the cluster before. The first reduction of a kernel
// waits here for the arrival announced at its start, since memory of a CTA that has not started
// cannot be written.
template <class Op, int N, class Block, int Stages, int Values>
MLLMKD_DEVICE void cluster_reduce(
    const Block& block, Reductions<Stages, Values>& memory, int stage, bool opened, float (&x)[N]) {
  static_assert(N <= Values);
  const int lane = block.thread % kWarp, warp = block.thread / kWarp;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    x[i] = warp_reduce<Op>(block, x[i]);
    if (lane == 0) memory.parts[i][warp] = x[i];
  }
  block.sync();
  if (!opened) block.cluster_wait();
  if (warp == 0) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const bool used = lane < block.threads / kWarp;
      const float total = warp_reduce<Op>(block, used ? memory.parts[i][lane] : Op::identity);
      if (lane < block.size) *block.remote(&memory.totals[stage][i][block.rank], lane) = total;
    }
  }
  block.cluster_arrive(warp == 0);  // the others have written nothing since the barrier of the CTA
  block.cluster_wait();
#pragma unroll
  for (int i = 0; i < N; ++i) {
    x[i] = memory.totals[stage][i][0];
    for (int r = 1; r < block.size; ++r) x[i] = Op::of(x[i], memory.totals[stage][i][r]);
  }
}

}  // namespace mllmkd::cuda
