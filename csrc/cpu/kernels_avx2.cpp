// Kernels for AVX2 processors. Called only after isa.cpp has asked the processor.
#include "product_impl.h"
#include "rows_impl.h"

namespace mllmkd {

const Kernels<float>& kernels_avx2_f32() {
  using namespace CPU_CAPABILITY;
  static const Kernels<float> kernels{
      "avx2",
      2 * Vec<float>::size(),
      make_product<float, 6>("float"),
      stats_panel<float>,
      loss_panel<float>,
      agree_panel<float>};
  return kernels;
}

}  // namespace mllmkd
