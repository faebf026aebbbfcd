// Runs every operator of a step with every set of kernels that this machine runs and compares their
// bits with the portable ones'. A program of its own, so that it can be cross-compiled and run
// under an emulator (test_step_variants.py).
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cpu/step/kernel_sets.h"
#include "cpu/step/pack.h"
#include "cpu/step/step.h"

using namespace tgi::cpu::step;  // NOLINT

namespace {

constexpr int64_t kColumns = 256, kRows = 96, kTokens = 9, kContext = 300;
using Bytes = std::vector<uint8_t>;

// Where a block of a file has fp16 numbers; bytes that are none there are codes, and any will do.
std::vector<int64_t> halves_of(const std::string& format) {
  if (format == "Q2_K") return {80, 82};
  if (format == "Q3_K") return {108};
  if (format == "Q6_K") return {208};
  return {0, 2};
}

// Rows of random codes with small, normal scales, as a file has them; of floats, normal ones.
Bytes random_rows(Format format, std::mt19937& random) {
  const FormatInfo& info = format_info(format);
  Bytes rows(kRows * file_row_bytes(format, kColumns));
  for (uint8_t& byte : rows) byte = static_cast<uint8_t>(random());
  for (size_t at = 0; at < rows.size(); at += static_cast<size_t>(info.block_bytes)) {
    if (!info.is_quantised) {  // the upper bytes of each: the exponent of a number below one
      const auto last = at + static_cast<size_t>(info.block_bytes) - 1;
      const auto sign = static_cast<uint8_t>(random() & 0x80);
      rows[last] = static_cast<uint8_t>(sign | (format == Format::kF16 ? 0x28 : 0x3C));
    } else if (format == Format::kMXFP4) {
      rows[at] = static_cast<uint8_t>(118 + random() % 4);
    } else {
      const auto scale = static_cast<uint16_t>(0x1000 + random() % 0x400);
      for (const int64_t offset : halves_of(info.name)) {
        std::memcpy(&rows[at + static_cast<size_t>(offset)], &scale, 2);
      }
    }
  }
  return rows;
}

std::vector<int32_t> count_up(int64_t size) {
  std::vector<int32_t> all(static_cast<size_t>(size));
  for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<int32_t>(i);
  return all;
}

// A tiled input of products, aligned as the kernels want it.
struct Input {
  Input(Precision precision, int64_t columns, int64_t tokens) {
    view = {nullptr, precision, columns};
    const int64_t tiles = (tokens + kTileTokens - 1) / kTileTokens;
    bytes.resize(static_cast<size_t>(tiles * view.tile_bytes() + 64));
    view.data = bytes.data() + (64 - reinterpret_cast<uintptr_t>(bytes.data()) % 64) % 64;
  }
  void append_to(Bytes& out) const {
    const auto size = bytes.size() - 64;
    out.insert(out.end(), view.data, view.data + size);
  }
  Bytes bytes;
  Activation view;
};

void append(Bytes& out, const std::vector<float>& values) {
  const auto* const bytes = reinterpret_cast<const uint8_t*>(values.data());
  out.insert(out.end(), bytes, bytes + values.size() * sizeof(float));
}

// What a product gives and is made of: norm, rows, sums, gates, logits.
Bytes products_of(const Kernels& kernels, const PackedMatrix& weight, Precision precision,
                  const std::vector<float>& x) {
  const std::vector<float> norm_weight(kColumns, 1.25f), bias(kRows, 0.5f);
  const std::vector<int32_t> all = count_up(kTokens);
  StepHeader step = {};
  step.num_tokens = step.num_rows = kTokens;
  step.rows = all.data();
  Input input(precision, kColumns, kTokens), packed(precision, kColumns, kTokens);
  kernels.norm({x.data(), norm_weight.data(), kColumns, 1e-5f, true, input.view, 0}, step, 0, 1);
  kernels.pack({x.data(), packed.view}, step, 0, 1);
  std::vector<float> scratch(2 * kStripRows * kColumns);
  const LinearParams linear = {weight, bias.data(), input.view, 0, scratch.data(), 0};
  std::vector<float> rows(kTokens * kRows), sums(kTokens * kRows, 3.0f), logits(kTokens * kRows);
  kernels.linear_rows({linear, rows.data(), kRows}, step, 0, 1);
  kernels.linear_add({linear, 0.75f, sums.data()}, step, 0, 1);
  kernels.norm_add({rows.data(), norm_weight.data(), kRows, 90, 1e-5f, 0.5f, sums.data()}, step, 0,
                   1);
  kernels.logits({linear, logits.data(), kRows - 5, 0.5f, 20.0f}, step, 0, 1);
  Bytes found;
  for (const MlpActivation activation : {MlpActivation::kSilu, MlpActivation::kGeluTanh}) {
    const PackedMatrix gates = {weight.data, weight.format, kRows / 64 * 64, kColumns};
    Input gated(precision, gates.num_rows / 2, kTokens), multiplied(precision, kRows, kTokens);
    const LinearParams pairs = {gates, nullptr, input.view, 0, scratch.data(), 0};
    kernels.gate_up({pairs, activation, gated.view}, step, 0, 1);
    kernels.act_mul({rows.data(), sums.data(), activation, multiplied.view}, step, 0, 1);
    gated.append_to(found);
    multiplied.append_to(found);
  }
  input.append_to(found);
  packed.append_to(found);
  append(found, rows);
  append(found, sums);
  append(found, logits);
  return found;
}

struct AttentionCase {
  Precision precision;
  int64_t head_dim;  // up to kRows / 3: one head of queries, of keys, of values
  int64_t window;
};

// What qkv writes for a text of 300 tokens, and what attention makes of it: the cache's bytes, the
// queries', the outputs'. weight: kRows rows.
Bytes cache_and_attention(const Kernels& kernels, const PackedMatrix& weight,
                          const AttentionCase& c, const std::vector<float>& x) {
  const std::vector<float> ones(kColumns, 1.0f), norm(kStripRows, 0.75f);
  std::vector<float> cosines, sines;
  for (int64_t i = 0; i < kContext * kPanelRows; ++i) {
    cosines.push_back(static_cast<float>(i % 97 - 48) / 64.0f);
    sines.push_back(static_cast<float>(i % 89 - 44) / 64.0f);
  }
  KvLayerView kv = {nullptr, c.precision, (kContext + 15) / 16, 0, 16, 1, c.head_dim};
  kv.block_stride = 2 * kv.sub_block_bytes();
  Bytes pool(static_cast<size_t>(kv.num_blocks * kv.block_stride + kPoolSlack), 0x7F);
  Bytes query(static_cast<size_t>(kContext * kv.query_bytes() + kPoolSlack));
  kv.data = pool.data();
  Input input(Precision::kInt8, kColumns, kContext), out(Precision::kInt8, kStripRows, kContext);
  std::vector<float> plain(kContext * kStripRows);

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

  kernels.norm({x.data(), ones.data(), kColumns, 1e-5f, false, input.view, 0}, step, 0, 1);
  QkvParams qkv = {};
  qkv.parts[0] = {weight, nullptr, input.view, 0, nullptr, 0};
  qkv.num_parts = 1;
  qkv.heads = {1,           c.head_dim, cosines.data(), sines.data(), norm.data(),
               norm.data(), 1e-5f,      0.25f,          query.data(), kv};
  kernels.qkv(qkv, step, 0, 1);
  // The same queries once more, from rows.
  std::vector<float> rows(kContext * kRows);
  kernels.linear_rows({qkv.parts[0], rows.data(), kRows}, step, 0, 1);
  Bytes found(query);
  kernels.head_rows({rows.data(), kRows, true, true, qkv.heads}, step, 0, 1);
  AttentionParams attention = {};
  attention.q = query.data();
  attention.kv = kv;
  attention.num_heads = 1;
  attention.true_dim = c.head_dim;
  attention.window = c.window;
  attention.out = out.view;
  if (c.head_dim % kBlockColumns != 0) {
    attention.rows = plain.data();
    attention.stride = kStripRows;
  }
  kernels.attention(attention, step, 0, 1);
  found.insert(found.end(), pool.begin(), pool.end());
  found.insert(found.end(), query.begin(), query.end());
  out.append_to(found);
  append(found, plain);
  return found;
}

// The instructions of BF16 add in an order of their own.
bool has_own_rounding(const Kernels& kernels) {
  return std::strcmp(kernels.name, "avx512") == 0 || std::strcmp(kernels.name, "i8mm") == 0;
}

// What a set of kernels gives against what the portable one does.
int compare(const Kernels& variant, const Bytes& found, const Bytes& expected, const char* what,
            Precision precision) {
  if (found == expected) return 0;
  std::printf("%s: %s of precision %d differs\n", variant.name, what, static_cast<int>(precision));
  return 1;
}

}  // namespace

