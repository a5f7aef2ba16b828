// bf16 operands, fp32 sums, by AVX-512's pairwise dot product. Products of two bf16 are exact in
// fp32.
#include <immintrin.h>

#include "product_impl.h"

namespace mllmkd {
namespace CPU_CAPABILITY {
namespace {

template <>
struct Micro<bf16_t> {
  using T = float;
  using V = Vec<float>;
  // one 32-bit broadcast carries the pair
  static __m512bh broadcast(const bf16_t* a) {
    int both;
    std::memcpy(&both, a, 4);
    return reinterpret_cast<__m512bh>(_mm512_set1_epi32(both));
  }
  static __m512bh load(const bf16_t* b) {
    return reinterpret_cast<__m512bh>(_mm512_loadu_si512(b));
  }
  static V step(__m512bh a, __m512bh b, const V& sum) { return _mm512_dpbf16_ps(sum, a, b); }
  static void round(const float* g, bf16_t* dst) {
    _mm256_storeu_si256(
        reinterpret_cast<__m256i*>(dst),
        reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_loadu_ps(g))));
  }
};

}  // namespace
}  // namespace CPU_CAPABILITY

const Product<float>& product_avx512_bf16() {
  using namespace CPU_CAPABILITY;
  static const Product<float> product = make_product<bf16_t, 14>("avx512_bf16");
  return product;
}

}  // namespace mllmkd
