// Memory for one call, and tiles dealt out to threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <atomic>

namespace mllmkd {

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Asks for 2 MiB pages where memory is large and fresh: 4 KiB at a time, a workspace of hundreds of
// MiB is a hundred thousand page faults per call, a tenth of the time of a bf16 step.
void prefer_huge_pages(const at::Tensor& x);

// Frees what `Buffer::kept` and `kept_tensor` keep between calls.
void release_workspace();

// An uninitialised tensor whose memory, once its last owner lets it go, waits for the next call: a
// gradient that is saved for backward is as large as the head, and dies with every step.
at::Tensor kept_tensor(at::IntArrayRef sizes, at::ScalarType dtype);

// Uninitialised memory from torch's allocator (so that torch's memory tools see it), in equal
// parts: by thread, by panel, by tile.
class Buffer {
 public:
  Buffer() = default;
  Buffer(int64_t parts, int64_t bytes) : Buffer(parts, bytes, false) {}
  // All of `data`, another's memory.
  Buffer(const at::Tensor& data, int64_t parts);
  // The same, but kept for the next call when this one ends, up to 768 MiB in all: a step of
  // training asks for the same workspace every time, and the kernel would clear its pages anew.
  static Buffer kept(int64_t parts, int64_t bytes) { return Buffer(parts, bytes, true); }
  Buffer(Buffer&& other) noexcept;
  Buffer& operator=(Buffer&& other) noexcept;
  ~Buffer();

  template <class T = char>
  T* part(int64_t i) const {
    return reinterpret_cast<T*>(static_cast<char*>(data_.mutable_data_ptr()) + i * bytes_);
  }

 private:
  Buffer(int64_t parts, int64_t bytes, bool keep);
  int64_t bytes_ = 0;
  bool keep_ = false;
  at::Tensor data_;
};

// f(i, thread) for every i of [0, n). In `any_order` a thread takes the next i when it is free, so
// that one delayed by other programs does not delay all; else each has a fixed range, for sums that
// must come out the same on every run.
template <class F>
void deal(int64_t n, bool any_order, const F& f) {
  const int64_t threads = at::get_num_threads(), share = (n + threads - 1) / threads;
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    const int thread = at::get_thread_num();
    if (any_order) {
      for (int64_t i = next++; i < n; i = next++) f(i, thread);
    } else {
      for (int64_t i = begin * share; i < std::min(n, end * share); ++i) f(i, thread);
    }
  });
}

}  // namespace mllmkd
