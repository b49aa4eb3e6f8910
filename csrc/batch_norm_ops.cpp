// The operations rds_fast_native::batch_norm*: their schemas, and their CPU implementations. See ops.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "cpu/kernels.h"
#include "tensors.h"

namespace rds_fast::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

ChannelShape shape_of(const Tensor& x) {
  const int64_t samples = x.size(0), channels = x.size(1);
  const int64_t positions = channels == 0 || samples == 0 ? 0 : x.numel() / (samples * channels);
  const bool channels_last = x.stride(1) == 1 && positions > 1;
  // One channel lies in one piece, whatever its strides say.
  if (channels == 1) return {dtype_of(x), 1, 1, samples * positions};
  return {dtype_of(x), channels_last ? samples * positions : samples, channels, channels_last ? 1 : positions};
}

// Like x if wanted, else (0,), whose data is null to a kernel.
Tensor empty_if(bool wanted, const Tensor& x) { return wanted ? empty_as(x) : torch::stable::new_empty(x, {0}); }

Tensor empty_channels(const Tensor& x) {
  return torch::stable::new_empty(x, {x.size(1)}, accumulation_type(x.scalar_type()));
}

// A (C,) tensor in the accumulation dtype, copied if it is of another: parameters of a 16-bit model.
Tensor accumulated(const Tensor& values, const Tensor& x) {
  const ScalarType type = accumulation_type(x.scalar_type());
  return values.scalar_type() == type ? values : torch::stable::to(values, type);
}
MaybeTensor accumulated(const MaybeTensor& values, const Tensor& x) {
  return values.has_value() ? MaybeTensor(accumulated(*values, x)) : values;
}

// A (C,) result in the dtype of the parameter that it belongs to, if there is one.
Tensor in_dtype_of(const MaybeTensor& parameter, const Tensor& result) {
  if (!parameter.has_value() || parameter->scalar_type() == result.scalar_type()) return result;
  return torch::stable::to(result, parameter->scalar_type());
}

// The (C,) arguments of a kernel in the accumulation dtype, for as long as it runs.
struct Parameters {
  MaybeTensor weight, bias;
  Tensor mean, var;
  Parameters(const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias, const Tensor& mean, const Tensor& var)
      : weight(accumulated(weight, x)),
        bias(accumulated(bias, x)),
        mean(accumulated(mean, x)),
        var(accumulated(var, x)) {}
  BatchNorm norm(bool training, double eps, bool relu) const {
    return {data_of(weight), data_of(bias), mean.data_ptr(), var.data_ptr(), eps, training, relu};
  }
};

void write_back(const MaybeTensor& values, const MaybeTensor& updated) {
  if (!values.has_value() || values->data_ptr() == updated->data_ptr()) return;
  Tensor target = *values;
  torch::stable::copy_(target, *updated);
}

std::tuple<Tensor, Tensor, Tensor> batch_norm(const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias,
                                              const MaybeTensor& residual, const MaybeTensor& running_mean,
                                              const MaybeTensor& running_var, double momentum, double eps, bool relu) {
  Tensor y = empty_as(x), mean = empty_channels(x), var = empty_channels(x);
  const Parameters parameters(x, weight, bias, mean, var);
  const MaybeTensor average = accumulated(running_mean, x), spread = accumulated(running_var, x);
  kernels().batch_norm(shape_of(x), x.data_ptr(), parameters.norm(true, eps, relu), data_of(residual),
                       {data_of(average), data_of(spread), momentum}, y.data_ptr(), mean.data_ptr(), var.data_ptr());
  write_back(running_mean, average);
  write_back(running_var, spread);
  return {y, mean, var};
}

