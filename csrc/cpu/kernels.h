// The CPU kernels as the registration sees them: plain structs of pointers, no PyTorch.
//
// The files of kernels, which CMakeLists.txt names, are compiled once for each capability, with its instruction
// set, in a namespace of its own; dispatch.cpp picks one when the library is first used.
#pragma once

#include <cstdint>

namespace rds_fast::cpu {

enum class Dtype { float64, float32, bfloat16, float16 };

// N rows of C values: unit column stride, any row stride.
struct Rows {
  const void* data;
  int64_t stride;
};

// One value a row, any stride. accumulated: of the accumulation dtype, else of the rows' dtype.
struct Values {
  const void* data;
  int64_t stride;
  bool accumulated;
};

// A fresh, contiguous result of one value a row.
struct Results {
  void* data;
  bool accumulated;
};

struct Shape {
  Dtype dtype;  // of the rows
  int64_t rows;
  int64_t columns;
};

// Class indices, or probabilities of the logits' dtype or the accumulation dtype.
struct Target {
  const int64_t* indices;  // null for probabilities
  int64_t index_stride;
  Rows probabilities;
  bool accumulated;
  double label_smoothing;
  int64_t ignore_index;
};

// Where a state is saved for the backwards in the accumulation dtype; data may be null.
struct Saved {
  void* data;
};

// The smooth activations, by the names that ops/activation.py gives them.
#define RDS_FAST_ACTIVATIONS(X) \
  X(gelu) X(gelu_tanh) X(silu) X(mish) X(softplus) X(hardswish) X(elu) X(selu) X(sigmoid) X(tanh)

enum class ActivationKind {
#define RDS_FAST_ENUMERATOR(kind) kind,
  RDS_FAST_ACTIVATIONS(RDS_FAST_ENUMERATOR)
#undef RDS_FAST_ENUMERATOR
};

struct Activation {
  ActivationKind kind;
  double a;
  double b;
};

// count values in one order in memory, whatever it is: element-wise kernels do not look at shapes.
struct Elements {
  Dtype dtype;
  int64_t count;
};

// A contiguous (samples, channels, spatial) tensor whose rows are the channels of a group in one sample.
struct GroupShape {
  Dtype dtype;
  int64_t samples;
  int64_t channels;
  int64_t spatial;
  int64_t groups;
};

// Weight and bias of each channel, or what belongs to them, in the accumulation dtype; either may be null.
struct ChannelPair {
  void* weight;
  void* bias;
};

// Mean and reciprocal standard deviation of each row, in the accumulation dtype.
struct RowMoments {
  void* mean;
  void* rstd;
};

// A dense tensor, [samples][channels][positions]. Channels-last has samples · positions samples of one position.
struct ChannelShape {
  Dtype dtype;
  int64_t samples;
  int64_t channels;
  int64_t positions;
};

// (C,) in the accumulation dtype. No weight (null) is 1, no bias is 0.
struct BatchNorm {
  const void* weight;
  const void* bias;
  const void* mean;
  const void* var;
  double eps;
  bool training;
  bool relu;
};

// (C,) in the accumulation dtype, updated in place; either may be null.
struct RunningStatistics {
  void* mean;
  void* var;
  double momentum;
};

// Of gx, gweight, gbias and gresidual; null is zero.
struct BatchNormCotangents {
  const void* x;
  const void* weight;
  const void* bias;
  const void* residual;
};

// Every capability has these functions. Rows results (gx, dx, …) are contiguous and of the rows' dtype.
#define RDS_FAST_ROW_KERNELS(X)                                                                                   \
  X(logsumexp, (Shape shape, Rows x, Results result, Saved saved))                                                \
  X(logsumexp_backward, (Shape shape, Values g, Rows x, const void* lse, void* gx))                               \
  X(logsumexp_double_backward, (Shape shape, Rows v, Values g, Rows x, const void* lse, Results dg, void* dx))    \
  X(cross_entropy, (Shape shape, Rows logits, Target target, Results ce, Results lse, Saved saved))               \
  X(cross_entropy_backward,                                                                                       \
    (Shape shape, Values g_ce, Values g_lse, Rows logits, Target target, const void* lse, void* gx))              \
  X(cross_entropy_double_backward, (Shape shape, Rows v, Values g_ce, Values g_lse, Rows logits, Target target,   \
                                    const void* lse, Results dg_ce, Results dg_lse, void* dx))                    \
  X(gradient_norm, (Shape shape, Rows x, double p, double power, Results result, Saved saved))                    \
  X(gradient_norm_backward, (Shape shape, Values g, Rows x, const void* saved, double p, double power, void* gx)) \
  X(gradient_norm_double_backward,                                                                                \
    (Shape shape, Rows v, Values g, Rows x, const void* saved, double p, double power, Results dg, void* dx))     \
  X(activation_backward, (Elements elements, const void* g, const void* x, const void* x_cotangent, /* or null */ \
                          Activation activation, void* gx))                                                       \
  X(activation_double_backward,                                                                                   \
    (Elements elements, const void* v, const void* g, const void* x, Activation activation, void* dg, void* dx))

// Results are contiguous. A null v is zero; null gradients of weight and bias, or a null dweight, are not wanted.
#define RDS_FAST_GROUP_NORM_KERNELS(X)                                                                            \
  X(group_norm, (GroupShape shape, const void* x, ChannelPair affine, double eps, void* y, RowMoments moments))   \
  X(group_norm_backward, (GroupShape shape, const void* u, const void* x, const void* weight, RowMoments moments, \
                          const void* x_cotangent, void* gx, ChannelPair gradient))                               \
  X(group_norm_double_backward,                                                                                   \
    (GroupShape shape, const void* v, ChannelPair cotangents, const void* u, const void* x, const void* weight,   \
     RowMoments moments, void* du, void* dx, void* dweight))

// Tensors and results of the shape lie alike in memory. Null: no residual, other_u, y, x_cotangent; gresidual, dx, the
// double backward's gx not wanted. sums are (2, C): Σ u' and Σ u' x̂.
#define RDS_FAST_BATCH_NORM_KERNELS(X)                                                                               \
  X(batch_norm, (ChannelShape shape, const void* x, BatchNorm norm, const void* residual, RunningStatistics running, \
                 void* y, void* mean, void* var))                                                                    \
  X(batch_norm_inference, (ChannelShape shape, const void* x, BatchNorm norm, const void* residual, void* y))        \
  X(batch_norm_backward, (ChannelShape shape, const void* u, const void* other_u, const void* x, const void* y,      \
                          BatchNorm norm, const void* x_cotangent, void* gx, void* gresidual, void* sums))           \
  X(batch_norm_input_gradient,                                                                                       \
    (ChannelShape shape, const void* u, const void* x, BatchNorm norm, const void* sums, void* gx))                  \
  X(batch_norm_double_backward, (ChannelShape shape, BatchNormCotangents v, const void* u, const void* x,            \
                                 const void* y, BatchNorm norm, void* du, void* dx, void* dweight, void* gx))

#define RDS_FAST_CPU_KERNELS(X)  \
  RDS_FAST_ROW_KERNELS(X)        \
  RDS_FAST_GROUP_NORM_KERNELS(X) \
  RDS_FAST_BATCH_NORM_KERNELS(X)

struct Kernels {
  const char* capability;
#define RDS_FAST_MEMBER(name, arguments) void(*name) arguments;
  RDS_FAST_CPU_KERNELS(RDS_FAST_MEMBER)
#undef RDS_FAST_MEMBER
};

// The kernels of the best capability that this CPU has, or of the lower one named by RDS_FAST_CPU_CAPABILITY.
const Kernels& kernels();

// PyTorch's thread pool: body(begin, end, context) on disjoint ranges that cover [0, count), at least grain long.
void parallel_for(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context);
int64_t thread_count();

}  // namespace rds_fast::cpu
