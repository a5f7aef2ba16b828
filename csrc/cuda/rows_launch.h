// How the row kernel is launched: cluster sizes and their limits.
#pragma once

#include <cuda_runtime_api.h>

#include "rows.h"

namespace mllmkd::cuda {

// Shared memory a CTA may have on sm_90 and sm_100, and what leaves room for a second one on the SM
// (228 KiB, of which every CTA takes 1 KiB for the system).
constexpr int64_t kSharedBytes = 227 * 1024;
constexpr int64_t kSharedBytesOfTwo = 113 * 1024;

// CTAs for a row: the fewest that put two CTAs on an SM; 16 where none does and it still fits; 0:
// the row is too long.
int cluster_of(int64_t vocab, bool teacher);

// Can `size` CTAs hold the row?
bool cluster_fits(int64_t vocab, bool teacher, int64_t size);

// `job` but for its slice; clusters of `size` CTAs. The pointers are the device's.
cudaError_t launch_rows(Divergence divergence, RowsJob job, int size, cudaStream_t stream);

}  // namespace mllmkd::cuda
