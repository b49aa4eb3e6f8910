// The part of CUDA that csrc/cuda uses, for a machine without a GPU: the kernels' own files, unchanged, are compiled by
// the C++ compiler with this folder before all others, and run as a GPU would run them, but for speed.
//
// A launch runs its blocks one after another. The threads of a block are fibers (threads.cpp): each runs until it waits
// at a barrier or a shuffle, or ends. So everything between two barriers runs in an order that `schedule` chooses, and
// a result that depends on the order shows a race. What a GPU leaves undefined is an error here, by name: threads.cpp,
// launch.cpp and memory.cpp say what.
#pragma once

#include <math.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)  // the compiler of the device checks it
#define __align__(bytes) __attribute__((aligned(bytes)))
// One thread of the system runs one block at a time. So what is thread_local is shared by the fibers of a block, and
// the library's thread-local storage, which holds nothing else, is a block's shared memory.
#define __shared__ thread_local

struct uint3 {
  unsigned x, y, z;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

namespace cuda_emulation {

struct Place {
  const char* file;
  int line;
};

void wait_at_barrier(Place place);
uint64_t exchange(unsigned mask, uint64_t value, int lane_mask, Place place);

}  // namespace cuda_emulation

// The default arguments are those of the caller's line.
inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  cuda_emulation::wait_at_barrier({file, line});
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, const char* file = __builtin_FILE(),
                  int line = __builtin_LINE()) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a shuffle moves 4 or 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = cuda_emulation::exchange(mask, bits, lane_mask, {file, line});
  memcpy(&value, &bits, sizeof(T));
  return value;
}

// ---- The host's side
// ---------------------------------------------------------------------------------------------------
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
using cudaStream_t = void*;

struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int device);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute name, int value);

namespace cuda_emulation {

// Runs the blocks at once and returns what CUDA would of the launch itself. What a GPU would punish while the kernel
// runs is thrown, as a std::runtime_error that names kernel, block and thread.
cudaError_t launch(const cudaLaunchConfig_t& configuration, const void* kernel, const std::function<void()>& thread);

}  // namespace cuda_emulation

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* configuration, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  // Every thread has the arguments in a copy of its own, as the parameters of a call are.
  return cuda_emulation::launch(*configuration, reinterpret_cast<const void*>(kernel),
                                [&] { kernel(Parameters(arguments)...); });
}
