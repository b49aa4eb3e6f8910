// The host side: tensors to rows, the choice of a kernel by the shape of the rows, launches and their errors.
#pragma once

#ifndef USE_CUDA
#define USE_CUDA  // PyTorch's C shim declares its CUDA functions only then
#endif

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "rows.cuh"
#include "small.cuh"
#include "stash.cuh"

namespace rds_fast::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // so that the next call does not report this error again
  throw std::runtime_error(std::string("rds_fast: ") + what + " failed: " + cudaGetErrorString(error));
}

// Makes the device of a tensor the current one for a scope; launches go to PyTorch's current stream there.
struct Device {
  int index;
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;

  explicit Device(const Tensor& tensor) : index(tensor.get_device_index()), guard(index) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &current));
    stream = static_cast<cudaStream_t>(current);
    check(cudaSetDevice(index), "selecting the device");  // the CUDA runtime linked here may not be PyTorch's copy
  }

  int64_t attribute(cudaDeviceAttr name) const {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, name, index), "asking for a property of the device");
    return value;
  }
};

template <typename... Parameters, typename... Arguments>
void launch(const Device& device, void (*kernel)(Parameters...), dim3 grid, int threads, int64_t shared_bytes,
            Arguments... arguments) {
  constexpr int64_t EVERY_LAUNCH_MAY_USE = 48 * 1024;
  if (shared_bytes > EVERY_LAUNCH_MAY_USE) {
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes)),
          "asking for shared memory");
  }
  cudaLaunchConfig_t configuration = {};
  configuration.gridDim = grid;
  configuration.blockDim = dim3(threads);
  configuration.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  configuration.stream = device.stream;
  check(cudaLaunchKernelEx(&configuration, kernel, Parameters(arguments)...), "launching a kernel");
  check(cudaGetLastError(), "launching a kernel");
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks for `rows` rows, `rows_per_block` each; kernels loop over what is beyond the largest grid.
inline unsigned grid_size(int64_t rows, int64_t rows_per_block) {
  return static_cast<unsigned>(std::min<int64_t>(divide_up(rows, rows_per_block), 0x7fffffff));
}

// Into how many parts to split each row so that about `blocks` blocks run, each with at least one full batch of loads.
inline int64_t parts_of_row(int64_t rows, int64_t chunks, int64_t blocks) {
  const int64_t wanted = divide_up(blocks, rows);
  return std::max<int64_t>(1, std::min({wanted, chunks / (BLOCK * UNROLL), int64_t{65535}}));
}

// Uninitialised memory for `count` states, returned to PyTorch's allocator at the end of the scope: stream order makes
// that safe.
template <typename State>
struct Scratch {
  Tensor bytes;
  Scratch(const Tensor& like, int64_t count)
      : bytes(torch::stable::new_empty(like, std::vector<int64_t>{count * static_cast<int64_t>(sizeof(State))},
                                       ScalarType::Byte)) {}
  State* data() const { return static_cast<State*>(bytes.mutable_data_ptr()); }
};

template <int LANES>
using Lanes = std::integral_constant<int, LANES>;

// Lanes of a short row. A group of them saves a part of what a row costs beside its elements, which is little beside
// what the elements of a ROLLED operation cost: its kernels for groups would be code to compile and no more.
template <typename Op>
constexpr int SHORT = Op::ROLLED ? WARP : GROUP;

template <typename Op>
void launch_small(const Device& device, const Op& op, const Rows<typename Op::Element>& rows) {
  constexpr int tiles = 1 + (Op::READS_V ? 1 : 0) + (Op::READS_Q ? 1 : 0);
  const int64_t bytes = tiles * SMALL_ROWS<Op> * (rows.columns | 1) * sizeof(typename Op::A);
  launch(device, small_rows<Op>, dim3(grid_size(rows.rows, SMALL_ROWS<Op>)), SMALL_ROWS<Op>, bytes, op, rows);
}

// The parts that reduce_rows left.
template <typename Op>
struct Partials {
  Scratch<typename Op::State> states;
  int parts;
};

template <typename Op>
Partials<Op> launch_split_reduction(const Device& device, const Op& op, const Rows<typename Op::Element>& rows,
                                    const Tensor& like, int64_t parts) {
  Scratch<typename Op::State> states(like, rows.rows * parts);
  const dim3 grid(grid_size(rows.rows, 1), static_cast<unsigned>(parts));
  launch(device, reduce_rows<Op, BLOCK>, grid, BLOCK, 0, op, rows, states.data());
  return {states, static_cast<int>(parts)};
}

