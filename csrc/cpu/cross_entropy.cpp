// Cross-entropy and log-sum-exp of rows in one pass, their backward and double backward: softmax.h, or short_rows.h,
// with a target.
#include "short_rows.h"

namespace rds_fast::cpu::RDS_FAST_CAPABILITY {

// Short rows with probabilities go by softmax.h too: there is one path less, and they are rare.

// call(T(), target) with the storage type of the logits and the kind of target.
template <typename Call>
void with_target(const Shape& shape, const Target& given, const Call& call) {
  with_dtype(shape.dtype, [&](auto example) {
    using T = decltype(example);
    if (given.indices != nullptr) {
      call(example, IndexTarget<T>{given, shape.columns});
    } else if (given.accumulated) {
      call(example, ProbabilityTarget<T, Acc<T>>{given, shape.columns});
    } else {
      call(example, ProbabilityTarget<T, T>{given, shape.columns});
    }
  });
}

void cross_entropy(Shape shape, Rows logits, Target target, Results ce, Results lse, Saved saved) {
  with_target(shape, target, [&](auto example, auto q) {
    using T = decltype(example);
    if constexpr (!decltype(q)::needs_total) {
      if (shape.columns <= kShort) return short_forward<T>(shape, logits, q, ce, lse, saved);
    }
    softmax_forward<T>(shape, logits, q, ce, lse, saved);
  });
}

void cross_entropy_backward(Shape shape, Values g_ce, Values g_lse, Rows logits, Target target, const void* lse,
                            void* gx) {
  with_target(shape, target, [&](auto example, auto q) {
    using T = decltype(example);
    using G = Cotangents<T, decltype(q)>;
    if constexpr (!decltype(q)::needs_total) {
      if (shape.columns <= kShort) return short_backward<T>(shape, G{g_ce, g_lse}, logits, q, lse, gx);
    }
    with_kept_softmax(
        shape, [&](auto kept) { softmax_backward<T, decltype(q), kept>(shape, G{g_ce, g_lse}, logits, q, lse, gx); });
  });
}

void cross_entropy_double_backward(Shape shape, Rows v, Values g_ce, Values g_lse, Rows logits, Target target,
                                   const void* lse, Results dg_ce, Results dg_lse, void* dx) {
  with_target(shape, target, [&](auto example, auto q) {
    using T = decltype(example);
    using G = Cotangents<T, decltype(q)>;
    if constexpr (!decltype(q)::needs_total) {
      if (shape.columns <= kShort)
        return short_double_backward<T>(shape, v, G{g_ce, g_lse}, logits, q, lse, dg_ce, dg_lse, dx);
    }
    with_kept_softmax(shape, [&](auto kept) {
      softmax_double_backward<T, decltype(q), kept>(shape, v, G{g_ce, g_lse}, logits, q, lse, dg_ce, dg_lse, dx);
    });
  });
}

}  // namespace rds_fast::cpu::RDS_FAST_CAPABILITY
