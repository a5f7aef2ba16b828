// The choice of kernels, and the bf16 product of AMX machines.
#include "isa.h"

#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <cstdlib>

namespace mllmkd {
namespace {

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
bool has_amx() {
  // GCC 12 knows the name only as an instruction set, so the bit is read: leaf 7, EDX 22
  // (AMX-BF16), 24 (AMX-TILE)
  unsigned a = 7, b = 0, c = 0, d = 0;
  __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  return has_avx512_bf16() && (d >> 22 & 1) && (d >> 24 & 1);
}
#else
bool has_avx2() { return false; }
bool has_avx512() { return false; }
bool has_avx512_bf16() { return false; }
bool has_amx() { return false; }
#endif

Isa best() {
  if (has_amx()) return Isa::amx;
  if (has_avx512()) return Isa::avx512;
  return has_avx2() ? Isa::avx2 : Isa::generic;
}

Isa choose() {
  const char* word = std::getenv("MLLMKD_CPU_ISA");
  if (!word || !*word) return best();
  const std::string name(word);
  static const char* names[] = {"default", "avx2", "avx512", "amx"};
  for (int i = 0; i < 4; ++i) {
    if (name != names[i]) continue;
    // "amx" means ATen's brgemm, which also runs on AVX-512 processors that multiply bf16: that is
    // how it is tested
    const bool there = i == 0 || (i == 1 && has_avx2()) || (i == 2 && has_avx512()) ||
                       (i == 3 && has_avx512_bf16());
    TORCH_CHECK_VALUE(there, "MLLMKD_CPU_ISA: got ", name, ", which this processor does not have");
    return static_cast<Isa>(i);
  }
  TORCH_CHECK_VALUE(false, "MLLMKD_CPU_ISA: got ", name, ", expected default, avx2, avx512 or amx");
}

#if defined(__x86_64__)
// ATen's brgemm reads the same left operands and the same interleaved panels.
void multiply_brgemm(int m, int k, const void* a, const void* b, float* c, int64_t ldc, bool add) {
  const Product<float>& packed = product_avx512_bf16();
  const int panel = kernels_avx512_f32().panel;
  at::native::cpublas::brgemm(
      m, panel, k + k % 2, packed.stride, panel, ldc, add, static_cast<const at::BFloat16*>(a),
      static_cast<const at::BFloat16*>(b), c, /*is_vnni=*/true);
}
#endif

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

#if defined(__x86_64__)
const Product<float>& product_amx_bf16() {
  static const Product<float> product = [] {
    Product<float> p = product_avx512_bf16();
    p.name = "brgemm_bf16";
    p.multiply = multiply_brgemm;
    p.release = [] { at::native::cpublas::brgemm_release(true); };
    return p;
  }();
  return product;
}

template <>
const Kernels<float>& kernels<float>() {
  if (isa() == Isa::generic) return kernels_default_f32();
  return isa() == Isa::avx2 ? kernels_avx2_f32() : kernels_avx512_f32();
}
#else
template <>
const Kernels<float>& kernels<float>() {
  return kernels_default_f32();
}
#endif

template <>
const Kernels<double>& kernels<double>() {
  return kernels_default_f64();
}

template <>
const Product<float>& product_for<float>(const at::Tensor& hidden, const at::Tensor& weight) {
#if defined(__x86_64__)
  if (hidden.scalar_type() == at::kBFloat16 && weight.scalar_type() == at::kBFloat16) {
    if (isa() == Isa::amx) return product_amx_bf16();
    if (isa() == Isa::avx512 && has_avx512_bf16()) return product_avx512_bf16();
  }
#endif
  return kernels<float>().product;
}

template <>
const Product<double>& product_for<double>(const at::Tensor&, const at::Tensor&) {
  return kernels<double>().product;
}

CpuFeatures cpu_features() {
  const at::Tensor bf16 = at::empty({0}, at::kBFloat16);
  const Kernels<float>& table = kernels<float>();
  return {
      has_avx2(),
      has_avx512(),
      has_avx512_bf16(),
      has_amx(),
      table.name,
      std::string(table.name) + "_" + table.product.name,
      product_for<float>(bf16, bf16).name};
}

}  // namespace mllmkd
