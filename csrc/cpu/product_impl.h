// Packing and the register-blocked product, for one element type E summed in T.
//
// A micro-tile is MR rows × one panel (two vectors): 2·MR accumulators, and per depth two loads of
// the right operand and MR broadcasts of the left one, so both FMA ports stay busy from registers.
// MR = 14 fills the 32 registers of AVX-512 (28 sums, 2 loads, 1 broadcast), MR = 6 the 16 of AVX2.
// Depths come in steps: one element for float and double, a pair for bf16, which is what
// `Micro<E>::step` multiplies.
#pragma once

#include <cstring>
#include <utility>

#include "kernels.h"
#include "vecmath.h"

namespace mllmkd::CPU_CAPABILITY {
namespace {

struct bf16_t {
  uint16_t bits;
};
struct f16_t {
  uint16_t bits;
};

inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline void convert(float x, float& y) { y = x; }
inline void convert(float x, double& y) { y = x; }
inline void convert(double x, double& y) { y = x; }
inline void convert(bf16_t x, bf16_t& y) { y = x; }
template <class E>
inline void convert(bf16_t x, E& y) {
  y = from_bits(static_cast<uint32_t>(x.bits) << 16);
}
// Exponent moved by a multiplication, so that subnormals come out right; infinity and NaN keep
// theirs.
template <class E>
inline void convert(f16_t x, E& y) {
  const uint32_t magnitude = x.bits & 0x7fffu, sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const float value = from_bits(magnitude << 13) * from_bits(0x77800000u);
  const float special = from_bits(0x7f800000u | (magnitude << 13));
  const float y_abs = magnitude >= 0x7c00u ? special : value;
  y = sign ? -y_abs : y_abs;
}

// Does this product accept source type S? Nothing is narrowed on the way in.
template <class S, class E>
inline constexpr bool accepts =
    std::is_same_v<E, double> || (std::is_same_v<E, float> && !std::is_same_v<S, double>) ||
    std::is_same_v<S, E>;

// a slab of right panels and one of left rows share the L2 cache with a block of logits
template <class E>
inline constexpr int depth = sizeof(E) == 2 ? 512 : 256;
template <class E>
inline constexpr int stride = depth<E> + 64 / static_cast<int>(sizeof(E));
// consecutive depths multiplied by one instruction
template <class E>
inline constexpr int pair = sizeof(E) == 2 ? 2 : 1;
// Depths summed in one chain: the rounding of a sum of n terms grows like n. Over 256 of them the
// gradient near convergence had 2.4 times the error of MKL's products, over 128 it has less; 64
// halve that, and take 3% more time.
template <class E>
inline constexpr int chain = 128;

template <class S, class E>
void pack_left_from(const S* src, int64_t ld, int m, int k, E* dst) {
  for (int i = 0; i < m; ++i, src += ld, dst += stride<E>) {
    for (int j = 0; j < k; ++j) convert(src[j], dst[j]);
    if (k % pair<E>) dst[k] = E{};
  }
}

// Element (k, n) of a right panel.
template <class E>
inline int right_index(int k, int n, int panel) {
  return (k / pair<E>)*panel * pair<E> + n * pair<E> + k % pair<E>;
}

// Whole panels of bf16 pairs: two rows become one row of 32-bit words, which compilers vectorise.
template <int Panel, class E>
void interleave_rows(const E* src, int64_t ld, int k, E* dst) {
  const E zeros[Panel] = {};
  for (int j = 0; j < k; j += 2, src += 2 * ld, dst += 2 * Panel) {
    const E* odd = j + 1 < k ? src + ld : zeros;
    uint32_t words[Panel];
    for (int i = 0; i < Panel; ++i)
      words[i] = src[i].bits | static_cast<uint32_t>(odd[i].bits) << 16;
    std::memcpy(static_cast<void*>(dst), words, sizeof(words));
  }
}

template <class S, class E>
void pack_right_from(const S* src, int64_t ld_k, int64_t ld_n, int k, int n, int panel, E* dst) {
  const int padded = (k + pair<E> - 1) / pair<E> * pair<E>;
  if (n < panel || padded > k) std::memset(static_cast<void*>(dst), 0, sizeof(E) * padded * panel);
  for (int j = 0; j < k; ++j) {
    for (int i = 0; i < n; ++i) convert(src[j * ld_k + i * ld_n], dst[right_index<E>(j, i, panel)]);
  }
}

// Calls f with a typed null pointer of the source's element type.
template <class E, class F>
void with_source(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::f32:
      if constexpr (accepts<float, E>) f(static_cast<const float*>(nullptr));
      return;
    case Dtype::f64:
      if constexpr (accepts<double, E>) f(static_cast<const double*>(nullptr));
      return;
    case Dtype::bf16:
      if constexpr (accepts<bf16_t, E>) f(static_cast<const bf16_t*>(nullptr));
      return;
    case Dtype::f16:
      if constexpr (accepts<f16_t, E>) f(static_cast<const f16_t*>(nullptr));
      return;
  }
}

template <class E>
void pack_left(Dtype dtype, const void* src, int64_t ld, int m, int k, void* dst) {
  with_source<E>(dtype, [&](auto* type) {
    pack_left_from(static_cast<decltype(type)>(src), ld, m, k, static_cast<E*>(dst));
  });
}

template <class E, int Panel>
void pack_right(Dtype dtype, const void* src, int64_t ld, int k, int n, void* dst) {
  with_source<E>(dtype, [&](auto* type) {
    auto* from = static_cast<decltype(type)>(src);
    // the compiler vectorises the loop over n where n and its stride are constants
    if constexpr (pair<E> == 2) {
      if (n == Panel) return interleave_rows<Panel>(from, ld, k, static_cast<E*>(dst));
    }
    if (n == Panel) {
      pack_right_from(from, ld, 1, k, Panel, Panel, static_cast<E*>(dst));
    } else {
      pack_right_from(from, ld, 1, k, n, Panel, static_cast<E*>(dst));
    }
  });
}

template <class E, int Panel>
void pack_right_t(Dtype dtype, const void* src, int64_t ld, int k, int n, void* dst) {
  with_source<E>(dtype, [&](auto* type) {
    pack_right_from(static_cast<decltype(type)>(src), 1, ld, k, n, Panel, static_cast<E*>(dst));
  });
}

// float and double: one depth a step.
template <class E>
struct Micro {
  using T = E;
  using V = Vec<T>;
  static V broadcast(const E* a) { return V(*a); }
  static V load(const E* b) { return V::loadu(b); }
  static V step(const V& a, const V& b, const V& sum) { return at::vec::fmadd(a, b, sum); }
  static void round(const T* g, E* dst) { V::loadu(g).store(dst); }
};

template <class E, int M>
void micro_tile(
    int k, const void* a_, const void* b_, typename Micro<E>::T* c, int64_t ldc, bool add) {
  using T = typename Micro<E>::T;
  using V = Vec<T>;
  constexpr int W = V::size(), P = pair<E>;
  const E* a = static_cast<const E*>(a_);
  const E* b = static_cast<const E*>(b_);
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    // the next micro-tile's sums: rows far apart, which no hardware prefetcher sees coming
    __builtin_prefetch(c + (M + m) * ldc, 1);
    __builtin_prefetch(c + (M + m) * ldc + W, 1);
  }
  for (int begin = 0; begin < k; begin += chain<E>, add = true) {
    V sum[M][2];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) sum[m][0] = sum[m][1] = V(T(0));
    const int end = k - begin < chain<E> ? k : begin + chain<E>;
    for (int j = begin; j < end; j += P, a += P, b += 2 * W * P) {
      const auto b0 = Micro<E>::load(b), b1 = Micro<E>::load(b + W * P);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const auto x = Micro<E>::broadcast(a + m * stride<E>);
        sum[m][0] = Micro<E>::step(x, b0, sum[m][0]);
        sum[m][1] = Micro<E>::step(x, b1, sum[m][1]);
      }
    }
    // what is there is added at the end of a chain, not at its beginning
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      T* row = c + m * ldc;
      (add ? sum[m][0] + V::loadu(row) : sum[m][0]).store(row);
      (add ? sum[m][1] + V::loadu(row + W) : sum[m][1]).store(row + W);
    }
  }
}

