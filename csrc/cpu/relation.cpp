// The relation loss of logits, R = K Hᵀ per image (K = H G, G = WᵀW, so R = Y Yᵀ): three sums, or
// the product that its gradient needs. R is made tile by tile and never held; a head's "vocabulary"
// here is the image's own rows.
#include <ATen/Parallel.h>

#include "../ops.h"
#include "head_gradient.h"

namespace mllmkd {
namespace {

constexpr int kRows = 56;  // rows of a tile: an image of 200 rows still occupies several threads

std::vector<int64_t> image_ends(const at::Tensor& cu_seqlens, int64_t rows) {
  TORCH_CHECK_TYPE(
      cu_seqlens.scalar_type() == at::kInt && cu_seqlens.dim() == 1 && cu_seqlens.numel() > 0,
      "cu_seqlens: got ", cu_seqlens.scalar_type(), " of shape ", cu_seqlens.sizes(),
      ", expected int32 of shape (images + 1,)");
  const at::Tensor contiguous = cu_seqlens.contiguous();
  const int32_t* ends = contiguous.const_data_ptr<int32_t>();
  std::vector<int64_t> result(ends, ends + cu_seqlens.numel());
  bool ordered = result.front() == 0 && result.back() == rows;
  for (size_t i = 1; i < result.size(); ++i) ordered = ordered && result[i - 1] <= result[i];
  TORCH_CHECK_VALUE(
      ordered, "cu_seqlens: got ", cu_seqlens, ", expected to rise from 0 to the number of rows, ",
      rows);
  return result;
}

// Both models' R of one image at a time.
template <class T>
class Relation {
 public:
  Relation(
      const at::Tensor& hs, const at::Tensor& ks, const at::Tensor& ht, const at::Tensor& kt,
      const at::Tensor& cu_seqlens)
      : kernels_(kernels<T>()), rows_(hs.size(0)), ends_(image_ends(cu_seqlens, rows_)) {
    const auto real = c10::CppTypeToScalarType<T>::value;
    for (const at::Tensor* x : {&hs, &ks, &ht, &kt}) {
      TORCH_CHECK_TYPE(
          x->scalar_type() == real, "relation: got dtype ", x->scalar_type(), ", expected ", real);
      TORCH_CHECK_VALUE(
          x->size(0) == rows_, "relation: got ", x->size(0), " rows, the student has ", rows_);
    }
    for (int64_t i = 0; i < images(); ++i) longest_ = std::max(longest_, ends_[i + 1] - ends_[i]);
    longest_ = round_up(std::max<int64_t>(longest_, 1), kernels_.panel);
    student_.emplace(hs, ks, std::nullopt, 0.0, rows_, longest_, "student");
    teacher_.emplace(ht, kt, std::nullopt, 0.0, rows_, longest_, "teacher");
    tiles_ = Buffer(2 * at::get_num_threads(), block() * kTile * kernels_.panel * sizeof(T));
  }

  int64_t images() const { return static_cast<int64_t>(ends_.size()) - 1; }
  int64_t start(int64_t image) const { return ends_[image]; }
  int64_t size(int64_t image) const { return ends_[image + 1] - ends_[image]; }
  int64_t longest() const { return longest_; }
  int64_t block() const { return kernels_.product.depth / kernels_.panel; }

  void load(int64_t image) {
    student_->load(start(image), size(image));
    teacher_->load(start(image), size(image));
  }

  // f(tile, m, panel, r_s, r_t, thread): rows [tile·kRows, + m) of the image times every panel of
  // its rows, block by block; `done(tile, m, panel, panels, thread)` after each block.
  template <class F, class G>
  void for_tiles(int64_t image, const F& f, const G& done) {
    const int64_t n = size(image), panels = (n + kernels_.panel - 1) / kernels_.panel;
    deal((n + kRows - 1) / kRows, true, [&](int64_t i, int thread) {
      T* r_s = tiles_.part<T>(2 * thread);
      T* r_t = tiles_.part<T>(2 * thread + 1);
      const int m = static_cast<int>(std::min<int64_t>(kRows, n - i * kRows));
      for (int64_t p = 0; p < panels; p += block()) {
        const int64_t count = std::min(block(), panels - p);
        student_->products(start(image) + i * kRows, m, p, count, thread, r_s);
        teacher_->products(start(image) + i * kRows, m, p, count, thread, r_t);
        for (int64_t j = 0; j < count; ++j) {
          f(i, m, p + j, r_s + j * kTile * kernels_.panel, r_t + j * kTile * kernels_.panel,
            thread);
        }
        done(i, m, p, count, thread);
      }
    });
  }

