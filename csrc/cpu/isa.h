// Which kernels run on this processor? Asked once, at the first call.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

#include "kernels.h"

namespace mllmkd {

enum class Isa : int { generic, avx2, avx512, amx };

// The best the processor has, or what MLLMKD_CPU_ISA=default|avx2|avx512|amx asks for.
// Throws a ValueError for another word, and for an instruction set the processor lacks.
Isa isa();

template <class T>
const Kernels<T>& kernels();

// The product for a head: bf16 where both tensors are bf16 and the processor multiplies bf16, else
// T.
template <class T>
const Product<T>& product_for(const at::Tensor& hidden, const at::Tensor& weight);

struct CpuFeatures {
  bool avx2, avx512f, avx512_bf16, amx_bf16;
  std::string kernels, gemm_fp32, gemm_bf16;
};
CpuFeatures cpu_features();

}  // namespace mllmkd
