// The operations rds_fast_native::*: their schemas, and their CPU implementations. The CUDA library implements the same
// schemas. Arguments are checked in Python, by the public operations; nothing here has a derivative.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>
#include <tuple>

#include "cpu/kernels.h"
#include "numerics.h"
#include "tensors.h"

namespace rds_fast::cpu {

void parallel_for(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count, grain, body, context));
}

int64_t thread_count() { return torch::stable::get_num_threads(); }

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Shape shape_of(const Tensor& x) { return {dtype_of(x), x.size(0), x.size(1)}; }

Rows rows(const Tensor& x) { return {x.data_ptr(), x.stride(0)}; }

bool is_accumulated(const Tensor& values, const Tensor& x) { return values.scalar_type() != x.scalar_type(); }

Values values(const Tensor& g, const Tensor& x) { return {g.data_ptr(), g.stride(0), is_accumulated(g, x)}; }

Results results(const Tensor& fresh, const Tensor& x) { return {fresh.data_ptr(), is_accumulated(fresh, x)}; }

Tensor empty_rows(const Tensor& x) {
  Tensor fresh = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  advise_huge_pages(fresh);
  return fresh;
}

Tensor empty_values(const Tensor& x, ScalarType type) { return torch::stable::new_empty(x, {x.size(0)}, type); }

// What the backwards need in the accumulation dtype: nothing where the result is of that dtype already.
Tensor empty_saved(const Tensor& x, const Tensor& result) {
  const ScalarType type = accumulation_type(x.scalar_type());
  return torch::stable::new_empty(x, {x.size(0), result.scalar_type() == type ? 0 : 1}, type);
}

Saved saved_in(const Tensor& saved) { return {saved.size(1) == 0 ? nullptr : saved.data_ptr()}; }

ScalarType result_type(const Tensor& x, bool full_precision) {
  return full_precision ? accumulation_type(x.scalar_type()) : x.scalar_type();
}

Target target_of(const Tensor& target, const Tensor& logits, double label_smoothing, int64_t ignore_index) {
  if (target.scalar_type() == ScalarType::Long) {
    const auto* const indices = static_cast<const int64_t*>(target.data_ptr());
    return {indices, target.stride(0), {}, false, label_smoothing, ignore_index};
  }
  return {nullptr, 0, rows(target), is_accumulated(target, logits), label_smoothing, ignore_index};
}

std::tuple<Tensor, Tensor> logsumexp(const Tensor& x, bool full_precision) {
  Tensor result = empty_values(x, result_type(x, full_precision));
  Tensor saved = empty_saved(x, result);
  kernels().logsumexp(shape_of(x), rows(x), results(result, x), saved_in(saved));
  return {result, saved};
}

Tensor logsumexp_backward(const Tensor& g, const Tensor& x, const Tensor& lse) {
  Tensor gx = empty_rows(x);
  kernels().logsumexp_backward(shape_of(x), values(g, x), rows(x), lse.data_ptr(), gx.data_ptr());
  return gx;
}