int main() {
  const std::vector<const Kernels*>& sets = kernel_sets();  // the first is the portable one
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  std::vector<float> x(kContext * kColumns);
  for (float& value : x) value = normal(random);
  int num_failed = 0;
  for (int i = 0; i < kNumFormats; ++i) {
    const Format format = static_cast<Format>(i);
    const FormatInfo& info = format_info(format);
    if (!info.has_kernel) continue;
    const Bytes rows = random_rows(format, random);
    std::vector<const uint8_t*> pointers;
    for (int64_t r = 0; r < kRows; ++r) {
      pointers.push_back(rows.data() + r * file_row_bytes(format, kColumns));
    }
    Bytes packed(static_cast<size_t>(kRows / kPanelRows * panel_bytes(format, kColumns)));
    pack_panels(format, kColumns, pointers.data(), 0, kRows / kPanelRows, packed.data());
    const PackedMatrix weight = {packed.data(), format, kRows, kColumns};
    std::vector<Precision> precisions = {Precision::kFloat32};
    if (info.is_quantised) precisions.push_back(Precision::kInt8);
    if (format == Format::kBF16) precisions.push_back(Precision::kBF16);
    for (const Precision precision : precisions) {
      const Bytes expected = products_of(*sets[0], weight, precision, x);
      if (std::all_of(expected.end() - 512, expected.end() - 256,
                      [](uint8_t byte) { return byte == 0; })) {
        std::printf("%s: nothing was computed\n", info.name);
        ++num_failed;
      }
      for (size_t s = 1; s < sets.size(); ++s) {
        if (precision == Precision::kBF16 && has_own_rounding(*sets[s])) continue;
        num_failed += compare(*sets[s], products_of(*sets[s], weight, precision, x), expected,
                              info.name, precision);
      }
    }
    if (format != Format::kQ8_0) continue;
    for (const AttentionCase& c :
         {AttentionCase{Precision::kInt8, 32, INT64_MAX}, AttentionCase{Precision::kInt8, 32, 40},
          AttentionCase{Precision::kBF16, 32, INT64_MAX}, AttentionCase{Precision::kBF16, 20, 40},
          AttentionCase{Precision::kFloat32, 32, 40},
          AttentionCase{Precision::kFloat32, 6, INT64_MAX}}) {
      const Bytes expected = cache_and_attention(*sets[0], weight, c, x);
      for (size_t s = 1; s < sets.size(); ++s) {
        if (c.precision == Precision::kBF16 && has_own_rounding(*sets[s])) continue;
        num_failed += compare(*sets[s], cache_and_attention(*sets[s], weight, c, x), expected,
                              "cache or attention", c.precision);
      }
    }
  }
  std::printf("%zu variants, %d failures\n", sets.size() - 1, num_failed);
  return num_failed == 0 && sets.size() > 1 ? 0 : 1;
}
