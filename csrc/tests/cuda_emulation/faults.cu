// Kernels with one fault each, for the tests of the emulation: rds_fast_emulated::fault(kind, x) runs one of them on
// x (n,), float32, n a multiple of 64, with n threads, and returns what it wrote.
#include <cuda_runtime.h>

#include <map>
#include <stdexcept>

namespace rds_fast::cuda {

__device__ __forceinline__ float* dynamic_floats() {
  extern __shared__ __align__(16) unsigned char dynamic_shared[];
  return reinterpret_cast<float*>(dynamic_shared);
}

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr unsigned ALL = 0xffffffffu;

// No fault: each thread takes its neighbour's value, twice.
__global__ void rotate_twice(const float* x, float* out) {
  float* const shared = dynamic_floats();
  float value = x[threadIdx.x];
  for (int i = 0; i < 2; ++i) {
    __syncthreads();
    shared[threadIdx.x] = value;
    __syncthreads();
    value = shared[(threadIdx.x + 1) % blockDim.x];
  }
  out[threadIdx.x] = value;
}

// The neighbour may not have written yet.
__global__ void no_barrier_after_write(const float* x, float* out) {
  float* const shared = dynamic_floats();
  shared[threadIdx.x] = x[threadIdx.x];
  out[threadIdx.x] = shared[(threadIdx.x + 1) % blockDim.x];
}

// The neighbour may not have read yet what the second write replaces.
__global__ void no_barrier_before_write(const float* x, float* out) {
  float* const shared = dynamic_floats();
  float value = x[threadIdx.x];
  for (int i = 0; i < 2; ++i) {
    shared[threadIdx.x] = value;
    __syncthreads();
    value = shared[(threadIdx.x + 1) % blockDim.x];
  }
  out[threadIdx.x] = value;
}

__global__ void barrier_of_half_the_block(const float* x, float* out) {
  if (threadIdx.x < blockDim.x / 2) __syncthreads();
  out[threadIdx.x] = x[threadIdx.x];
}

__global__ void two_barriers(const float* x, float* out) {
  if (threadIdx.x < blockDim.x / 2) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = x[threadIdx.x];
}

__global__ void shuffle_of_half_the_lanes(const float* x, float* out) {
  out[threadIdx.x] = threadIdx.x % 32 < 16 ? __shfl_xor_sync(ALL, x[threadIdx.x], 1) : 0.0f;
}

__global__ void shuffle_outside_the_mask(const float* x, float* out) {
  out[threadIdx.x] = __shfl_xor_sync(0xffffu, x[threadIdx.x], 1);
}

__global__ void shuffle_from_outside_the_mask(const float* x, float* out) {
  out[threadIdx.x] = threadIdx.x % 32 < 16 ? __shfl_xor_sync(0xffffu, x[threadIdx.x], 16) : 0.0f;
}

__global__ void write_beyond_shared_memory(const float* x, float* out) {
  dynamic_floats()[threadIdx.x + 1] = x[threadIdx.x];
  out[threadIdx.x] = 0;
}

__global__ void misaligned_load(const float* x, float* out) {
  uint4 bits = {};
  if (threadIdx.x == 0) bits = *reinterpret_cast<const uint4*>(x + 1);
  out[threadIdx.x] = static_cast<float>(bits.x);
}

__global__ void misaligned_store(const float* x, float* out) {
  if (threadIdx.x == 0) *reinterpret_cast<double*>(out + 1) = x[0];
}

__global__ void read_past_the_end(const float* x, float* out) { out[threadIdx.x] = x[threadIdx.x + 1]; }

__global__ void write_past_the_end(const float* x, float* out) { out[threadIdx.x + 1] = x[threadIdx.x]; }

__global__ void write_before_the_beginning(const float* x, float* out) {
  out[static_cast<int>(threadIdx.x) - 1] = x[threadIdx.x];
}

__global__ void failed_assertion(const float* x, float* out) {
  CUDA_KERNEL_ASSERT(threadIdx.x != 5);
  out[threadIdx.x] = x[threadIdx.x];
}

struct Launch {
  void (*kernel)(const float*, float*);
  dim3 grid = {};
  unsigned more_threads = 0;
  size_t shared_bytes = 0;  // 0: a float a thread
  int allowed_bytes = 0;    // asked for by cudaFuncSetAttribute
};

const std::map<std::string, Launch> launches = {
    {"none", {rotate_twice}},
    {"no barrier after a write", {no_barrier_after_write}},
    {"no barrier before a write", {no_barrier_before_write}},
    {"barrier of half the block", {barrier_of_half_the_block}},
    {"two barriers", {two_barriers}},
    {"shuffle of half the lanes", {shuffle_of_half_the_lanes}},
    {"shuffle outside the mask", {shuffle_outside_the_mask}},
    {"shuffle from outside the mask", {shuffle_from_outside_the_mask}},
    {"write beyond shared memory", {write_beyond_shared_memory}},
    {"misaligned load", {misaligned_load}},
    {"misaligned store", {misaligned_store}},
    {"read past the end", {read_past_the_end}},
    {"write past the end", {write_past_the_end}},
    {"write before the beginning", {write_before_the_beginning}},
    {"failed assertion", {failed_assertion}},
    {"too many threads", {rotate_twice, {}, 1024}},
    {"no blocks", {rotate_twice, {0}}},
    {"too many blocks in y", {rotate_twice, {1, 65536}}},
    {"shared memory not asked for", {rotate_twice, {}, 0, 48 * 1024 + 16}},
    {"shared memory asked for", {rotate_twice, {}, 0, 64 * 1024, 64 * 1024}},
    {"more shared memory than there is", {rotate_twice, {}, 0, 227 * 1024, 227 * 1024}},
};

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(cudaGetErrorString(error));
}

Tensor fault(std::string kind, Tensor x) {
  const Launch& launch = launches.at(kind);
  const auto threads = static_cast<unsigned>(x.numel());
  Tensor out = torch::stable::new_empty(x, std::vector<int64_t>{x.numel()}, ScalarType::Float);
  if (launch.allowed_bytes != 0) {
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(launch.kernel),
                               cudaFuncAttributeMaxDynamicSharedMemorySize, launch.allowed_bytes));
  }
  cudaLaunchConfig_t configuration = {};
  configuration.gridDim = launch.grid;
  configuration.blockDim = dim3(threads + launch.more_threads);
  configuration.dynamicSmemBytes = launch.shared_bytes != 0 ? launch.shared_bytes : threads * sizeof(float);
  check(cudaLaunchKernelEx(&configuration, launch.kernel, static_cast<const float*>(x.const_data_ptr()),
                           static_cast<float*>(out.mutable_data_ptr())));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(rds_fast_emulated, m) { m.def("fault(str kind, Tensor x) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(rds_fast_emulated, CPU, m) { m.impl("fault", TORCH_BOX(&fault)); }

}  // namespace rds_fast::cuda
