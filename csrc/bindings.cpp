// Schemas and registration of every operator: the only TORCH_LIBRARY block. Also the Python module
// `_C`, which can say how it was built and what it found in the processor.
#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>
#include <torch/version.h>

#include "cpu/head.h"
#include "cpu/isa.h"
#include "cpu/workspace.h"
#include "ops.h"

#ifndef MLLMKD_CXX_FLAGS
#  define MLLMKD_CXX_FLAGS ""
#endif

TORCH_LIBRARY(mllmkd_cpu, m) {
  m.def(
      "distill_rows(Tensor hs, Tensor ws, Tensor? bs, Tensor? ht, Tensor? wt, Tensor? bt, Tensor? "
      "labels, "
      "Tensor? ce_weight, Tensor? kd_weight, str divergence, float param, float temperature, float "
      "cap_s, "
      "float cap_t, int vocab, int ignore_index, bool want_dh, bool want_dw, bool want_db, int "
      "chunk_rows, Tensor(a!)? diagnostics=None, bool standardize=False, bool factored=False, "
      "Tensor(b!)? main_grad=None, float factor=1.0) "
      "-> (Tensor loss, Tensor ce, Tensor kd, Tensor dh, Tensor dw, Tensor db)");
  m.def(
      "logprob_rows(Tensor h, Tensor w, Tensor? b, Tensor labels, float temperature, float cap, "
      "int vocab, "
      "int ignore_index, int chunk_rows) -> (Tensor logp, Tensor lse)");
  m.def(
      "logprob_grad(Tensor grad, Tensor h, Tensor w, Tensor? b, Tensor labels, Tensor lse, float "
      "temperature, "
      "float cap, int vocab, int ignore_index, bool want_dh, bool want_dw, bool want_db, int "
      "chunk_rows) "
      "-> (Tensor dh, Tensor dw, Tensor db)");
  m.def(
      "head_gradient(Tensor dz, Tensor h, Tensor factor, int rows, int vocab, ScalarType dtype) -> "
      "Tensor");
  m.def("scaled(Tensor x, Tensor factor, ScalarType dtype) -> Tensor");
  m.def("relation_stats(Tensor hs, Tensor ks, Tensor ht, Tensor kt, Tensor cu_seqlens) -> Tensor");
  m.def(
      "relation_grad(Tensor hs, Tensor ks, Tensor ht, Tensor kt, Tensor cu_seqlens, Tensor coef) "
      "-> Tensor");
}

TORCH_LIBRARY_IMPL(mllmkd_cpu, CPU, m) {
  m.impl("distill_rows", TORCH_FN(mllmkd::distill_rows));
  m.impl("logprob_rows", TORCH_FN(mllmkd::logprob_rows));
  m.impl("logprob_grad", TORCH_FN(mllmkd::logprob_grad));
  m.impl("head_gradient", TORCH_FN(mllmkd::head_gradient));
  m.impl("scaled", TORCH_FN(mllmkd::scaled));
  m.impl("relation_stats", TORCH_FN(mllmkd::relation_stats));
  m.impl("relation_grad", TORCH_FN(mllmkd::relation_grad));
}

#ifdef MLLMKD_CUDA
TORCH_LIBRARY(mllmkd_cuda, m) {
  m.def(
      "rows_(Tensor zs, Tensor? zt, Tensor? bs, Tensor? bt, Tensor? labels, Tensor? ce_weight, "
      "Tensor? kd_weight, Tensor? broken_s, Tensor? broken_t, str divergence, float param, float "
      "temperature, float cap_s, float cap_t, int ignore_index, Tensor(a!)? dz, int cluster=0, "
      "bool standardize=False) -> (Tensor ce, Tensor kd)");
}

TORCH_LIBRARY_IMPL(mllmkd_cuda, CUDA, m) { m.impl("rows_", TORCH_FN(mllmkd::cuda_rows_)); }
#endif

namespace {

pybind11::dict build_info() {
  pybind11::dict info;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["flags"] = MLLMKD_CXX_FLAGS;
  info["torch"] = TORCH_VERSION;
  return info;
}

pybind11::dict cpu_features() {
  const mllmkd::CpuFeatures found = mllmkd::cpu_features();
  pybind11::dict features;
  features["avx2"] = found.avx2;
  features["avx512f"] = found.avx512f;
  features["avx512_bf16"] = found.avx512_bf16;
  features["amx_bf16"] = found.amx_bf16;
  features["kernels"] = found.kernels;
  features["gemm_fp32"] = found.gemm_fp32;
  features["gemm_bf16"] = found.gemm_bf16;
  features["threads"] = at::get_num_threads();
  return features;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "C++ CPU kernels of mllmkd_kernels; importing it registers torch.ops.mllmkd_cpu.";
  m.def("build_info", &build_info, "Compiler, flags and torch version of this build.");
  m.def("cpu_features", &cpu_features, "What the processor offers and which kernels run on it.");
  m.def("tile", &mllmkd::tile, "Vocabulary rows and tokens of a tile, of fp64 or not.");
  m.def("release_workspace", &mllmkd::release_workspace, "Free the workspace kept between calls.");
}
