// Which instruction set's kernels run, and how a step's attention is shared out.
#include "step.h"

#include "../isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace tgi::cpu::step {

extern const Kernels kPortableKernels;
#if defined(__x86_64__)
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx512VnniKernels;
extern const Kernels kAvxVnniKernels;
extern const Kernels kAvx2Kernels;

bool has_avx_vnni() {  // __builtin_cpu_supports of GCC 12 does not know it
  unsigned a = 7, b = 0, c = 1, d = 0;
  asm volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  return (a >> 4 & 1) != 0;
}
#endif
#if defined(__aarch64__)
extern const Kernels kNeonKernels;
extern const Kernels kI8mmKernels;
#endif

namespace {

// Measured with one sequence and with 16 (bench/README.md): on Zen 4 the first level loses 11 % and
// more, on Zen 5 the second does. Others are taken for Zen 4's kind: Intel's cores have 10 to 16
// misses in flight in the first level, 48 in the second.
bool is_zen5_or_later() {
#if defined(__x86_64__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__builtin_cpu_is("amd") && __get_cpuid(1, &a, &b, &c, &d)) {
    const unsigned base = a >> 8 & 0xF, extended = a >> 20 & 0xFF;
    return base == 0xF && base + extended >= 0x1A;
  }
#endif
  return false;
}

}  // namespace

const bool kStreamsIntoL1 = is_zen5_or_later();

const Kernels& kernels() {
#if defined(__x86_64__)
  static const bool has_vnni = __builtin_cpu_supports("avx512vnni");
  static const bool has_bf16 = __builtin_cpu_supports("avx512bf16");
  static const bool has_small_vnni = has_avx_vnni();
  if (isa() == Isa::kAvx512 && has_vnni) return has_bf16 ? kAvx512Kernels : kAvx512VnniKernels;
  if (isa() != Isa::kPortable && __builtin_cpu_supports("f16c")) {
    return has_small_vnni ? kAvxVnniKernels : kAvx2Kernels;
  }
#endif
#if defined(__aarch64__) && defined(__linux__)
  // Bits of the kernel's asm/hwcap.h, which old headers lack.
  static const bool has_dot = (getauxval(AT_HWCAP) >> 20 & 1) != 0;
  static const bool has_i8mm = (getauxval(AT_HWCAP2) >> 13 & 3) == 3;  // and BF16
  if (has_dot) return has_i8mm ? kI8mmKernels : kNeonKernels;
#endif
  return kPortableKernels;
}

namespace {

// Calls visit(sequence, head, tile, cost, chunks) for every row tile, in the order of work.
template <class Visit>
void each_tile(const StepHeader& step, int64_t group, int64_t num_kv_heads, const Visit& visit) {
  for (int64_t s = 0; s < step.num_sequences; ++s) {
    const int64_t length = step.query_start[s + 1] - step.query_start[s];
    const int64_t before = step.context_len[s] - length;
    const int64_t rows = length * group;
    for (int64_t head = 0; head < num_kv_heads; ++head) {
      for (int64_t first = 0; first < rows; first += kAttentionRows) {
        const int64_t last = (first + kAttentionRows < rows ? first + kAttentionRows : rows) - 1;
        visit(s, head, first / kAttentionRows, before + last / group + 1);
      }
    }
  }
}

constexpr int64_t kTileOverhead = 64;  // tokens of context that a tile's set-up costs

}  // namespace

void split_attention(const StepHeader& step, int64_t num_heads, int64_t num_kv_heads,
                     int num_members, AttentionPoint* split) {
  const int64_t group = num_heads / num_kv_heads;
  int64_t total = 0;
  each_tile(step, group, num_kv_heads,
            [&](int64_t, int64_t, int64_t, int64_t seen) { total += seen + kTileOverhead; });
  int64_t done = 0;
  int next = 0;
  // A member's part begins at the first chunk whose start is at or past its share.
  each_tile(step, group, num_kv_heads, [&](int64_t s, int64_t head, int64_t tile, int64_t seen) {
    for (int64_t chunk = 0; chunk * kChunkTokens < seen; ++chunk) {
      const int64_t size =
          seen - chunk * kChunkTokens < kChunkTokens ? seen - chunk * kChunkTokens : kChunkTokens;
      const int64_t middle = done + (chunk == 0 ? size + kTileOverhead : size) / 2;
      while (next < num_members && (next == 0 || middle * num_members >= total * next)) {
        split[next++] = {static_cast<int32_t>(s), static_cast<int32_t>(head),
                         static_cast<int32_t>(tile), static_cast<int32_t>(chunk)};
      }
      done += chunk == 0 ? size + kTileOverhead : size;
    }
  });
  const AttentionPoint end = {static_cast<int32_t>(step.num_sequences), 0, 0, 0};
  while (next <= num_members) split[next++] = end;
}

}  // namespace tgi::cpu::step
