// Runs every operator of a step, and the passes of sampling, with every kernel set that this
// machine supports, and compares the bits with those of the portable set. A separate program can be
// cross-compiled and run under an emulator (test_step_variants.py).
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "cpu/platform.h"
#include "cpu/step/attention_split.h"
#include "cpu/step/block_reader.h"
#include "cpu/step/kernel_sets.h"
#include "cpu/step/pack.h"
#include "step_inputs.h"

using namespace tgi::cpu::step;  // NOLINT
using tgi::cpu::RowPasses;
using tgi::cpu::RowStats;
using tgi::cpu::SampleKey;

namespace {

size_t scratch_of(const Kernels& kernels, const PackedMatrix& weight, Precision precision,
                  int64_t unit_strips) {
  return static_cast<size_t>(kernels.scratch_floats(weight, precision, unit_strips));
}

// Returns a product's rows if some tokens have adapters of an odd rank on some of its panels.
std::vector<float> adapted_rows(const Kernels& kernels, LinearParams linear) {
  constexpr int64_t kInner = 11, kUpRows = 3 * kInner;
  std::mt19937 random(3);
  const auto small = [&] {  // bf16 from 2^-4 to 2^-2, of either sign
    return static_cast<uint16_t>(0x3D80 + random() % 0x100 + (random() % 2 << 15));
  };
  std::vector<uint16_t> down(kInner * kColumns), up(kUpRows * kPanelRows);
  for (uint16_t& value : down) value = small();
  for (uint16_t& value : up) value = small();
  const std::vector<float> scales(kInner, 1.5f);
  std::vector<AdapterPanel> panels(kRows / kPanelRows, {up.data(), 0, 0});
  panels[0] = {up.data(), 0, kInner};
  panels[3] = {up.data() + kInner * kPanelRows, 4, 7};
  panels[5] = {up.data() + 2 * kInner * kPanelRows, 2, 1};
  const AdapterTerm term = {kInner, down.data(), scales.data(), panels.data()};
  const AdapterSpan spans[] = {{1, 2, &term}, {4, 9, &term}, {11, kTokens, &term}};
  std::vector<float> inner(kTokens * kInner, NAN), rows(kTokens * kRows, NAN);
  linear.adapter = {0, inner.data(), kInner};
  StepHeader step = {};
  step.num_tokens = kTokens;
  step.adapters = spans;
  step.num_adapters = 3;
  for (int member = 0; member < 3; ++member) kernels.shrink({linear}, step, member, 3);
  kernels.linear_rows({linear, rows.data(), kRows}, step, 0, 1);
  rows.insert(rows.end(), inner.begin() + 4 * kInner, inner.begin() + 9 * kInner);
  return rows;
}

// Returns rows with their columns in reverse order, as the input of a product, by one member and by
// several.
Bytes reordered(const Kernels& kernels, Precision precision, const std::vector<float>& x) {
  std::vector<int32_t> places;
  for (int64_t k = kColumns - 1; k >= 0; --k) {
    const int64_t block = k / kBlockColumns, column = k % kBlockColumns;
    places.push_back(static_cast<int32_t>(block * kernels.tile_tokens * kBlockColumns + column));
  }
  Bytes found;
  for (const int64_t tokens : {int64_t{2}, int64_t{5}, kTokens}) {
    StepHeader step = {};
    step.num_tokens = tokens;
    Input input(kernels, Precision::kFloat32, kColumns, tokens);
    kernels.pack({x.data(), kColumns, kColumns, input.view}, step, 0, 1);
    for (const int num_members : {1, 3}) {
      Input out(kernels, precision, kColumns, tokens);
      for (int member = 0; member < num_members; ++member) {
        kernels.reorder({input.view, false, places.data(), out.view}, step, member, num_members);
      }
      out.append_to(found);
    }
  }
  return found;
}

// A step of one prompt of 300 tokens, whose blocks are in order.
struct Text {
  explicit Text(int64_t num_blocks)
      : places(count_up(kContext)),
        blocks(count_up(num_blocks)),
        slots(places.begin(), places.end()) {
    step.num_tokens = kContext;
    step.num_sequences = 1;
    step.positions = step.rotary = places.data();
    step.num_groups = 1;
    step.slots = slots.data();
    step.query_start = starts;
    step.context_len = lengths;
    step.block_table = blocks.data();
    step.block_table_stride = num_blocks;
    step.attention_split = split;
  }
  const std::vector<int32_t> places, blocks;
  const std::vector<int64_t> slots;
  const int32_t starts[2] = {0, kContext}, lengths[1] = {kContext};
  AttentionPoint split[2];
  StepHeader step = {};
};

#include "step_variants_experts.h"
#include "step_variants_latents.h"
#include "step_variants_rows.h"
#include "step_variants_states.h"

// Returns the results of a product and related operators: norm, rows, sums, gates, logits.
Bytes products_of(const Kernels& kernels, const PackedMatrix& weight, Precision precision,
                  const std::vector<float>& x) {
  const std::vector<float> norm_weight(kColumns, 1.25f), bias(kRows, 0.5f);
  const std::vector<int32_t> all = count_up(kTokens);
  StepHeader step = {};
  step.num_tokens = step.num_rows = kTokens;
  step.rows = all.data();
  Input input(kernels, precision, kColumns, kTokens), packed(kernels, precision, kColumns, kTokens);
  kernels.norm({x.data(), norm_weight.data(), nullptr, kColumns, 1e-5f, true, input.view, 0}, step,
               0, 1);
  kernels.pack({x.data(), kColumns, kColumns, packed.view}, step, 0, 1);
  std::vector<float> scratch(scratch_of(kernels, weight, precision, 2));
  const LinearParams linear = {weight, bias.data(), input.view, 0, scratch.data(), 0};
  std::vector<float> rows(kTokens * kRows), sums(kTokens * kRows, 3.0f), logits(kTokens * kRows);
  kernels.linear_rows({linear, rows.data(), kRows}, step, 0, 1);
  kernels.linear_add({linear, 0.75f, sums.data()}, step, 0, 1);
  for (const float* each : {static_cast<const float*>(nullptr), bias.data()}) {
    kernels.norm_add(
        {rows.data(), norm_weight.data(), each, kRows, 90, 1e-5f, 0.5f, 1.25f, sums.data()}, step,
        0, 1);
  }
  kernels.logits({linear, logits.data(), kRows - 5, 0.5f, 20.0f}, step, 0, 1);
  Bytes found;
  append(found, adapted_rows(kernels, linear));
  const Bytes ordered = reordered(kernels, precision, x);
  const Bytes parts = parts_of(kernels, weight, precision, x);
  const Bytes experts = experts_of(kernels, weight, precision, x);
  for (const Bytes* each : {&ordered, &parts, &experts}) {
    found.insert(found.end(), each->begin(), each->end());
  }
  for (const auto kind :
       {tgi::MlpActivation::kSilu, tgi::MlpActivation::kGeluTanh, tgi::MlpActivation::kGelu,
        tgi::MlpActivation::kRelu, tgi::MlpActivation::kReluSquared, tgi::MlpActivation::kXielu}) {
    const MlpFunction function = {kind, 0.8f, 0.6f};
    const PackedMatrix gates = {weight.data, weight.format, kRows / 64 * 64, kColumns};
    Input gated(kernels, precision, gates.num_rows / 2, kTokens);
    Input multiplied(kernels, precision, kRows, kTokens);
    const LinearParams pairs = {gates, nullptr, input.view, 0, scratch.data(), 0};
    kernels.gate_up({pairs, function, gated.view, nullptr, 0}, step, 0, 1);
    kernels.act_mul({rows.data(), sums.data(), kRows, function, multiplied.view}, step, 0, 1);
    Input plain(kernels, precision, kRows, kTokens);
    kernels.up({linear, function, plain.view}, step, 0, 1);
    plain.append_to(found);
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
  int64_t head_dim;  // at most kRows / 3: one head each of queries, keys and values
  int64_t window;
};

// Runs qkv for a text of 300 tokens and attention over it; returns the bytes of the cache, the
// queries and the outputs. `weight` has kRows rows.
Bytes cache_and_attention(const Kernels& kernels, const PackedMatrix& weight,
                          const AttentionCase& c, const std::vector<float>& x) {
  const std::vector<float> ones(kColumns, 1.0f), norm(kStripRows, 0.75f);
  std::vector<float> cosines, sines;
  for (int64_t i = 0; i < kContext * kPanelRows; ++i) {
    cosines.push_back(static_cast<float>(i % 97 - 48) / 64.0f);
    sines.push_back(static_cast<float>(i % 89 - 44) / 64.0f);
  }
  KvLayerView kv = {nullptr, c.precision, 0,         (kContext + 15) / 16, 0, 16,
                    1,       c.head_dim,  c.head_dim};
  kv.block_stride = kv.layer_bytes();
  Bytes pool(static_cast<size_t>(kv.num_blocks * kv.block_stride + kPoolSlack), 0xFF);  // NaN
  Bytes query(static_cast<size_t>(kContext * kv.query_bytes() + kPoolSlack));
  kv.data = pool.data();
  Input input(kernels, Precision::kInt8, kColumns, kContext);
  Input out(kernels, Precision::kInt8, kStripRows, kContext);
  std::vector<float> plain(kContext * kStripRows);

  Text text(kv.num_blocks);
  StepHeader& step = text.step;
  split_attention(step, {{c.window}, {1, 1, kernels.attention_rows(c.precision)}}, 1, text.split);

  kernels.norm({x.data(), ones.data(), nullptr, kColumns, 1e-5f, false, input.view, 0}, step, 0, 1);
  QkvParams qkv = {};
  std::vector<float> scratch(scratch_of(kernels, weight, Precision::kInt8, 1));
  qkv.parts[0] = {weight, nullptr, input.view, 0, scratch.data(), 0};
  qkv.num_parts = 1;
  HeadParams& heads = qkv.heads;
  heads.num_heads = 1;
  heads.true_dim = c.head_dim;
  heads.rotary_strips = 1;
  heads.norms_values = c.window % 2 == 0;
  heads.cosines = cosines.data();
  heads.sines = sines.data();
  heads.q_norm = heads.k_norm = norm.data();
  heads.eps = 1e-5f;
  heads.q_scale = 0.25f;
  heads.q = query.data();
  heads.kv = kv;
  kernels.qkv(qkv, step, 0, 1);
  // The same queries again, computed from rows.
  std::vector<float> rows(kContext * kRows);
  kernels.linear_rows({qkv.parts[0], rows.data(), kRows}, step, 0, 1);
  Bytes found(query);
  kernels.head_rows({rows.data(), kRows, true, true, qkv.heads}, step, 0, 1);
  AttentionParams attention = {};
  attention.q = query.data();
  attention.kv = kv;
  attention.num_heads = 1;
  attention.true_dim = c.head_dim;
  attention.rule.window = c.window;
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

// Returns how often the passes over a row differ from the portable ones. Only masses may differ,
// because some processors round products before they are added and others do not.
int count_differences(const RowPasses& a, const RowPasses& b, std::mt19937& random) {
  std::normal_distribution<float> normal;
  int differences = 0;
  for (const int64_t n : {1, 15, 16, 17, 31, 33, 64, 1000, 5003}) {
    std::vector<float> row(n), scores_a(n), scores_b(n), kept_a(n), kept_b(n);
    for (float& x : row) x = random() % 8 == 0 ? -INFINITY : std::round(64 * normal(random)) / 16;
    row[random() % n] = 3.5f;
    const RowStats stats = b.stats(row.data(), n);
    differences += a.stats(row.data(), n).max != stats.max || !a.stats(row.data(), n).is_finite;
    for (const float bad : {NAN, -NAN, INFINITY}) {
      std::vector<float> broken = row;
      broken[random() % n] = bad;
      differences += a.stats(broken.data(), n).is_finite;
    }
    for (int64_t begin = 0; begin <= n; begin += 1 + n / 16) {
      for (const float bound : {0.0f, 2.5f, stats.max}) {
        for (const bool or_equal : {false, true}) {
          differences += a.find(row.data(), begin, n, bound, or_equal) !=
                         b.find(row.data(), begin, n, bound, or_equal);
        }
      }
    }
    a.scale(row.data(), n, stats.max, 0.7f, scores_a.data());
    b.scale(row.data(), n, stats.max, 0.7f, scores_b.data());
    differences += scores_a != scores_b;
    for (const float floor : {-FLT_MAX, -3.0f, -0.5f, 0.0f}) {
      const double mass = b.mass(scores_b.data(), n, 0.0f, floor);
      differences += !(std::fabs(a.mass(scores_a.data(), n, 0.0f, floor) - mass) <= 1e-6 * mass);
      const int64_t count = b.compact(scores_b.data(), n, floor, kept_b.data());
      differences += a.compact(scores_a.data(), n, floor, kept_a.data()) != count;
      differences += !std::equal(kept_a.begin(), kept_a.begin() + count, kept_b.begin());
      for (uint64_t seed = 0; seed < 8; ++seed) {
        const SampleKey key = {seed << 30, 3, seed * 1000};
        differences += a.race(scores_a.data(), 0, n, floor, key).index !=
                       b.race(scores_b.data(), 0, n, floor, key).index;
      }
    }
  }
  return differences;
}

// Returns the first set whose bf16 products round like this one's; their bits must be equal.
const Kernels& like(const std::vector<const Kernels*>& sets, const Kernels& kernels) {
  return **std::find_if(sets.begin(), sets.end(), [&](const Kernels* each) {
    return std::strcmp(each->arithmetic, kernels.arithmetic) == 0;
  });
}

// Compares the results of a kernel set with the expected ones; returns 1 if they differ.
int compare(const Kernels& variant, const Bytes& found, const Bytes& expected, const char* what,
            Precision precision) {
  if (found == expected) return 0;
  std::printf("%s: %s of precision %d differs\n", variant.name, what, static_cast<int>(precision));
  return 1;
}

}  // namespace

int main() {
  // As in a team: 2^x below 2^-126 is 0 in every set only if denormals are flushed.
  const tgi::cpu::FlushDenormals flush;
  const std::vector<const Kernels*>& sets = kernel_sets();  // the first is the portable one
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  std::vector<float> x(kContext * kColumns);
  for (float& value : x) value = normal(random);
  int num_failed = 0;
  for (size_t s = 1; s < sets.size(); ++s) {
    const int differences = count_differences(sets[s]->rows, sets[0]->rows, random);
    if (differences == 0) continue;
    ++num_failed;
    std::printf("%s: %d passes over a row differ\n", sets[s]->name, differences);
  }
  for (size_t s = 1; s < sets.size(); ++s) {
    num_failed +=
        compare(*sets[s], rows_of(*sets[s], x), rows_of(*sets[0], x), "rows", Precision::kFloat32);
    num_failed += compare(*sets[s], routes_of(*sets[s], x), routes_of(*sets[0], x), "a router",
                          Precision::kFloat32);
  }
  for (size_t s = 1; s < sets.size(); ++s) {
    num_failed += compare(*sets[s], channels_of(*sets[s], x), channels_of(*sets[0], x),
                          "a scan of channels", Precision::kFloat32);
  }
  for (const bool is_gated : {false, true}) {
    const Bytes expected = convolution_of(*sets[0], x, is_gated);
    for (size_t s = 1; s < sets.size(); ++s) {
      num_failed += compare(*sets[s], convolution_of(*sets[s], x, is_gated), expected,
                            "a convolution", Precision::kFloat32);
      num_failed += compare(*sets[s], scan_of(*sets[s], x, is_gated),
                            scan_of(*sets[0], x, is_gated), "a scan", Precision::kFloat32);
      num_failed += compare(*sets[s], rule_of(*sets[s], x, is_gated),
                            rule_of(*sets[0], x, is_gated), "a delta rule", Precision::kFloat32);
    }
  }
  for (const Precision precision : {Precision::kFloat32, Precision::kBF16}) {
    for (size_t s = 1; s < sets.size(); ++s) {
      const Kernels& other = precision == Precision::kBF16 ? like(sets, *sets[s]) : *sets[0];
      num_failed += compare(*sets[s], latents_and_attention(*sets[s], precision, x),
                            latents_and_attention(other, precision, x), "latents", precision);
    }
  }
  for (const Precision precision : {Precision::kFloat32, Precision::kBF16, Precision::kInt8}) {
    for (size_t s = 1; s < sets.size(); ++s) {
      num_failed += compare(*sets[s], stored_heads(*sets[s], precision, 40, x),
                            stored_heads(*sets[0], precision, 40, x), "heads", precision);
    }
  }
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
      const auto logits = expected.end() - kTokens * kRows * static_cast<int64_t>(sizeof(float));
      if (std::all_of(logits, logits + 256, [](uint8_t byte) { return byte == 0; })) {
        std::printf("%s: nothing was computed\n", info.name);
        ++num_failed;
      }
      for (size_t s = 1; s < sets.size(); ++s) {
        const Kernels& other = precision == Precision::kBF16 ? like(sets, *sets[s]) : *sets[0];
        if (&other == sets[s]) continue;
        const Bytes wanted =
            &other == sets[0] ? expected : products_of(other, weight, precision, x);
        num_failed += compare(*sets[s], products_of(*sets[s], weight, precision, x), wanted,
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
        const Kernels& other = c.precision == Precision::kBF16 ? like(sets, *sets[s]) : *sets[0];
        if (&other == sets[s]) continue;
        const Bytes wanted =
            &other == sets[0] ? expected : cache_and_attention(other, weight, c, x);
        num_failed += compare(*sets[s], cache_and_attention(*sets[s], weight, c, x), wanted,
                              "cache or attention", c.precision);
      }
    }
  }
  std::printf("%zu variants, %d failures\n", sets.size() - 1, num_failed);
  return num_failed == 0 && sets.size() > 1 ? 0 : 1;
}
