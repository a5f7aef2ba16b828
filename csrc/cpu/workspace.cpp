#include "workspace.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/util/accumulate.h>

#include <mutex>
#include <utility>
#include <vector>

#if defined(__linux__)
#  include <sys/mman.h>
#endif

namespace mllmkd {
namespace {

constexpr int64_t kKeepAtLeast = int64_t{4} << 20, kKeepInAll = int64_t{768} << 20;

// Blocks between two calls; calls of several threads at once each take their own.
struct Kept {
  std::mutex mutex;
  std::vector<at::Tensor> blocks;  // oldest first
};

Kept& kept_blocks() {
  // never destroyed: torch may be gone before static objects of this library are
  static Kept* kept = new Kept;
  return *kept;
}

// The smallest kept block that holds `bytes` and is not twice as large; an undefined tensor if
// none.
at::Tensor take(int64_t bytes) {
  Kept& kept = kept_blocks();
  const std::lock_guard<std::mutex> lock(kept.mutex);
  auto best = kept.blocks.end();
  for (auto it = kept.blocks.begin(); it != kept.blocks.end(); ++it) {
    const int64_t size = it->numel();
    if (size < bytes || size > 2 * bytes) continue;
    if (best == kept.blocks.end() || size < best->numel()) best = it;
  }
  if (best == kept.blocks.end()) return {};
  at::Tensor block = std::move(*best);
  kept.blocks.erase(best);
  return block;
}

void give_back(at::Tensor block) {
  if (block.numel() < kKeepAtLeast || block.numel() > kKeepInAll) return;
  Kept& kept = kept_blocks();
  const std::lock_guard<std::mutex> lock(kept.mutex);
  kept.blocks.push_back(std::move(block));
  int64_t total = 0;
  for (const at::Tensor& b : kept.blocks) total += b.numel();
  while (total > kKeepInAll) {
    total -= kept.blocks.front().numel();
    kept.blocks.erase(kept.blocks.begin());
  }
}

at::Tensor fresh(int64_t bytes) {
  at::Tensor block = at::empty({bytes}, at::kByte);
  prefer_huge_pages(block);
  return block;
}

// Kept memory if there is some that fits, else fresh.
at::Tensor take_or_allocate(int64_t bytes) {
  at::Tensor block = take(bytes);
  return block.defined() ? block : fresh(bytes);
}

}  // namespace

void release_workspace() {
  Kept& kept = kept_blocks();
  const std::lock_guard<std::mutex> lock(kept.mutex);
  kept.blocks.clear();
}

void prefer_huge_pages(const at::Tensor& x) {
#if defined(__linux__)
  constexpr size_t huge = size_t{1} << 21;
  const size_t begin = reinterpret_cast<size_t>(x.mutable_data_ptr()), end = begin + x.nbytes();
  const size_t first = (begin + huge - 1) / huge * huge, last = end / huge * huge;
  // only advice: where the kernel declines, nothing changes
  if (last > first) (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

at::Tensor kept_tensor(at::IntArrayRef sizes, at::ScalarType dtype) {
  const int64_t bytes =
      c10::multiply_integers(sizes) * static_cast<int64_t>(c10::elementSize(dtype));
  if (bytes < kKeepAtLeast || bytes > kKeepInAll) {
    at::Tensor unkept = at::empty(sizes, dtype);
    prefer_huge_pages(unkept);
    return unkept;
  }
  at::Tensor block = take_or_allocate(bytes);
  void* data = block.mutable_data_ptr();
  const auto done = [block](void*) mutable { give_back(std::move(block)); };
  return at::from_blob(data, sizes, done, at::TensorOptions(dtype));
}

Buffer::Buffer(int64_t parts, int64_t bytes, bool keep) : bytes_(round_up(bytes, 64)), keep_(keep) {
  data_ = keep ? take_or_allocate(parts * bytes_) : fresh(parts * bytes_);
}

Buffer::Buffer(const at::Tensor& data, int64_t parts)
    : bytes_(static_cast<int64_t>(data.nbytes()) / std::max<int64_t>(parts, 1)), data_(data) {}

Buffer::Buffer(Buffer&& other) noexcept
    : bytes_(other.bytes_), keep_(other.keep_), data_(std::move(other.data_)) {}

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  std::swap(bytes_, other.bytes_);
  std::swap(keep_, other.keep_);
  std::swap(data_, other.data_);
  return *this;
}

Buffer::~Buffer() {
  if (keep_ && data_.defined()) give_back(std::move(data_));
}

}  // namespace mllmkd