Tensor batch_norm_inference(const Tensor& x, const Tensor& mean, const Tensor& var, const MaybeTensor& weight,
                            const MaybeTensor& bias, const MaybeTensor& residual, double eps, bool relu) {
  Tensor y = empty_as(x);
  const Parameters parameters(x, weight, bias, mean, var);
  kernels().batch_norm_inference(shape_of(x), x.data_ptr(), parameters.norm(false, eps, relu), data_of(residual),
                                 y.data_ptr());
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> batch_norm_backward(
    const Tensor& u, const MaybeTensor& other_u, const Tensor& x, const MaybeTensor& y, const MaybeTensor& weight,
    const MaybeTensor& bias, const Tensor& mean, const Tensor& var, const MaybeTensor& x_cotangent, bool training,
    double eps, bool relu) {
  Tensor gx = empty_as(x), gresidual = empty_if(y.has_value(), x);
  Tensor sums = torch::stable::new_empty(x, {2, x.size(1)}, accumulation_type(x.scalar_type()));
  const Parameters parameters(x, weight, bias, mean, var);
  kernels().batch_norm_backward(shape_of(x), u.data_ptr(), data_of(other_u), x.data_ptr(), data_of(y),
                                parameters.norm(training, eps, relu), data_of(x_cotangent), gx.data_ptr(),
                                data_if(y.has_value(), gresidual), sums.data_ptr());
  // Copies: an operation's results share no memory.
  Tensor gbias = empty_channels(x), gweight = empty_channels(x);
  torch::stable::copy_(gbias, torch::stable::select(sums, 0, 0));
  torch::stable::copy_(gweight, torch::stable::select(sums, 0, 1));
  return {gx, in_dtype_of(weight, gweight), in_dtype_of(bias, gbias), gresidual, sums};
}

Tensor batch_norm_input_gradient(const Tensor& u, const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias,
                                 const Tensor& mean, const Tensor& var, const Tensor& sums, bool training, double eps,
                                 bool relu) {
  Tensor gx = empty_as(x);
  const Parameters parameters(x, weight, bias, mean, var);
  kernels().batch_norm_input_gradient(shape_of(x), u.data_ptr(), x.data_ptr(), parameters.norm(training, eps, relu),
                                      sums.data_ptr(), gx.data_ptr());
  return gx;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_double_backward(
    const MaybeTensor& v, const MaybeTensor& vweight, const MaybeTensor& vbias, const MaybeTensor& vresidual,
    const Tensor& u, const Tensor& x, const MaybeTensor& y, const MaybeTensor& weight, const MaybeTensor& bias,
    const Tensor& mean, const Tensor& var, bool training, double eps, bool relu, bool input_gradient) {
  const bool has_dx = training || vweight.has_value();
  Tensor du = empty_as(x), dx = empty_if(has_dx, x), gx = empty_if(input_gradient, x), dweight = empty_channels(x);
  const Parameters parameters(x, weight, bias, mean, var);
  const MaybeTensor of_weight = accumulated(vweight, x), of_bias = accumulated(vbias, x);
  kernels().batch_norm_double_backward(
      shape_of(x), {data_of(v), data_of(of_weight), data_of(of_bias), data_of(vresidual)}, u.data_ptr(), x.data_ptr(),
      data_of(y), parameters.norm(training, eps, relu), du.data_ptr(), data_if(has_dx, dx), dweight.data_ptr(),
      data_if(input_gradient, gx));
  return {du, dx, in_dtype_of(weight, dweight), gx};
}

}  // namespace
}  // namespace rds_fast::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(rds_fast_native, m) {
  m.def(
      "batch_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, float momentum, float eps, bool relu) -> (Tensor, Tensor, Tensor)");
  m.def(
      "batch_norm_inference(Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, Tensor? residual, "
      "float eps, bool relu) -> Tensor");
  m.def(
      "batch_norm_backward(Tensor u, Tensor? other_u, Tensor x, Tensor? y, Tensor? weight, Tensor? bias, Tensor mean, "
      "Tensor var, Tensor? x_cotangent, bool training, float eps, bool relu) -> (Tensor, Tensor, Tensor, Tensor, "
      "Tensor)");
  m.def(
      "batch_norm_input_gradient(Tensor u, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, "
      "Tensor sums, bool training, float eps, bool relu) -> Tensor");
  m.def(
      "batch_norm_double_backward(Tensor? v, Tensor? vweight, Tensor? vbias, Tensor? vresidual, Tensor u, Tensor x, "
      "Tensor? y, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, bool training, float eps, bool relu, "
      "bool input_gradient) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(rds_fast_native, CPU, m) {
#define RDS_FAST_REGISTER(name, arguments) m.impl(#name, TORCH_BOX(&rds_fast::cpu::name));
  RDS_FAST_BATCH_NORM_KERNELS(RDS_FAST_REGISTER)
#undef RDS_FAST_REGISTER
}
