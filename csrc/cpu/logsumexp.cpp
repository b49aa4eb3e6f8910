// Log-sum-exp of rows, its backward and its double backward: softmax.h, or short_rows.h, without a target.
#include "short_rows.h"

namespace rds_fast::cpu::RDS_FAST_CAPABILITY {

void logsumexp(Shape shape, Rows x, Results result, Saved saved) {
  with_dtype(shape.dtype, [&](auto example) {
    using T = decltype(example);
    if (shape.columns <= kShort) return short_forward<T>(shape, x, NoTarget<T>{}, Results{}, result, saved);
    softmax_forward<T>(shape, x, NoTarget<T>{}, Results{}, result, saved);
  });
}

void logsumexp_backward(Shape shape, Values g, Rows x, const void* lse, void* gx) {
  with_dtype(shape.dtype, [&](auto example) {
    using T = decltype(example);
    if (shape.columns <= kShort)
      return short_backward<T>(shape, Cotangents<T, NoTarget<T>>{{}, g}, x, NoTarget<T>{}, lse, gx);
    softmax_backward<T, NoTarget<T>, false>(shape, Cotangents<T, NoTarget<T>>{{}, g}, x, NoTarget<T>{}, lse, gx);
  });
}

void logsumexp_double_backward(Shape shape, Rows v, Values g, Rows x, const void* lse, Results dg, void* dx) {
  with_dtype(shape.dtype, [&](auto example) {
    using T = decltype(example);
    if (shape.columns <= kShort)
      return short_double_backward<T>(shape, v, Cotangents<T, NoTarget<T>>{{}, g}, x, NoTarget<T>{}, lse, Results{}, dg,
                                      dx);
    with_kept_softmax(shape, [&](auto kept) {
      softmax_double_backward<T, NoTarget<T>, kept>(shape, v, Cotangents<T, NoTarget<T>>{{}, g}, x, NoTarget<T>{}, lse,
                                                    Results{}, dg, dx);
    });
  });
}

}  // namespace rds_fast::cpu::RDS_FAST_CAPABILITY