 private:
  const Kernels<T>& kernels_;
  const int64_t rows_;
  const std::vector<int64_t> ends_;
  int64_t longest_ = 0;
  std::optional<Head<T>> student_, teacher_;
  Buffer tiles_;  // (threads, 2) a block of R_s and of R_t
};

template <class T>
at::Tensor stats(
    const at::Tensor& hs, const at::Tensor& ks, const at::Tensor& ht, const at::Tensor& kt,
    const at::Tensor& cu_seqlens) {
  Relation<T> relation(hs, ks, ht, kt, cu_seqlens);
  const int panel = kernels<T>().panel;
  at::Tensor result = at::zeros({relation.images(), 3}, at::kDouble);
  for (int64_t image = 0; image < relation.images(); ++image) {
    relation.load(image);
    std::vector<std::array<double, 3>> sums(relation.size(image) / kRows + 1, {0, 0, 0});
    relation.for_tiles(
        image,
        [&](int64_t i, int m, int64_t, const T* r_s, const T* r_t, int) {
          double ss = 0, tt = 0, st = 0;
          for (int j = 0; j < m * panel; ++j) {
            const double s = r_s[j], t = r_t[j];
            ss += s * s, tt += t * t, st += s * t;
          }
          sums[i][0] += ss, sums[i][1] += tt, sums[i][2] += st;
        },
        [](int64_t, int, int64_t, int64_t, int) {});
    double* out = result.mutable_data_ptr<double>() + 3 * image;
    for (const auto& tile : sums) out[0] += tile[0], out[1] += tile[1], out[2] += tile[2];
  }
  return result;
}

template <class T>
at::Tensor gradient(
    const at::Tensor& hs, const at::Tensor& ks, const at::Tensor& ht, const at::Tensor& kt,
    const at::Tensor& cu_seqlens, const at::Tensor& coef) {
  Relation<T> relation(hs, ks, ht, kt, cu_seqlens);
  const int panel = kernels<T>().panel;
  TORCH_CHECK_VALUE(
      coef.scalar_type() == at::kDouble && coef.is_contiguous() && coef.dim() == 2 &&
          coef.size(0) == relation.images() && coef.size(1) == 2,
      "coef: got shape ", coef.sizes(), " of ", coef.scalar_type(), ", expected contiguous (",
      relation.images(), ", 2) of float64");
  // dR H has the shape of dW = Gᵀ H, with the image's rows for a vocabulary
  HeadGradient<T> product(
      hs, product_for<T>(hs, ks), hs.size(0), hs.size(0), relation.longest(), false,
      hs.scalar_type());
  const Buffer panels(at::get_num_threads(), kTile * panel * sizeof(T));
  for (int64_t image = 0; image < relation.images(); ++image) {
    if (!relation.size(image)) continue;
    relation.load(image);
    product.load(relation.start(image), relation.size(image), nullptr, true);
    const double* c = coef.const_data_ptr<double>() + 2 * image;
    const T c_t = static_cast<T>(c[0]), c_s = static_cast<T>(c[1]);
    const int64_t start = relation.start(image), block = relation.block();
    relation.for_tiles(
        image,
        [&](int64_t i, int m, int64_t p, const T* r_s, const T* r_t, int thread) {
          T* g = panels.part<T>(thread);
          for (int j = 0; j < m * panel; ++j) g[j] = c_t * r_t[j] + c_s * r_s[j];
          product.add_panel(g, m, p % block, thread);
        },
        [&](int64_t i, int m, int64_t p, int64_t count, int thread) {
          product.multiply(start + i * kRows, m, p, count, thread);
        });
  }
  return product.dw;
}

}  // namespace

at::Tensor relation_stats(
    const at::Tensor& hs, const at::Tensor& ks, const at::Tensor& ht, const at::Tensor& kt,
    const at::Tensor& cu_seqlens) {
  const auto run = hs.scalar_type() == at::kDouble ? stats<double> : stats<float>;
  return run(hs, ks, ht, kt, cu_seqlens);
}

at::Tensor relation_grad(
    const at::Tensor& hs, const at::Tensor& ks, const at::Tensor& ht, const at::Tensor& kt,
    const at::Tensor& cu_seqlens, const at::Tensor& coef) {
  const auto run = hs.scalar_type() == at::kDouble ? gradient<double> : gradient<float>;
  return run(hs, ks, ht, kt, cu_seqlens, coef);
}

}  // namespace mllmkd