std::tuple<Tensor, Tensor> logsumexp_double_backward(const Tensor& v, const Tensor& g, const Tensor& x,
                                                     const Tensor& lse) {
  Tensor dg = empty_values(x, g.scalar_type());
  Tensor dx = empty_rows(x);
  kernels().logsumexp_double_backward(shape_of(x), rows(v), values(g, x), rows(x), lse.data_ptr(), results(dg, x),
                                      dx.data_ptr());
  return {dg, dx};
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy(const Tensor& logits, const Tensor& target, double label_smoothing,
                                                 int64_t ignore_index, bool full_precision) {
  Tensor ce = empty_values(logits, result_type(logits, full_precision));
  Tensor lse = empty_values(logits, result_type(logits, full_precision));
  Tensor saved = empty_saved(logits, lse);
  kernels().cross_entropy(shape_of(logits), rows(logits), target_of(target, logits, label_smoothing, ignore_index),
                          results(ce, logits), results(lse, logits), saved_in(saved));
  return {ce, lse, saved};
}

Tensor cross_entropy_backward(const Tensor& g_ce, const Tensor& g_lse, const Tensor& logits, const Tensor& target,
                              const Tensor& lse, double label_smoothing, int64_t ignore_index) {
  Tensor gx = empty_rows(logits);
  kernels().cross_entropy_backward(shape_of(logits), values(g_ce, logits), values(g_lse, logits), rows(logits),
                                   target_of(target, logits, label_smoothing, ignore_index), lse.data_ptr(),
                                   gx.data_ptr());
  return gx;
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy_double_backward(const Tensor& v, const Tensor& g_ce,
                                                                 const Tensor& g_lse, const Tensor& logits,
                                                                 const Tensor& target, const Tensor& lse,
                                                                 double label_smoothing, int64_t ignore_index) {
  Tensor dg_ce = empty_values(logits, g_ce.scalar_type());
  Tensor dg_lse = empty_values(logits, g_lse.scalar_type());
  Tensor dx = empty_rows(logits);
  kernels().cross_entropy_double_backward(shape_of(logits), rows(v), values(g_ce, logits), values(g_lse, logits),
                                          rows(logits), target_of(target, logits, label_smoothing, ignore_index),
                                          lse.data_ptr(), results(dg_ce, logits), results(dg_lse, logits),
                                          dx.data_ptr());
  return {dg_ce, dg_lse, dx};
}

std::tuple<Tensor, Tensor> gradient_norm(const Tensor& x, double p, double power, bool full_precision) {
  Tensor result = empty_values(x, result_type(x, full_precision));
  const ScalarType type = accumulation_type(x.scalar_type());
  const int64_t kept = saved_of_norm(p, power, result.scalar_type() == type);
  Tensor saved = torch::stable::new_empty(x, {x.size(0), kept}, type);
  kernels().gradient_norm(shape_of(x), rows(x), p, power, results(result, x), saved_in(saved));
  return {result, saved};
}

Tensor gradient_norm_backward(const Tensor& g, const Tensor& x, const Tensor& saved, double p, double power) {
  Tensor gx = empty_rows(x);
  kernels().gradient_norm_backward(shape_of(x), values(g, x), rows(x), saved.data_ptr(), p, power, gx.data_ptr());
  return gx;
}

std::tuple<Tensor, Tensor> gradient_norm_double_backward(const Tensor& v, const Tensor& g, const Tensor& x,
                                                         const Tensor& saved, double p, double power) {
  Tensor dg = empty_values(x, g.scalar_type());
  Tensor dx = empty_rows(x);
  kernels().gradient_norm_double_backward(shape_of(x), rows(v), values(g, x), rows(x), saved.data_ptr(), p, power,
                                          results(dg, x), dx.data_ptr());
  return {dg, dx};
}

Activation activation_of(const std::string& kind, double a, double b) {
#define RDS_FAST_NAMED(name) \
  if (kind == #name) return {ActivationKind::name, a, b};
  RDS_FAST_ACTIVATIONS(RDS_FAST_NAMED)
#undef RDS_FAST_NAMED
  STD_TORCH_CHECK(false, "rds_fast_native: no activation of this name: ", kind);
}

Tensor activation_backward(const Tensor& g, const Tensor& x, const MaybeTensor& x_cotangent, const std::string& kind,
                           double a, double b) {
  Tensor gx = empty_as(x);
  kernels().activation_backward({dtype_of(x), x.numel()}, g.data_ptr(), x.data_ptr(), data_of(x_cotangent),
                                activation_of(kind, a, b), gx.data_ptr());
  return gx;
}

std::tuple<Tensor, Tensor> activation_double_backward(const Tensor& v, const Tensor& g, const Tensor& x,
                                                      const std::string& kind, double a, double b) {
  Tensor dg = empty_as(x);
  Tensor dx = empty_as(x);
  kernels().activation_double_backward({dtype_of(x), x.numel()}, v.data_ptr(), g.data_ptr(), x.data_ptr(),
                                       activation_of(kind, a, b), dg.data_ptr(), dx.data_ptr());
  return {dg, dx};
}

std::string cpu_capability() { return kernels().capability; }

}  // namespace
}  // namespace rds_fast::cpu

// The accumulation dtype is float64 for float64 and float32 else; the order and strides of each argument stand beside
// the public operations in rds_fast/ops.
STABLE_TORCH_LIBRARY(rds_fast_native, m) {
  m.def("logsumexp(Tensor x, bool full_precision) -> (Tensor, Tensor)");
  m.def("logsumexp_backward(Tensor g, Tensor x, Tensor lse) -> Tensor");
  m.def("logsumexp_double_backward(Tensor v, Tensor g, Tensor x, Tensor lse) -> (Tensor, Tensor)");
  m.def(
      "cross_entropy(Tensor logits, Tensor target, float label_smoothing, int ignore_index, bool full_precision) -> "
      "(Tensor, Tensor, Tensor)");
  m.def(
      "cross_entropy_backward(Tensor g_ce, Tensor g_lse, Tensor logits, Tensor target, Tensor lse, "
      "float label_smoothing, int ignore_index) -> Tensor");
  m.def(
      "cross_entropy_double_backward(Tensor v, Tensor g_ce, Tensor g_lse, Tensor logits, Tensor target, Tensor lse, "
      "float label_smoothing, int ignore_index) -> (Tensor, Tensor, Tensor)");
  m.def("gradient_norm(Tensor x, float p, float power, bool full_precision) -> (Tensor, Tensor)");
  m.def("gradient_norm_backward(Tensor g, Tensor x, Tensor saved, float p, float power) -> Tensor");
  m.def(
      "gradient_norm_double_backward(Tensor v, Tensor g, Tensor x, Tensor saved, float p, float power) -> "
      "(Tensor, Tensor)");
  m.def("activation_backward(Tensor g, Tensor x, Tensor? x_cotangent, str kind, float a, float b) -> Tensor");
  m.def("activation_double_backward(Tensor v, Tensor g, Tensor x, str kind, float a, float b) -> (Tensor, Tensor)");
  m.def("cpu_capability() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(rds_fast_native, CPU, m) {
#define RDS_FAST_REGISTER(name, arguments) m.impl(#name, TORCH_BOX(&rds_fast::cpu::name));
  RDS_FAST_ROW_KERNELS(RDS_FAST_REGISTER)
#undef RDS_FAST_REGISTER
}

STABLE_TORCH_LIBRARY_IMPL(rds_fast_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&rds_fast::cpu::cpu_capability));
}
