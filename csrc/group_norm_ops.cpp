// The operations rds_fast_native::group_norm*: their schemas, and their CPU implementations. See ops.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "cpu/kernels.h"
#include "tensors.h"

namespace rds_fast::cpu {
namespace {

using torch::stable::Tensor;

GroupShape shape_of(const Tensor& x, int64_t groups) { return {dtype_of(x), x.size(0), x.size(1), x.size(2), groups}; }

// (C,) in the accumulation dtype if wanted, else (0,), with null for its data.
Tensor empty_channels(const Tensor& x, bool wanted) {
  return torch::stable::new_empty(x, {wanted ? x.size(1) : 0}, accumulation_type(x.scalar_type()));
}

std::tuple<Tensor, Tensor, Tensor> group_norm(const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias,
                                              int64_t groups, double eps) {
  Tensor y = empty_as(x);
  Tensor mean = torch::stable::new_empty(x, {x.size(0) * groups}, accumulation_type(x.scalar_type()));
  Tensor rstd = torch::stable::new_empty(x, {x.size(0) * groups}, accumulation_type(x.scalar_type()));
  kernels().group_norm(shape_of(x, groups), x.data_ptr(), {data_of(weight), data_of(bias)}, eps, y.data_ptr(),
                       {mean.data_ptr(), rstd.data_ptr()});
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> group_norm_backward(const Tensor& u, const Tensor& x, const MaybeTensor& weight,
                                                       const Tensor& mean, const Tensor& rstd,
                                                       const MaybeTensor& x_cotangent, int64_t groups,
                                                       bool affine_gradient) {
  Tensor gx = empty_as(x);
  Tensor gweight = empty_channels(x, affine_gradient), gbias = empty_channels(x, affine_gradient);
  kernels().group_norm_backward(shape_of(x, groups), u.data_ptr(), x.data_ptr(), data_of(weight),
                                {mean.data_ptr(), rstd.data_ptr()}, data_of(x_cotangent), gx.data_ptr(),
                                {data_if(affine_gradient, gweight), data_if(affine_gradient, gbias)});
  return {gx, gweight, gbias};
}

std::tuple<Tensor, Tensor, Tensor> group_norm_double_backward(const MaybeTensor& v, const MaybeTensor& vweight,
                                                              const MaybeTensor& vbias, const Tensor& u,
                                                              const Tensor& x, const MaybeTensor& weight,
                                                              const Tensor& mean, const Tensor& rstd, int64_t groups,
                                                              bool weight_gradient) {
  Tensor du = empty_as(x), dx = empty_as(x), dweight = empty_channels(x, weight_gradient);
  kernels().group_norm_double_backward(shape_of(x, groups), data_of(v), {data_of(vweight), data_of(vbias)},
                                       u.data_ptr(), x.data_ptr(), data_of(weight), {mean.data_ptr(), rstd.data_ptr()},
                                       du.data_ptr(), dx.data_ptr(), data_if(weight_gradient, dweight));
  return {du, dx, dweight};
}

}  // namespace
}  // namespace rds_fast::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(rds_fast_native, m) {
  m.def("group_norm(Tensor x, Tensor? weight, Tensor? bias, int groups, float eps) -> (Tensor, Tensor, Tensor)");
  m.def(
      "group_norm_backward(Tensor u, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, Tensor? x_cotangent, "
      "int groups, bool affine_gradient) -> (Tensor, Tensor, Tensor)");
  m.def(
      "group_norm_double_backward(Tensor? v, Tensor? vweight, Tensor? vbias, Tensor u, Tensor x, Tensor? weight, "
      "Tensor mean, Tensor rstd, int groups, bool weight_gradient) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(rds_fast_native, CPU, m) {
#define RDS_FAST_REGISTER(name, arguments) m.impl(#name, TORCH_BOX(&rds_fast::cpu::name));
  RDS_FAST_GROUP_NORM_KERNELS(RDS_FAST_REGISTER)
#undef RDS_FAST_REGISTER
}
