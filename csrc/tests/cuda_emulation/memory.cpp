// Memory for tensors that shows an access outside of them, as PyTorch's CPU allocator while the tests run.
//
// Each allocation has pages of its own. It ends where an unreadable page begins, but for what 16-byte alignment leaves;
// that rest, and what is before the allocation on its first page, is a margin, filled like the fresh memory itself with
// bytes that are NaN in every floating type. So reads past the end stop, other reads outside give NaN, and writes
// outside stop or change a margin. Freed memory cannot be accessed.
#undef TORCH_TARGET_VERSION  // an allocator is no part of the stable interface
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>
#include <stdexcept>

#include "emulator.h"

namespace cuda_emulation {
namespace {

struct Block {
  unsigned char* mapping;
  size_t mapped;  // bytes, the unreadable page included
  unsigned char* data;
  size_t size;
  unsigned char* end;  // of what is readable
};

std::map<uintptr_t, Block> blocks;  // by the mapping's address
std::mutex blocks_mutex;

size_t page() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

bool is_margin_intact(const Block& block) {
  const auto is_poison = [](unsigned char byte) { return byte == POISON; };
  return std::all_of(block.mapping, block.data, is_poison) &&
         std::all_of(block.data + block.size, block.end, is_poison);
}

void free_block(void* data) {
  const std::lock_guard<std::mutex> lock(blocks_mutex);
  const auto above = blocks.upper_bound(reinterpret_cast<uintptr_t>(data));
  const auto found = std::prev(above);
  munmap(found->second.mapping, found->second.mapped);
  blocks.erase(found);
}

class GuardedAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t size) override {
    if (size == 0) return {nullptr, nullptr, &free_nothing, c10::DeviceType::CPU};
    const size_t aligned = (size + 15) / 16 * 16;
    const size_t readable = (aligned + page() - 1) / page() * page();
    const size_t mapped = readable + page();
    void* const memory = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    auto* const begin = static_cast<unsigned char*>(memory);
    std::fill_n(begin, readable, POISON);
    mprotect(begin + readable, page(), PROT_NONE);
    unsigned char* const data = begin + readable - aligned;
    const std::lock_guard<std::mutex> lock(blocks_mutex);
    blocks[reinterpret_cast<uintptr_t>(begin)] = {begin, mapped, data, size, begin + readable};
    return {data, data, &free_block, c10::DeviceType::CPU};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &free_block; }

  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

 private:
  static void free_nothing(void*) {}
};

// What lies at an address that could not be accessed.
std::string describe(uintptr_t address) {
  const auto above = blocks.upper_bound(address);
  if (above != blocks.begin()) {
    const Block& block = std::prev(above)->second;
    const uintptr_t end = reinterpret_cast<uintptr_t>(block.data) + block.size;
    if (address < reinterpret_cast<uintptr_t>(block.mapping) + block.mapped) {
      return "accesses memory " + std::to_string(address - end) + " bytes past the end of an allocation of " +
             std::to_string(block.size) + " bytes";
    }
  }
  return "accesses memory that is none of a tensor's, or its stack is full";
}

// It has a stack of its own: that of the thread may be what is full. The signal comes from the kernel's own code, so
// nothing here is interrupted that it uses.
void on_signal(int signal, siginfo_t* information, void*) {
  sigset_t this_one;
  sigemptyset(&this_one);
  sigaddset(&this_one, signal);
  sigprocmask(SIG_UNBLOCK, &this_one, nullptr);
  fault(describe(reinterpret_cast<uintptr_t>(information->si_addr)));
  abort();  // it was not in a kernel
}

}  // namespace

void guard_memory(bool on) {
  static GuardedAllocator guarded;
  static c10::Allocator* const before = c10::GetCPUAllocator();
  c10::SetCPUAllocator(on ? &guarded : before);
}

void check_margins() {
  const std::lock_guard<std::mutex> lock(blocks_mutex);
  for (const auto& [begin, block] : blocks) {
    if (is_margin_intact(block)) continue;
    throw std::runtime_error("wrote just outside of an allocation of " + std::to_string(block.size) + " bytes");
  }
}

RefusedAccesses::RefusedAccesses() {
  static char memory[64 * 1024];
  stack_t own = {};
  own.ss_sp = memory;
  own.ss_size = sizeof(memory);
  sigaltstack(&own, &stack_before_);
  struct sigaction action = {};
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGSEGV, &action, &segv_before_);
  sigaction(SIGBUS, &action, &bus_before_);
}

RefusedAccesses::~RefusedAccesses() {
  sigaction(SIGSEGV, &segv_before_, nullptr);
  sigaction(SIGBUS, &bus_before_, nullptr);
  sigaltstack(&stack_before_, nullptr);
}

}  // namespace cuda_emulation
