// Which instruction set the kernels use: chosen once by cpuid, or forced (TGI_ISA, tests). One
// choice for all shapes, because variants differ in the last bits.
#pragma once

namespace tgi::cpu {

enum class Isa : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

// The best that this machine runs, or what the environment variable TGI_ISA names, if it runs that.
Isa isa();

// Whether this machine runs it (AVX2 means with FMA; AVX-512 means F, BW, DQ and VL).
bool isa_is_supported(Isa isa);

// Uses `isa` from now on; the caller has checked that it is supported. Not during a run.
void force_isa(Isa isa);

// "portable", "avx2" or "avx512".
const char* isa_name(Isa isa);

}  // namespace tgi::cpu

// The variant of a kernel for the instruction set in use: TGI_VARIANT(rms_norm)(params, begin,
// end). A kernel is declared in each of the namespaces tgi::cpu::portable, avx2 and avx512 (see
// simd.h).
#if defined(__x86_64__)
#define TGI_VARIANT(name)                                                   \
  (::tgi::cpu::isa() == ::tgi::cpu::Isa::kAvx512 ? ::tgi::cpu::avx512::name \
   : ::tgi::cpu::isa() == ::tgi::cpu::Isa::kAvx2 ? ::tgi::cpu::avx2::name   \
                                                 : ::tgi::cpu::portable::name)
#else
#define TGI_VARIANT(name) (::tgi::cpu::portable::name)
#endif
