// Which instruction-set levels this machine runs.

#include "isa.h"

namespace asyncopd {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};

// Each level implies the ones before it.
int supported_levels() {
#ifdef ASYNCOPD_X86_DISPATCH
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 1;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx512 ? 3 : 2;
#else
  return 1;
#endif
}

}  // namespace

int resolve_isa(int isa) {
  const int levels = supported_levels();
  if (isa < 0) return levels - 1;
  return isa < levels ? isa : -1;
}

}  // namespace asyncopd

const char* asyncopd_cpu_isa_name(int isa) {
  return isa >= 0 && asyncopd::resolve_isa(isa) >= 0 ? asyncopd::kNames[isa] : nullptr;
}
