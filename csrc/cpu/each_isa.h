// Compiles ASYNCOPD_KERNEL, the name of a *.inl file, once per instruction set, and lists the results. The file defines
// a function `select` that returns the body to run; kSelect[isa] is that function for a level of isa.h. Included inside
// namespace asyncopd { namespace { .. } }; no include guard, since it is meant for several places.

namespace baseline {
#include ASYNCOPD_KERNEL
}

#ifdef ASYNCOPD_X86_DISPATCH
ASYNCOPD_TARGET_BEGIN_AVX2
namespace avx2 {
#include ASYNCOPD_KERNEL
}
ASYNCOPD_TARGET_END

ASYNCOPD_TARGET_BEGIN_AVX512
namespace avx512 {
#include ASYNCOPD_KERNEL
}
ASYNCOPD_TARGET_END
#endif

constexpr decltype(&baseline::select) kSelect[] = {
    baseline::select,
#ifdef ASYNCOPD_X86_DISPATCH
    avx2::select,
    avx512::select,
#endif
};
