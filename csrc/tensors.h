// What the registrations of several files of operations share: dtypes and fresh results.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <optional>

#include "cpu/kernels.h"

namespace rds_fast::cpu {

inline torch::headeronly::ScalarType accumulation_type(torch::headeronly::ScalarType type) {
  using torch::headeronly::ScalarType;
  return type == ScalarType::Double ? type : ScalarType::Float;
}

inline Dtype dtype_of(const torch::stable::Tensor& x) {
  using torch::headeronly::ScalarType;
  const ScalarType type = x.scalar_type();
  const Dtype dtype = type == ScalarType::Double     ? Dtype::float64
                      : type == ScalarType::Float    ? Dtype::float32
                      : type == ScalarType::BFloat16 ? Dtype::bfloat16
                                                     : Dtype::float16;
  STD_TORCH_CHECK(dtype != Dtype::float16 || type == ScalarType::Half, "rds_fast_native: no kernel for this dtype");
  return dtype;
}

// A large result is fresh memory, which the system hands out page by page as it is first written: that costs more than
// the kernel. Huge pages make it 512 times fewer; where the system has none, this does nothing.
inline void advise_huge_pages(const torch::stable::Tensor& fresh) {
#if defined(__linux__)
  constexpr uintptr_t kHugePage = uintptr_t(2) << 20;
  const uintptr_t data = reinterpret_cast<uintptr_t>(fresh.data_ptr());
  const uintptr_t first = (data + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (data + fresh.numel() * fresh.element_size()) / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

inline torch::stable::Tensor empty_as(const torch::stable::Tensor& x) {
  torch::stable::Tensor fresh = torch::stable::empty_like(x);
  advise_huge_pages(fresh);
  return fresh;
}

// The data of an argument or a result that may be absent: null where it is.
using MaybeTensor = std::optional<torch::stable::Tensor>;
inline void* data_of(const MaybeTensor& tensor) { return tensor.has_value() ? tensor->data_ptr() : nullptr; }
inline void* data_if(bool wanted, const torch::stable::Tensor& tensor) { return wanted ? tensor.data_ptr() : nullptr; }

}  // namespace rds_fast::cpu
