// A thread-block cluster on one thread of the CPU: a fiber for every CUDA thread, which runs until
// it has to wait at a barrier. Fibers take turns in a random order that the seed fixes, so a
// barrier that is missing shows: somebody reads what has not been written, and shared memory starts
// as NaN.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace emulation {

struct Barrier {
  int expected = 0, arrived = 0;
  int64_t phase = 0;
};

class Fibers {
 public:
  using Body = std::function<void(int fiber)>;

  Fibers(int count, unsigned seed) : order_(count), contexts_(count), done_(count), stacks_(count) {
    for (int i = 0; i < count; ++i) order_[i] = i;
    std::shuffle(order_.begin(), order_.end(), std::mt19937(seed));
    for (auto& stack : stacks_) stack = std::make_unique<char[]>(kStack);
  }

  // Runs every fiber to its end; throws where all that are left wait for ever.
  void run(const Body& body) {
    body_ = &body;
    for (size_t i = 0; i < contexts_.size(); ++i) start(static_cast<int>(i));
    for (size_t left = contexts_.size(); left > 0;) {
      progress_ = false;
      for (const int i : order_) {
        if (done_[i]) continue;
        current_ = i;
        swapcontext(&main_, &contexts_[i]);
        if (error_) std::rethrow_exception(error_);
        if (done_[i]) --left, progress_ = true;
      }
      if (left > 0 && !progress_) throw std::runtime_error("deadlock at a barrier");
    }
  }

  int64_t arrive(Barrier& barrier) {
    const int64_t phase = barrier.phase;
    if (++barrier.arrived == barrier.expected) {
      barrier.arrived = 0;
      ++barrier.phase;
      progress_ = true;
    }
    return phase;
  }

  void wait(const Barrier& barrier, int64_t phase) {
    while (barrier.phase == phase) swapcontext(&contexts_[current_], &main_);
  }

 private:
  static constexpr size_t kStack = 64 * 1024;

  void start(int i) {
    done_[i] = false;
    getcontext(&contexts_[i]);
    contexts_[i].uc_stack.ss_sp = stacks_[i].get();
    contexts_[i].uc_stack.ss_size = kStack;
    contexts_[i].uc_link = &main_;
    const auto self = reinterpret_cast<uintptr_t>(this);
    makecontext(
        &contexts_[i], reinterpret_cast<void (*)()>(&Fibers::enter), 2,
        static_cast<unsigned>(self >> 32), static_cast<unsigned>(self));
  }

  static void enter(unsigned high, unsigned low) {
    const uintptr_t address = static_cast<uintptr_t>(high) << 32 | low;
    auto* fibers = reinterpret_cast<Fibers*>(address);
    const int fiber = fibers->current_;
    try {
      (*fibers->body_)(fiber);
    } catch (...) {  // an exception cannot leave its fiber
      fibers->error_ = std::current_exception();
    }
    fibers->done_[fiber] = true;
  }

  std::vector<int> order_;
  std::vector<ucontext_t> contexts_;
  std::vector<char> done_;
  std::vector<std::unique_ptr<char[]>> stacks_;
  ucontext_t main_;
  const Body* body_ = nullptr;
  int current_ = 0;
  bool progress_ = false;
  std::exception_ptr error_;
};

}  // namespace emulation