template <typename Op>
void launch_reduction(const Device& device, const Op& op, const Rows<typename Op::Element>& rows, const Tensor& like) {
  const int64_t chunks = rows.columns / WIDTH<typename Op::Element>;
  const int64_t processors = device.attribute(cudaDevAttrMultiProcessorCount);
  typename Op::State* const none = nullptr;
  const auto launch_lanes = [&](auto lanes) {
    const dim3 grid(grid_size(rows.rows, WARPS_BLOCK / lanes));
    launch(device, reduce_rows<Op, lanes>, grid, WARPS_BLOCK, 0, op, rows, none);
  };
  // Up to four batches of loads in one warp beat a block's barriers, and in one group of lanes what a row costs a whole
  // warp, if the rows are so many that all multiprocessors are busy: 64 rows each are 16 warps. Fewer rows: one batch.
  if (chunks <= (rows.rows >= 64 * processors ? 16 : UNROLL) * GROUP) return launch_lanes(Lanes<SHORT<Op>>());
  if (chunks <= 16 * WARP) return launch_lanes(Lanes<WARP>());
  // Two blocks a multiprocessor keep the memory busy; with fewer rows than that the rows are split.
  const int64_t parts = rows.rows >= 2 * processors ? 1 : parts_of_row(rows.rows, chunks, 4 * processors);
  if (parts == 1)
    return launch(device, reduce_rows<Op, BLOCK>, dim3(grid_size(rows.rows, 1)), BLOCK, 0, op, rows, none);
  const auto partials = launch_split_reduction(device, op, rows, like, parts);
  const dim3 grid(grid_size(rows.rows, WARPS_BLOCK / WARP));
  launch(device, finish_rows<Op>, grid, WARPS_BLOCK, 0, op, rows.rows, partials.states.data(), partials.parts);
}

// Launches map_rows; `partials` as a split reduction before it left them.
template <typename Op, int LANES>
void launch_map(const Device& device, const Op& op, const Rows<typename Op::Element>& rows,
                const typename Op::State* partials, int parts) {
  const int64_t chunks = rows.columns / WIDTH<typename Op::Element>;
  const int64_t blocks = 8 * device.attribute(cudaDevAttrMultiProcessorCount);
  const int64_t columns_parts = LANES <= WARP ? 1 : parts_of_row(rows.rows, chunks, blocks);
  const dim3 grid(grid_size(rows.rows, THREADS<LANES> / LANES), static_cast<unsigned>(columns_parts));
  launch(device, map_rows<Op, LANES>, grid, THREADS<LANES>, 0, op, rows, partials, parts);
}

template <typename Op, int LANES, int HELD>
void launch_held(const Device& device, const Op& op, const Rows<typename Op::Element>& rows) {
  const dim3 grid(grid_size(rows.rows, THREADS<LANES> / LANES));
  launch(device, reduce_map_held<Op, LANES, HELD>, grid, THREADS<LANES>, 0, op, rows);
}

template <typename Op>
void launch_reduce_map(const Device& device, const Op& op, const Rows<typename Op::Element>& rows, const Tensor& like) {
  const int64_t chunks = rows.columns / WIDTH<typename Op::Element>;
  if (chunks <= 4 * GROUP) return launch_held<Op, SHORT<Op>, 4>(device, op, rows);
  if (chunks <= 4 * WARP) return launch_held<Op, WARP, 4>(device, op, rows);
  if constexpr (!Op::READS_Q && !Op::ROLLED) {  // of three inputs, 8 chunks each are more than the registers take
    if (chunks <= 8 * WARP) return launch_held<Op, WARP, 8>(device, op, rows);
  }
  if (chunks <= 4 * BLOCK) return launch_held<Op, BLOCK, 4>(device, op, rows);
  const int64_t processors = device.attribute(cudaDevAttrMultiProcessorCount);
  // One block a row would leave half of the multiprocessors idle, which costs more than reading the rows twice.
  const int64_t parts = 2 * rows.rows > processors ? 1 : parts_of_row(rows.rows, chunks, 4 * processors);
  if (parts > 1) {
    const auto partials = launch_split_reduction(device, op, rows, like, parts);
    return launch_map<Op, BLOCK>(device, op, rows, partials.states.data(), partials.parts);
  }
  constexpr int64_t STATIC_BYTES = 1024;  // upper bound of the kernel's own, for the states of its warps
  const int64_t slot_bytes = 16 * Stash<Op>::slots_per_chunk(rows.q_wide);
  const int64_t available = device.attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - STATIC_BYTES;
  const int64_t capacity = std::min(chunks, available / slot_bytes);
  launch(device, reduce_map_stashed<Op>, dim3(grid_size(rows.rows, 1)), STASH_BLOCK<Op>, capacity * slot_bytes, op,
         rows, capacity);
}

