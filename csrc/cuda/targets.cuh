// The targets of a cross-entropy: class indices, or probabilities of each class.
#pragma once

#include <torch/headeronly/macros/Macros.h>

#include "launch.cuh"

namespace rds_fast::cuda {

// The targets of a batch. PROBABILITIES: q is read with the rows; otherwise class indices.
template <typename T, bool PROBABILITIES>
struct Targets {
  using A = Accumulation<T>;
  const int64_t* indices;
  int64_t index_stride;
  int64_t ignore_index;
  int64_t classes;
  A on;     // 1 − ε
  A off;    // ε / C
  A total;  // Q of a class index, as the sum of these two rounded numbers: where the terms of a result cancel, they do
            // so exactly (one class: the gradient is 0)

  // q' of a class that has this probability.
  __device__ __forceinline__ A q(A probability) const { return on * probability + off; }

  // The class of a row, or −1 where it is ignored. A bad index stops the program before anything is read with it.
  __device__ __forceinline__ int64_t index(int64_t r) const {
    if constexpr (PROBABILITIES) return -1;
    const int64_t index = indices[r * index_stride];
    if (index == ignore_index) return -1;
    CUDA_KERNEL_ASSERT(index >= 0 && index < classes && "the target is not a class index");
    return index;
  }
};

template <typename T, bool PROBABILITIES>
Targets<T, PROBABILITIES> make_targets(const Tensor& target, int64_t classes, double label_smoothing,
                                       int64_t ignore_index) {
  using A = Accumulation<T>;
  Targets<T, PROBABILITIES> targets;
  targets.indices = PROBABILITIES ? nullptr : static_cast<const int64_t*>(target.const_data_ptr());
  targets.index_stride = target.stride(0);
  targets.ignore_index = ignore_index;
  targets.classes = classes;
  targets.on = static_cast<A>(1.0 - label_smoothing);
  targets.off = static_cast<A>(label_smoothing / static_cast<double>(classes));
  targets.total = targets.on + targets.off * static_cast<A>(classes);
  return targets;
}

// Calls body with the logits' element type and whether the target holds probabilities.
template <typename Body>
void for_element_and_target_type(const Tensor& logits, const Tensor& target, Body body) {
  for_element_type(logits, [&](auto element) {
    if (target.scalar_type() == ScalarType::Long) {
      body(element, std::false_type{}, static_cast<const Tensor*>(nullptr));
    } else {
      body(element, std::true_type{}, &target);
    }
  });
}

}  // namespace rds_fast::cuda
