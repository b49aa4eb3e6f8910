// What the files of the emulator share.
#pragma once

#include <csignal>
#include <cstdint>
#include <functional>
#include <string>

#include "cuda_runtime.h"

namespace cuda_emulation {

// What the tests choose (interface.cpp).
struct Settings {
  int processors = 132;
  int shared_bytes = 227 * 1024;  // the most that a block may ask for
  // More blocks than this in x are not run: a kernel that loops over what is beyond its grid, as these do, then loops.
  unsigned largest_grid = 0x7fffffff;
  // 0: threads in their order, all as far as the next wait. Odd: one warp as far as it comes before another runs. Even:
  // any thread that can run. The order of blocks, warps and threads is drawn with this number as the seed.
  unsigned schedule = 0;
};
extern Settings settings;
// A fresh device: no kernel may use more shared memory than every launch may, and none was launched.
void set_device(const Settings& wanted);
// What was launched: name|grid|block|bytes of dynamic shared memory, a line each.
extern std::string launches;

// Runs every thread of the block blockIdx; throws what fault() was told.
void run_block(const std::function<void()>& thread);

// Ends the block of the running thread with an error. Outside a kernel it does nothing but return.
void fault(const std::string& what);

// A pseudorandom number below `bound`, from the stream that the schedule started.
unsigned random_below(unsigned bound);
void seed_random(unsigned seed);

// The name of a kernel, from the symbols of this library.
std::string kernel_name(const void* kernel);
// The size of the largest variable in shared memory but the dynamic one.
size_t largest_static_shared();

// Memory that the tests' tensors, results and scratch are in, where guard_memory(true) was called: an access beyond its
// end, or to what was freed, is a fault, and so is what was written before its beginning.
void guard_memory(bool on);
// Throws if memory around a tensor was written to.
void check_margins();
// Makes faults of the accesses that the system refuses, for a scope.
class RefusedAccesses {
 public:
  RefusedAccesses();
  ~RefusedAccesses();

 private:
  stack_t stack_before_ = {};
  struct sigaction segv_before_ = {}, bus_before_ = {};
};

constexpr unsigned char POISON = 0xff;  // NaN in every floating type, −1 in integers

}  // namespace cuda_emulation
