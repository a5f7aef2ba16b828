// Kernels for any processor, in plain C++ behind at::vec; also the double-precision ones, which
// check gradients.
#include "product_impl.h"
#include "rows_impl.h"

namespace mllmkd {

const Kernels<float>& kernels_default_f32() {
  using namespace CPU_CAPABILITY;
  static const Kernels<float> kernels{
      "default",          2 * Vec<float>::size(), make_product<float, 3>("float"),
      stats_panel<float>, loss_panel<float>,      agree_panel<float>};
  return kernels;
}

const Kernels<double>& kernels_default_f64() {
  using namespace CPU_CAPABILITY;
  static const Kernels<double> kernels{
      "default",           2 * Vec<double>::size(), make_product<double, 3>("double"),
      stats_panel<double>, loss_panel<double>,      agree_panel<double>};
  return kernels;
}

}  // namespace mllmkd
