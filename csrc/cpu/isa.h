// Run-time dispatch over instruction sets without compiler flags per file.
//
// A kernel body lives in a *.inl file that each_isa.h includes once per instruction set, each time inside its own
// namespace and between ASYNCOPD_TARGET_BEGIN_x and ASYNCOPD_TARGET_END. Separate namespaces matter: were an inline
// function shared by two sets, the linker could keep the AVX-512 copy for both and crash on an older machine. For the
// same reason a *.inl file includes nothing but other *.inl files; headers come first, outside of every target region,
// and templates of the standard library that are not inlined (sort, nth_element) are called through order.h.
#pragma once

// musl and macOS are fine too: this needs no ifunc, unlike target_clones.
#if defined(__x86_64__) && defined(__GNUC__)
#define ASYNCOPD_X86_DISPATCH 1
#if defined(__clang__)
#define ASYNCOPD_TARGET_BEGIN_AVX2 \
  _Pragma("clang attribute push(__attribute__((target(\"avx2,fma\"))), apply_to = function)")
#define ASYNCOPD_TARGET_BEGIN_AVX512 \
  _Pragma(                           \
      "clang attribute push(__attribute__((target(\"avx512f,avx512bw,avx512dq,avx512vl,fma\"))), apply_to = function)")
#define ASYNCOPD_TARGET_END _Pragma("clang attribute pop")
#else
#define ASYNCOPD_TARGET_BEGIN_AVX2 _Pragma("GCC push_options") _Pragma("GCC target(\"avx2,fma\")")
#define ASYNCOPD_TARGET_BEGIN_AVX512 \
  _Pragma("GCC push_options")        \
  _Pragma("GCC target(\"avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512\")")
#define ASYNCOPD_TARGET_END _Pragma("GCC pop_options")
#endif
#endif

#if defined(__GNUC__)
#define ASYNCOPD_INLINE inline __attribute__((always_inline))
#else
#define ASYNCOPD_INLINE inline
#endif

extern "C" {
// Name of an instruction-set level that this build contains and this machine can run, or nullptr.
// Levels are numbered from 0 (the baseline), each better than the one before.
const char* asyncopd_cpu_isa_name(int isa);
}

namespace asyncopd {
// `isa`, or the best level of this machine for -1; negative if this machine does not run it.
int resolve_isa(int isa);
}  // namespace asyncopd
