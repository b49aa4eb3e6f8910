// The host's side: the device's properties, what a launch may ask for, and the shared memory of its blocks.
//
// Errors, those that CUDA returns: an empty or too large grid or block, more dynamic shared memory than every launch
// may use where the kernel was not allowed more, or than a block can have. Errors while it runs: writes beyond the
// dynamic shared memory that the launch asked for. What is read there, or before it was written, is NaN.
#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <stdexcept>
#include <utility>
#include <vector>

#include "emulator.h"

namespace rds_fast::cuda {

alignas(16) thread_local unsigned char dynamic_shared[256 * 1024];  // what rows.cuh declares extern

}  // namespace rds_fast::cuda

namespace cuda_emulation {

Settings settings;
std::string launches;

namespace {

using rds_fast::cuda::dynamic_shared;

constexpr size_t EVERY_LAUNCH_MAY_USE = 48 * 1024;

cudaError_t last_error = cudaSuccess;
std::map<const void*, size_t> allowed;  // dynamic shared memory of the kernels that may use more
std::mutex one_launch;

cudaError_t record(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

struct Memory {
  unsigned char* begin;
  size_t size;
};

// The thread-local storage of this library for this thread: all shared memory.
Memory shared_memory() {
  static Dl_info own = [] {
    Dl_info information;
    dladdr(reinterpret_cast<const void*>(&launch), &information);
    return information;
  }();
  std::fill_n(dynamic_shared, 1, POISON);  // the storage exists from its first use on
  Memory found = {nullptr, 0};
  dl_iterate_phdr(
      [](dl_phdr_info* library, size_t, void* result) {
        if (reinterpret_cast<const void*>(library->dlpi_addr) != own.dli_fbase) return 0;
        for (int i = 0; i < library->dlpi_phnum; ++i) {
          const auto& segment = library->dlpi_phdr[i];
          if (segment.p_type != PT_TLS) continue;
          *static_cast<Memory*>(result) = {static_cast<unsigned char*>(library->dlpi_tls_data), segment.p_memsz};
        }
        return 1;
      },
      &found);
  if (found.begin == nullptr) throw std::runtime_error("its shared memory was not found");
  return found;
}

bool is_valid(const dim3& grid, const dim3& block) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  return grid.x >= 1 && grid.x <= 0x7fffffff && grid.y >= 1 && grid.y <= 65535 && grid.z >= 1 && grid.z <= 65535 &&
         threads >= 1 && threads <= 1024 && block.z <= 64;
}

std::string name(const dim3& size) {
  return std::to_string(size.x) + "," + std::to_string(size.y) + "," + std::to_string(size.z);
}

void run_blocks(size_t dynamic_bytes, const std::function<void()>& thread) {
  const Memory shared = shared_memory();
  unsigned char* const end = dynamic_shared + sizeof(dynamic_shared);
  seed_random(settings.schedule);
  const size_t blocks = size_t{gridDim.x} * gridDim.y * gridDim.z;
  std::vector<size_t> order(blocks);
  for (size_t i = 0; i < blocks; ++i) {
    order[i] = i;
    if (settings.schedule != 0) std::swap(order[i], order[random_below(static_cast<unsigned>(i + 1))]);
  }
  for (const size_t block : order) {
    blockIdx.x = static_cast<unsigned>(block % gridDim.x);
    blockIdx.y = static_cast<unsigned>(block / gridDim.x % gridDim.y);
    blockIdx.z = static_cast<unsigned>(block / gridDim.x / gridDim.y);
    std::fill_n(shared.begin, shared.size, POISON);
    run_block(thread);
    if (std::any_of(dynamic_shared + dynamic_bytes, end, [](unsigned char byte) { return byte != POISON; })) {
      throw std::runtime_error("wrote beyond the " + std::to_string(dynamic_bytes) +
                               " bytes of dynamic shared memory that the launch asked for");
    }
  }
}

}  // namespace

void set_device(const Settings& wanted) {
  settings = wanted;
  allowed.clear();
  launches.clear();
}

cudaError_t launch(const cudaLaunchConfig_t& configuration, const void* kernel, const std::function<void()>& thread) {
  const std::lock_guard<std::mutex> lock(one_launch);
  const size_t dynamic_bytes = configuration.dynamicSmemBytes;
  if (!is_valid(configuration.gridDim, configuration.blockDim)) return record(cudaErrorInvalidConfiguration);
  const auto found = allowed.find(kernel);
  if (dynamic_bytes > (found == allowed.end() ? EVERY_LAUNCH_MAY_USE : found->second)) {
    return record(cudaErrorInvalidValue);
  }
  gridDim = configuration.gridDim;
  gridDim.x = std::min(gridDim.x, settings.largest_grid);
  blockDim = configuration.blockDim;
  launches +=
      kernel_name(kernel) + "|" + name(gridDim) + "|" + name(blockDim) + "|" + std::to_string(dynamic_bytes) + "\n";
  try {
    run_blocks(dynamic_bytes, thread);
    check_margins();
  } catch (const std::runtime_error& error) {
    throw std::runtime_error("CUDA emulation: " + kernel_name(kernel) + ": " + error.what());
  }
  return cudaSuccess;
}

}  // namespace cuda_emulation

using cuda_emulation::settings;

cudaError_t cudaGetLastError() { return std::exchange(cuda_emulation::last_error, cudaSuccess); }

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess             ? "no error"
         : error == cudaErrorInvalidValue ? "invalid argument"
                                          : "invalid configuration argument";
}

cudaError_t cudaSetDevice(int) { return cudaSuccess; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int) {
  *value = name == cudaDevAttrMultiProcessorCount ? settings.processors : settings.shared_bytes;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  // A block's static variables take of the same memory. Those of this kernel are not known; no kernel has more.
  const size_t all = static_cast<size_t>(value) + cuda_emulation::largest_static_shared();
  if (value < 0 || all > static_cast<size_t>(settings.shared_bytes))
    return cuda_emulation::record(cudaErrorInvalidValue);
  cuda_emulation::allowed[kernel] = static_cast<size_t>(value);
  return cudaSuccess;
}

// What of PyTorch's C interface needs a GPU. These take its place inside this library, for one device and one stream.
extern "C" {
int32_t aoti_torch_create_device_guard(int32_t, void** guard) {
  *guard = nullptr;
  return 0;
}
int32_t aoti_torch_delete_device_guard(void*) { return 0; }
int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
}
