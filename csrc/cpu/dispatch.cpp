// Which instruction set the CPU kernels use: the best that was compiled and that this CPU has.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace rds_fast::cpu {

#define RDS_FAST_DECLARE(name, arguments) void name arguments;
#define RDS_FAST_ADDRESS(name, arguments) name,
#define RDS_FAST_TABLE(capability, name)                                       \
  namespace capability {                                                       \
  RDS_FAST_CPU_KERNELS(RDS_FAST_DECLARE)                                       \
  static const Kernels table = {name, RDS_FAST_CPU_KERNELS(RDS_FAST_ADDRESS)}; \
  }

RDS_FAST_TABLE(baseline, "default")
#if defined(RDS_FAST_X86)
RDS_FAST_TABLE(avx2, "avx2")
RDS_FAST_TABLE(avx512, "avx512")
#endif

namespace {

const Kernels& choose() {
  const char* const requested = std::getenv("RDS_FAST_CPU_CAPABILITY");
  const auto allowed = [&](const char* lower) { return requested != nullptr && std::strcmp(requested, lower) == 0; };
  if (allowed("default")) return baseline::table;
#if defined(RDS_FAST_X86)
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && !allowed("avx2")) return avx512::table;
  if (has_avx2) return avx2::table;
#endif
  return baseline::table;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace rds_fast::cpu
