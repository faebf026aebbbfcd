// Runs norm, products, the write of the KV cache and attention with every set of kernels that this
// build has and compares their bits with the portable ones'. A program of its own, so that it can
// be cross-compiled and run under an emulator (test_step_variants.py).
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "cpu/step/block_reader.h"
#include "cpu/step/pack.h"
#include "cpu/step/step.h"

namespace tgi::cpu::step {
extern const Kernels kPortableKernels;
#if defined(__aarch64__)
extern const Kernels kNeonKernels;
extern const Kernels kI8mmKernels;
#elif defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx512VnniKernels;
extern const Kernels kAvxVnniKernels;
bool has_avx_vnni();
#endif
}  // namespace tgi::cpu::step

using namespace tgi::cpu::step;  // NOLINT

namespace {

constexpr int64_t kColumns = 256, kRows = 96, kTokens = 9;

// Rows of random blocks, each drawn again until its largest weight is from 2^-8 to 1: so scales
// are sound in every format, wherever it has them.
std::vector<uint8_t> random_rows(Format format, std::mt19937& random) {
  const FormatInfo& info = format_info(format);
  std::vector<uint8_t> rows(kRows * file_row_bytes(format, kColumns));
  std::vector<float> weights(info.block_columns);
  for (size_t at = 0; at < rows.size(); at += info.block_bytes) {
    float largest = 0.0f;
    while (!(largest > 0x1p-8f && largest < 1.0f)) {
      for (int64_t i = 0; i < info.block_bytes; ++i) rows[at + i] = static_cast<uint8_t>(random());
      decode_row(format, &rows[at], info.block_columns, weights.data());
      largest = 0.0f;
      for (const float weight : weights)
        largest = std::max(largest, std::isfinite(weight) ? std::fabs(weight) : INFINITY);
    }
  }
  return rows;
}

std::vector<int32_t> count_up(int32_t size) {
  std::vector<int32_t> all(size);
  for (int32_t i = 0; i < size; ++i) all[i] = i;
  return all;
}

std::vector<float> logits_of(const Kernels& kernels, const PackedMatrix& weight,
                             Precision precision, const std::vector<float>& x) {
  const std::vector<float> norm_weight(kColumns, 1.25f);
  Activation input = {nullptr, precision, kColumns};
  std::vector<uint8_t> tiles(4 * input.tile_bytes() + 64);
  input.data = tiles.data() + (64 - reinterpret_cast<uintptr_t>(tiles.data()) % 64) % 64;
  const std::vector<int32_t> all = count_up(kTokens);
  StepHeader step = {};
  step.num_tokens = step.num_rows = kTokens;
  step.rows = all.data();
  kernels.norm({x.data(), norm_weight.data(), 1e-5f, true, input, 0}, step, 0, 1);
  std::vector<float> scratch(kStripRows * kColumns), out(kTokens * kRows);
  const LinearParams linear = {weight, nullptr, input, 0, scratch.data(), 0};
  kernels.logits({linear, out.data(), kRows, 0}, step, 0, 1);
  return out;
}

constexpr int64_t kContext = 300, kHeadDim = kRows / 3;  // a head of queries, of keys, of values

// What qkv writes for a text of 300 tokens, and what attention makes of it: the cache's bytes, the
// queries', the outputs'. weight: kRows rows.
std::vector<uint8_t> cache_and_attention(const Kernels& kernels, const PackedMatrix& weight,
                                         Precision kv_precision, const std::vector<float>& x) {
  const std::vector<float> ones(kColumns, 1.0f);
  std::vector<float> cosines, sines;
  for (int64_t i = 0; i < kContext * kHeadDim / 2; ++i) {
    cosines.push_back(static_cast<float>(i % 97 - 48) / 64.0f);
    sines.push_back(static_cast<float>(i % 89 - 44) / 64.0f);
  }
  KvLayerView kv = {nullptr, kv_precision, (kContext + 15) / 16, 0, 16, 1, kHeadDim};
  kv.block_stride = 2 * kv.sub_block_bytes();
  const int64_t kv_bytes = kv.num_blocks * kv.block_stride;
  const int64_t query_bytes = kContext * kv.query_bytes();
  Activation input = {nullptr, Precision::kInt8, kColumns},
             out = {nullptr, Precision::kInt8, kHeadDim};
  const int64_t tiles = (kContext + kTileTokens - 1) / kTileTokens;
  std::vector<uint8_t> input_bytes(tiles * input.tile_bytes()), out_bytes(tiles * out.tile_bytes());
  std::vector<uint8_t> pool(kv_bytes, 0x7F), query(query_bytes);
  input.data = input_bytes.data();
  out.data = out_bytes.data();
  kv.data = pool.data();

  const std::vector<int32_t> places = count_up(kContext), blocks = count_up(kv.num_blocks);
  const std::vector<int64_t> slots(places.begin(), places.end());
  const int32_t starts[] = {0, kContext}, lengths[] = {kContext};
  AttentionPoint split[2];
  StepHeader step = {};
  step.num_tokens = kContext;
  step.num_sequences = 1;
  step.positions = places.data();
  step.slots = slots.data();
  step.query_start = starts;
  step.context_len = lengths;
  step.block_table = blocks.data();
  step.block_table_stride = kv.num_blocks;
  split_attention(step, 1, 1, 1, split);
  step.attention_split = split;

  kernels.norm({x.data(), ones.data(), 1e-5f, false, input, 0}, step, 0, 1);
  QkvParams qkv = {};
  qkv.parts[0] = {weight, nullptr, input, 0, nullptr, 0};
  qkv.num_parts = 1;
  qkv.num_heads = 1;
  qkv.head_dim = kHeadDim;
  qkv.cosines = cosines.data();
  qkv.sines = sines.data();
  qkv.q_scale = 0.25f;
  qkv.q = query.data();
  qkv.kv = kv;
  kernels.qkv(qkv, step, 0, 1);
  kernels.attention({query.data(), kv, 1, out, nullptr}, step, 0, 1);
  pool.insert(pool.end(), query.begin(), query.end());
  pool.insert(pool.end(), out_bytes.begin(), out_bytes.end());
  return pool;
}

// The instructions of BF16 add in an order of their own.
bool has_own_rounding(const Kernels& kernels) {
  return std::strcmp(kernels.name, "avx512") == 0 || std::strcmp(kernels.name, "i8mm") == 0;
}

}  // namespace