// Runs an operation over the rows. `like`: any tensor on the device, for scratch memory.
template <typename Op>
void run_rows(const Device& device, const Op& op, const Rows<typename Op::Element>& rows, const Tensor& like) {
  static_assert(Op::MAPS || !Op::MAP_READS_Q, "only a map can read q");
  if (rows.rows == 0 || rows.columns == 0) return;
  if (rows.columns <= SMALL_COLUMNS) return launch_small(device, op, rows);
  if constexpr (!Op::MAPS) {
    launch_reduction(device, op, rows, like);
  } else if constexpr (Op::REDUCES) {
    launch_reduce_map(device, op, rows, like);
  } else if (rows.columns / WIDTH<typename Op::Element> <= UNROLL * GROUP) {
    launch_map<Op, SHORT<Op>>(device, op, rows, nullptr, 0);
  } else if (rows.columns / WIDTH<typename Op::Element> <= 8 * WARP) {
    launch_map<Op, WARP>(device, op, rows, nullptr, 0);
  } else {
    launch_map<Op, BLOCK>(device, op, rows, nullptr, 0);
  }
}

// The step between rows. A single row has none, whatever its stride says.
inline int64_t row_stride(const Tensor& tensor) { return tensor.size(0) > 1 ? tensor.stride(0) : 0; }

// Whether another tensor's rows meet 16-byte boundaries at the same columns as x's rows.
template <typename T>
bool cut_alike(const void* x, int64_t x_stride, const void* other, int64_t other_stride, size_t other_size) {
  const int64_t x_position = static_cast<int64_t>(reinterpret_cast<uintptr_t>(x) / sizeof(T));
  const int64_t position = static_cast<int64_t>(reinterpret_cast<uintptr_t>(other) / other_size);
  return (x_position - position) % WIDTH<T> == 0 && (x_stride - other_stride) % WIDTH<T> == 0;
}

// The rows of x, of v and q where there are any, and of the result, if there is one.
template <typename T>
Rows<T> make_rows(const Tensor& x, const Tensor* v, const Tensor* q, const Tensor* out) {
  Rows<T> rows;
  rows.rows = x.size(0);
  rows.columns = x.size(1);
  rows.x = static_cast<const T*>(x.const_data_ptr());
  rows.x_stride = row_stride(x);
  if (v != nullptr) {
    rows.v = static_cast<const T*>(v->const_data_ptr());
    rows.v_stride = row_stride(*v);
    rows.v_aligned = cut_alike<T>(rows.x, rows.x_stride, rows.v, rows.v_stride, sizeof(T));
  }
  if (q != nullptr) {
    rows.q = q->const_data_ptr();
    rows.q_stride = row_stride(*q);
    rows.q_wide = q->scalar_type() != x.scalar_type();
    const size_t q_size = rows.q_wide ? sizeof(Accumulation<T>) : sizeof(T);
    rows.q_aligned = cut_alike<T>(rows.x, rows.x_stride, rows.q, rows.q_stride, q_size);
  }
  if (out != nullptr) {
    rows.out = static_cast<T*>(out->mutable_data_ptr());
    rows.out_aligned = cut_alike<T>(rows.x, rows.x_stride, rows.out, rows.rows > 1 ? rows.columns : 0, sizeof(T));
  }
  return rows;
}

template <typename T>
InputColumn<T> input_column(const Tensor& column, const Tensor& x) {
  return {column.const_data_ptr(), column.stride(0), column.scalar_type() != x.scalar_type()};
}

template <typename T>
OutputColumn<T> output_column(const Tensor& column, const Tensor& x) {
  return {column.mutable_data_ptr(), column.scalar_type() != x.scalar_type()};
}

inline ScalarType accumulation_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Tensor new_column(const Tensor& x, ScalarType type) {
  return torch::stable::new_empty(x, std::vector<int64_t>{x.size(0)}, type);
}

inline Tensor new_rows(const Tensor& x) {
  return torch::stable::new_empty(x, std::vector<int64_t>{x.size(0), x.size(1)}, x.scalar_type());
}

// Calls body with a value of x's element type.
template <typename Body>
void for_element_type(const Tensor& x, Body body) {
  switch (x.scalar_type()) {
    case ScalarType::Double:
      return body(double{});
    case ScalarType::Float:
      return body(float{});
    case ScalarType::BFloat16:
      return body(c10::BFloat16{});
    case ScalarType::Half:
      return body(c10::Half{});
    default:
      throw std::runtime_error("rds_fast: the CUDA kernels take float64, float32, bfloat16 and float16");
  }
}

}  // namespace rds_fast::cuda