template <class E, int MR, int... M>
void multiply_rows(
    std::integer_sequence<int, M...>, int m, int k, const void* a, const void* b,
    typename Micro<E>::T* c, int64_t ldc, bool add) {
  using F = void (*)(int, const void*, const void*, typename Micro<E>::T*, int64_t, bool);
  static constexpr F tiles[] = {micro_tile<E, M + 1>...};
  const E* left = static_cast<const E*>(a);
  for (; m > 0; m -= MR, left += MR * stride<E>, c += MR * ldc)
    tiles[(m < MR ? m : MR) - 1](k, left, b, c, ldc, add);
}

template <class E, int MR>
void multiply(
    int m, int k, const void* a, const void* b, typename Micro<E>::T* c, int64_t ldc, bool add) {
  multiply_rows<E, MR>(std::make_integer_sequence<int, MR>{}, m, k, a, b, c, ldc, add);
}

template <class E>
void store_left(const typename Micro<E>::T* g, int m, void* dst_) {
  constexpr int W = Vec<typename Micro<E>::T>::size();
  E* dst = static_cast<E*>(dst_);
  for (int i = 0; i < m; ++i, g += 2 * W, dst += stride<E>) {
    Micro<E>::round(g, dst);
    Micro<E>::round(g + W, dst + W);
  }
}

// W × W blocks through a small buffer. The last block may run past m into rows that hold nothing of
// interest: the source and a left operand's row both have room for whole blocks, and a product
// reads m depths only.
template <class E>
void store_left_t(const typename Micro<E>::T* g, int m, void* dst_) {
  using T = typename Micro<E>::T;
  constexpr int W = Vec<T>::size(), panel = 2 * W;
  E* dst = static_cast<E*>(dst_);
  T block[W * W];
  for (int i = 0; i < m; i += W) {
    for (int half = 0; half < panel; half += W) {
      at::vec::transpose_mxn<T, W, W>(g + i * panel + half, panel, block, W);
      for (int lane = 0; lane < W; ++lane)
        Micro<E>::round(block + lane * W, dst + (half + lane) * stride<E> + i);
    }
  }
  if (m % pair<E>) {
    for (int lane = 0; lane < panel; ++lane) dst[lane * stride<E> + m] = E{};
  }
}

template <class E, int MR>
Product<typename Micro<E>::T> make_product(const char* name) {
  constexpr int panel = 2 * Vec<typename Micro<E>::T>::size();
  return {
      name,
      sizeof(E),
      depth<E>,
      stride<E>,
      pack_left<E>,
      pack_right<E, panel>,
      pack_right_t<E, panel>,
      store_left<E>,
      store_left_t<E>,
      multiply<E, MR>};
}

}  // namespace
}  // namespace mllmkd::CPU_CAPABILITY
