// What the tests call, by ctypes, and what the compiler calls: its check of every access's alignment.
#include <utility>

#include "emulator.h"

#define RDS_FAST_EXPORT extern "C" __attribute__((visibility("default")))

RDS_FAST_EXPORT void cuda_emulation_set(int processors, int shared_bytes, unsigned largest_grid, unsigned schedule) {
  cuda_emulation::set_device({processors, shared_bytes, largest_grid, schedule});
}

RDS_FAST_EXPORT void cuda_emulation_guard_memory(bool on) { cuda_emulation::guard_memory(on); }

// The launches since the last call; valid until the next one.
RDS_FAST_EXPORT const char* cuda_emulation_take_launches() {
  static std::string taken;
  taken = std::exchange(cuda_emulation::launches, {});
  return taken.c_str();
}

// The library is compiled with -fsanitize=alignment, which calls this function for each misaligned access. It takes the
// place of the sanitizer's own, which prints and goes on.
extern "C" {
struct TypeMismatch {
  const char* file;
  uint32_t line, column;
  const void* type;
  unsigned char log_alignment, kind;
};
void __ubsan_handle_type_mismatch_v1(const TypeMismatch* access, uintptr_t address) {
  const auto past = address % (uintptr_t{1} << access->log_alignment);
  cuda_emulation::fault("accesses an address " + std::to_string(past) + " bytes past a multiple of " +
                        std::to_string(1 << access->log_alignment) + " bytes, which is misaligned, at " + access->file +
                        ":" + std::to_string(access->line));
}
}
