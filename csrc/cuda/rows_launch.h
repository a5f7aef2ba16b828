// How the row kernel is launched.
#pragma once

#include <cuda_runtime_api.h>

#include "rows.h"

namespace mllmkd::cuda {

// `job` but for its slice, by clusters of `size` CTAs; 0: as many as are best, fewer where the GPU
// cannot place that many together. The pointers are the device's, which is the current one.
cudaError_t launch_rows(Divergence divergence, RowsJob job, int size, cudaStream_t stream);

}  // namespace mllmkd::cuda
