// The row kernel's own source (csrc/cuda/rows_cluster.cuh) on the CPU, cluster after cluster, for
// tests on a machine without a GPU. Slow, and about logic only: nothing here says how fast it is.
#include "fibers.h"

#include "../../csrc/cuda/rows_cluster.cuh"

namespace emulation {

using namespace mllmkd::cuda;
using mllmkd::Divergence;

struct Cta {
  std::vector<float> shared;
  Barrier barrier;
  std::vector<Barrier> warps;
  std::vector<float> lanes;  // two generations of one number per thread
};

struct Machine {
  Fibers& fibers;
  std::vector<Cta> ctas;
  Barrier barrier;
};

// What DeviceBlock is on a GPU.
struct Block {
  int thread, threads, rank, size;
  int64_t cluster;
  float* shared;
  Machine& machine;
  mutable int64_t phase = 0;
  mutable int generation = 0;

  Cta& cta() const { return machine.ctas[rank]; }

  void sync() const {
    Barrier& barrier = cta().barrier;
    machine.fibers.wait(barrier, machine.fibers.arrive(barrier));
  }

  void cluster_arrive(bool) const { phase = machine.fibers.arrive(machine.barrier); }
  void cluster_wait() const { machine.fibers.wait(machine.barrier, phase); }

  float* remote(float* p, int of) const {
    // memory of a CTA that has not started cannot be written
    if (machine.barrier.phase == 0) throw std::runtime_error("remote access before all started");
    return machine.ctas[of].shared.data() + (p - shared);
  }

  // Two generations: a lane may be one shuffle ahead of those that have not read the last one.
  float shuffle_xor(float x, int lanes) const {
    generation ^= 1;
    float* all = cta().lanes.data() + generation * threads;
    all[thread] = x;
    Barrier& warp = cta().warps[thread / kWarp];
    machine.fibers.wait(warp, machine.fibers.arrive(warp));
    return all[thread ^ lanes];
  }
};

// body(block) for every thread of one cluster, on shared memory of NaN.
void run_threads(
    int size, int threads, int64_t cluster, int64_t floats, unsigned seed,
    const std::function<void(const Block&)>& body) {
  constexpr float guard = 12345.0f;
  Fibers fibers(size * threads, seed);
  Machine machine{fibers, std::vector<Cta>(size), Barrier{size * threads}};
  for (Cta& cta : machine.ctas) {
    cta.shared.assign(floats, NAN);
    cta.shared.resize(floats + 8, guard);
    cta.barrier.expected = threads;
    cta.warps.assign(threads / kWarp, Barrier{kWarp});
    cta.lanes.assign(2 * threads, NAN);
  }
  fibers.run([&](int fiber) {
    const int rank = fiber / threads;
    body(
        {fiber % threads, threads, rank, size, cluster, machine.ctas[rank].shared.data(), machine});
  });
  for (const Cta& cta : machine.ctas) {
    if (std::any_of(cta.shared.end() - 8, cta.shared.end(), [](float x) { return x != guard; })) {
      throw std::runtime_error("write past the end of shared memory");
    }
  }
}

template <Divergence D, bool Scored, int W>
void run_cluster(const RowsJob& job, int64_t row, int size, int threads, unsigned seed) {
  const auto floats = shared_bytes(job.slice, job.z_t != nullptr) / sizeof(float);
  run_threads(size, threads, row, floats, seed, [&](const Block& block) {
    Row<D, Scored, W, Block>(block, job).run();
  });
}

template <bool Scored, int W>
auto runner(Divergence divergence) {
  switch (divergence) {
    case Divergence::forward_kl: return run_cluster<Divergence::forward_kl, Scored, W>;
    case Divergence::reverse_kl: return run_cluster<Divergence::reverse_kl, Scored, W>;
    case Divergence::jsd: return run_cluster<Divergence::jsd, Scored, W>;
    case Divergence::skew_forward_kl: return run_cluster<Divergence::skew_forward_kl, Scored, W>;
    case Divergence::skew_reverse_kl: return run_cluster<Divergence::skew_reverse_kl, Scored, W>;
    case Divergence::total_variation: return run_cluster<Divergence::total_variation, Scored, W>;
    case Divergence::soft_cross_entropy:
      return run_cluster<Divergence::soft_cross_entropy, Scored, W>;
    default: return run_cluster<Divergence::none, false, W>;
  }
}

template <int W>
auto runner(Divergence divergence, bool scored) {
  return scored ? runner<true, W>(divergence) : runner<false, W>(divergence);
}

}  // namespace emulation

extern "C" {

// How a row is dealt: CTAs, columns of each, shared memory of each.
void geometry(int64_t vocab, bool teacher, int64_t out[3]) {
  using namespace mllmkd::cuda;
  out[0] = cluster_of(vocab, teacher);
  out[1] = out[0] ? slice_of(vocab, static_cast<int>(out[0])) : 0;
  out[2] = shared_bytes(out[1], teacher);
}

// Does the emulation see what it is there to see? A ring in which every thread reads what its
// neighbour wrote: the reads that found nothing, −1 for a deadlock. `barrier`: 0 none, 1 all
// threads, 2 all but one.
int ring(int barrier) {
  int nothing = 0;
  try {
    emulation::run_threads(1, 64, 0, 64, 5, [&](const emulation::Block& block) {
      block.shared[block.thread] = 1.0f;
      if (barrier == 1 || (barrier == 2 && block.thread != 7)) block.sync();
      nothing += std::isnan(block.shared[(block.thread + 1) % 64]);
    });
  } catch (const std::exception&) {
    return -1;
  }
  return nothing;
}

// Null, or what went wrong. The arguments are RowsJob's fields, in its order.
const char* emulate_rows(
    const float* z_s, const float* z_t, void* dz, int64_t stride, int64_t dz_stride,
    const void* b_s, const void* b_t, int b_s_type, int b_t_type, const int64_t* labels,
    const float* ce_weight, const float* kd_weight, const bool* broken_s, const bool* broken_t,
    float* ce, float* kd, int64_t rows, int64_t ignore_index, int vocab, float param, float scale,
    float cap_s, float cap_t, bool dz_bf16, bool scored, int divergence, int size, int threads,
    unsigned seed) {
  using namespace mllmkd::cuda;
  const int slice = slice_of(vocab, size);
  const RowsJob job{
      z_s,
      z_t,
      dz,
      stride,
      dz_stride,
      b_s,
      b_t,
      static_cast<BiasType>(b_s_type),
      static_cast<BiasType>(b_t_type),
      labels,
      ce_weight,
      kd_weight,
      broken_s,
      broken_t,
      ce,
      kd,
      rows,
      ignore_index,
      vocab,
      slice,
      param,
      scale,
      cap_s,
      cap_t,
      dz_bf16,
      scored,
      middle_series(1.0f - param)};
  static thread_local std::string message;
  try {
    const auto which = static_cast<mllmkd::Divergence>(divergence);
    const bool wide = stride % 4 == 0 && dz_stride % 4 == 0;
    const auto run =
        wide ? emulation::runner<4>(which, scored) : emulation::runner<1>(which, scored);
    for (int64_t row = 0; row < rows; ++row) run(job, row, size, threads, seed + row);
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
  return nullptr;
}
}