int main() {
  std::vector<const Kernels*> variants;
#if defined(__aarch64__)
  variants = {&kNeonKernels, &kI8mmKernels};
#elif defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) variants.push_back(&kAvx2Kernels);
  if (has_avx_vnni()) variants.push_back(&kAvxVnniKernels);
  if (__builtin_cpu_supports("avx512vnni")) variants.push_back(&kAvx512VnniKernels);
  if (__builtin_cpu_supports("avx512bf16")) variants.push_back(&kAvx512Kernels);
#endif
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  std::vector<float> x(kContext * kColumns);
  for (float& value : x) value = normal(random);
  int num_failed = 0;
  for (int i = 0; i < kNumFormats; ++i) {
    const Format format = static_cast<Format>(i);
    if (!format_info(format).has_kernel) continue;
    const std::vector<uint8_t> rows = random_rows(format, random);
    std::vector<const uint8_t*> pointers;
    for (int64_t r = 0; r < kRows; ++r) {
      pointers.push_back(rows.data() + r * file_row_bytes(format, kColumns));
    }
    std::vector<uint8_t> packed(kRows / kPanelRows * panel_bytes(format, kColumns));
    pack_panels(format, kColumns, pointers.data(), 0, kRows / kPanelRows, packed.data());
    const PackedMatrix weight = {packed.data(), format, kRows, kColumns};
    const Precision fast = is_quantised(format)      ? Precision::kInt8
                           : format == Format::kBF16 ? Precision::kBF16
                                                     : Precision::kFloat32;
    for (const Precision precision : {fast, Precision::kFloat32}) {
      const std::vector<float> expected = logits_of(kPortableKernels, weight, precision, x);
      if (expected.back() == 0.0f || expected.back() != expected.back()) ++num_failed;
      for (const Kernels* variant : variants) {
        if (precision == Precision::kBF16 && has_own_rounding(*variant)) continue;
        const std::vector<float> found = logits_of(*variant, weight, precision, x);
        if (std::memcmp(found.data(), expected.data(), found.size() * sizeof(float)) == 0) continue;
        ++num_failed;
        std::printf("%s: %s, precision %d differs\n", variant->name, format_info(format).name,
                    static_cast<int>(precision));
      }
    }
    if (format != Format::kQ8_0) continue;
    for (const Precision kv : {Precision::kInt8, Precision::kBF16, Precision::kFloat32}) {
      const std::vector<uint8_t> expected = cache_and_attention(kPortableKernels, weight, kv, x);
      for (const Kernels* variant : variants) {
        if (kv == Precision::kBF16 && has_own_rounding(*variant)) continue;
        if (cache_and_attention(*variant, weight, kv, x) == expected) continue;
        ++num_failed;
        std::printf("%s: cache or attention of precision %d differs\n", variant->name,
                    static_cast<int>(kv));
      }
    }
  }
  std::printf("%zu variants, %d failures\n", variants.size(), num_failed);
  return num_failed == 0 && !variants.empty() ? 0 : 1;
}
