// The QKV product with bias, norm of heads, RoPE, KV write and the scaled query in its epilogue;
// and the norms. Included by the step_<isa>.cpp files only.
#pragma once

#include <cmath>

#include "linear_kernels.h"
#include "pack.h"

namespace tgi::cpu::step {
namespace {

// One head of one token: strips of 16 rotated pairs, first elements in panel 0, second in panel 1.
template <class S>
struct HeadRows {
  typename S::F first[kMaxUnitStrips];
  typename S::F second[kMaxUnitStrips];
};

template <class S>
inline void normalise_head(HeadRows<S>& head, int64_t num_strips, const float* weight, float eps) {
  auto squares = S::zero();
  for (int64_t i = 0; i < num_strips; ++i) {
    squares = S::fma(head.first[i], head.first[i], squares);
    squares = S::fma(head.second[i], head.second[i], squares);
  }
  const float mean = S::reduce_add(squares) / static_cast<float>(num_strips * kStripRows);
  const auto factor = S::set1(1.0f / std::sqrt(mean + eps));
  for (int64_t i = 0; i < num_strips; ++i) {
    head.first[i] = S::mul(S::mul(head.first[i], factor), S::load(weight + 32 * i));
    head.second[i] = S::mul(S::mul(head.second[i], factor), S::load(weight + 32 * i + 16));
  }
}

template <class S>
inline void rotate(typename S::F& first, typename S::F& second, const float* cosines,
                   const float* sines) {
  const auto c = S::load(cosines), s = S::load(sines);
  const auto rotated = S::sub(S::mul(first, c), S::mul(second, s));
  second = S::fma(second, c, S::mul(first, s));
  first = rotated;
}

// Thirty-two values as codes of at most `most`, and the scale that they stand for. Below 1e-30 all
// are zero. NaN or infinity give a scale that is not finite.
template <class S>
struct Codes {
  typename S::I first, second;
  float scale;
};

template <class S>
inline Codes<S> quantise_strip(typename S::F first, typename S::F second, float most) {
  const int32_t bits = S::reduce_imax(S::imax(S::abs_bits(first), S::abs_bits(second)));
  float largest;
  std::memcpy(&largest, &bits, 4);
  const bool is_tiny = largest < 1e-30f;
  const auto inverse = S::set1(is_tiny ? 0.0f : most / largest);
  return {S::round(S::mul(first, inverse)), S::round(S::mul(second, inverse)),
          is_tiny ? 0.0f : largest / most};
}

template <class S>
inline void store_int8_query(typename S::F first, typename S::F second, uint8_t* strip) {
  const auto codes = quantise_strip<S>(first, second, 127.0f * 256.0f);
  auto* high = reinterpret_cast<int8_t*>(strip);
  const auto half = S::iset1(128);  // the low byte is signed, too
  S::store_i8(high, S::ishr(S::iadd(codes.first, half), 8));
  S::store_i8(high + 16, S::ishr(S::iadd(codes.second, half), 8));
  S::store_i8(high + 32, codes.first);
  S::store_i8(high + 48, codes.second);
  // Unsigned, as NaN gives any integer.
  const auto sum = static_cast<uint32_t>(S::reduce_iadd(S::iadd(codes.first, codes.second)));
  const uint32_t start = 0u - 128u * sum;
  std::memcpy(strip + kInt8QueryScale, &codes.scale, 4);
  std::memcpy(strip + kInt8QueryStart, &start, 4);
}

// Strip `strip` of a head's query; float32 keeps the pairs' halves apart as the keys do.
template <class S>
inline void store_query(const QkvParams& p, int64_t token, int64_t head, int64_t strip,
                        typename S::F first, typename S::F second) {
  const int64_t offset = (token * p.num_heads + head) * p.head_dim + strip * kStripRows;
  first = S::mul(first, S::set1(p.q_scale));
  second = S::mul(second, S::set1(p.q_scale));
  if (p.kv.precision == Precision::kInt8) {
    auto* const query = static_cast<uint8_t*>(p.q) + offset / kStripRows * kInt8QueryStrip;
    store_int8_query<S>(first, second, query);
  } else if (p.kv.precision == Precision::kBF16) {
    S::istore(static_cast<uint16_t*>(p.q) + offset, S::pair_bf16(first, second));
  } else {
    S::store(static_cast<float*>(p.q) + offset, first);
    S::store(static_cast<float*>(p.q) + offset + 16, second);
  }
}

// Writes the codes of a strip of keys or values; returns its scale.
template <class S>
inline float store_int8(typename S::F first, typename S::F second, void* out) {
  const auto codes = quantise_strip<S>(first, second, 127.0f);
  S::store_i8(static_cast<int8_t*>(out), codes.first);
  S::store_i8(static_cast<int8_t*>(out) + 16, codes.second);
  return codes.scale;
}

inline void store_scale(uint8_t* block, int64_t head_dim, int64_t strip, int64_t slot,
                        float scale) {
  const uint16_t half = float_to_half(scale);
  std::memcpy(block + int8_scales(head_dim, strip) + slot % 16 * 2, &half, 2);
}

template <class S>
inline void store_key(const KvLayerView& kv, int64_t head, int64_t slot, int64_t strip,
                      typename S::F first, typename S::F second) {
  uint8_t* const block = kv.sub_block(head, slot / kv.block_size, slot % kv.block_size);
  uint8_t* keys = block + slot % 16 * 4;
  alignas(64) int32_t lanes[32];
  if (kv.precision == Precision::kInt8) {
    store_scale(block, kv.head_dim, strip, slot, store_int8<S>(first, second, lanes));
    keys += strip * 8 * 64;
    for (int64_t i = 0; i < 8; ++i) {
      const uint32_t quad = static_cast<uint32_t>(lanes[i]) ^ 0x80808080u;  // code + 128
      std::memcpy(keys + 64 * i, &quad, 4);
    }
  } else if (kv.precision == Precision::kBF16) {
    S::istore(lanes, S::pair_bf16(first, second));
    keys += strip * 16 * 64;
    for (int64_t i = 0; i < 16; ++i) std::memcpy(keys + 64 * i, lanes + i, 4);
  } else {
    S::store(reinterpret_cast<float*>(lanes), first);
    S::store(reinterpret_cast<float*>(lanes) + 16, second);
    keys += strip * 32 * 64;
    for (int64_t i = 0; i < 32; ++i) std::memcpy(keys + 64 * i, lanes + i, 4);
  }
}

template <class S>
inline void store_value(const KvLayerView& kv, int64_t head, int64_t slot, int64_t strip,
                        typename S::F first, typename S::F second) {
  uint8_t* block =
      kv.sub_block(head, slot / kv.block_size, slot % kv.block_size) + kv.values_after_keys();
  const int64_t offset = slot % 16, dim = strip * kStripRows;
  if (kv.precision == Precision::kInt8) {
    alignas(64) int8_t lanes[32];
    store_scale(block, kv.head_dim, strip, slot, store_int8<S>(first, second, lanes));
    auto* out =
        reinterpret_cast<int8_t*>(block) + (offset / 4 * kv.head_dim + dim) * 4 + offset % 4;
    for (int64_t i = 0; i < 32; ++i) out[4 * i] = lanes[i];
  } else if (kv.precision == Precision::kBF16) {
    // The other half of each lane is the other token of the pair, which this member writes, too.
    const int32_t half = offset % 2 == 0 ? 0xFFFF : static_cast<int32_t>(0xFFFF0000u);
    const auto mine = S::iset1(half), others = S::iset1(~half);
    uint8_t* const out = block + (offset / 2 * kv.head_dim + dim) * 4;
    const typename S::I pairs[2] = {S::pair_bf16(first, first), S::pair_bf16(second, second)};
    for (int64_t i = 0; i < 2; ++i) {
      const auto kept = S::iand(S::iload(out + 64 * i), others);
      S::istore(out + 64 * i, S::ior(kept, S::iand(pairs[i], mine)));
    }
  } else {
    float* out = reinterpret_cast<float*>(block) + offset * kv.head_dim + dim;
    S::store(out, first);
    S::store(out + 16, second);
  }
}

template <class S>
inline void finish_head(const QkvParams& p, const StepHeader& step, int64_t token, int64_t head,
                        int64_t strip, int64_t num_strips, HeadRows<S>& rows) {
  const int64_t num_kv_heads = p.kv.num_heads;
  const int64_t slot = step.slots[token];
  if (head >= p.num_heads + num_kv_heads) {
    const int64_t kv_head = head - p.num_heads - num_kv_heads;
    for (int64_t i = 0; i < num_strips; ++i) {
      store_value<S>(p.kv, kv_head, slot, strip + i, rows.first[i], rows.second[i]);
    }
    return;
  }
  const bool is_query = head < p.num_heads;
  if (p.q_norm != nullptr)
    normalise_head<S>(rows, num_strips, is_query ? p.q_norm : p.k_norm, p.eps);
  const int64_t angles = step.positions[token] * (p.head_dim / 2);
  for (int64_t i = 0; i < num_strips; ++i) {
    const int64_t at = angles + (strip + i) * 16;
    rotate<S>(rows.first[i], rows.second[i], p.cosines + at, p.sines + at);
    if (is_query) {
      store_query<S>(p, token, head, strip + i, rows.first[i], rows.second[i]);
    } else {
      store_key<S>(p.kv, head - p.num_heads, slot, strip + i, rows.first[i], rows.second[i]);
    }
  }
}

// Where a member's share of the units begins. Sequences that decode write keys a few bytes a line,
// so that a unit of keys or values takes half as long again; tokens of a prompt write to the same
// lines.
inline int64_t qkv_share(const StepHeader& step, int64_t query_units, int64_t num_units, int member,
                         int num_members) {
  const int64_t query_cost = 2, cost = step.num_tokens == step.num_sequences ? 3 : 2;
  const int64_t queries = query_cost * query_units;
  const int64_t before = (queries + cost * (num_units - query_units)) * member / num_members;
  if (before <= queries) return (before + query_cost / 2) / query_cost;
  return query_units + (before - queries + cost / 2) / cost;
}

// A unit is a strip, or a whole head where heads are normalised.
template <class S>
void qkv(const QkvParams& p, const StepHeader& step, int member, int num_members) {
  const int64_t head_strips = p.head_dim / kStripRows;
  const int64_t unit_strips = p.q_norm == nullptr ? 1 : head_strips;
  int64_t num_units = 0;
  for (int32_t i = 0; i < p.num_parts; ++i)
    num_units += p.parts[i].weight.num_strips() / unit_strips;
  const int64_t query_units = p.num_heads * head_strips / unit_strips;
  const Range all = {qkv_share(step, query_units, num_units, member, num_members),
                     qkv_share(step, query_units, num_units, member + 1, num_members)};
  int64_t before = 0;
  for (int32_t i = 0; i < p.num_parts; ++i) {
    const LinearParams& part = p.parts[i];
    const int64_t part_units = part.weight.num_strips() / unit_strips;
    Range units = {all.begin - before, all.end - before};
    units.begin = units.begin > 0 ? units.begin : 0;
    units.end = units.end < part_units ? units.end : part_units;
    if (units.begin < units.end) {
      run_linear<S>(part, step.num_tokens, units, unit_strips, member,
                    [&](int64_t unit, int64_t token, int64_t count, const float* out) {
                      const int64_t head = (before + unit) * unit_strips / head_strips;
                      const int64_t strip = (before + unit) * unit_strips % head_strips;
                      for (int64_t t = 0; t < count; ++t) {
                        HeadRows<S> rows;
                        for (int64_t s = 0; s < unit_strips; ++s) {
                          const int64_t row = (unit * unit_strips + s) * kStripRows;
                          const float* values = out + s * kTileOutputs + 32 * t;
                          rows.first[s] = biased<S>(part.bias, row, values);
                          rows.second[s] = biased<S>(part.bias, row + 16, values + 16);
                        }
                        finish_head<S>(p, step, token + t, head, strip, unit_strips, rows);
                      }
                    });
    }
    before += part_units;
  }
}

// `Count` blocks of a normalised row, from column k on.
template <class S, int Count>
inline void write_norm(const NormParams& p, const float* x, typename S::F factor, int64_t k,
                       int64_t row, const Activation& out) {
  typename S::F a[Count], b[Count];
  BlockSlot to[Count];
  TGI_UNROLL(6)
  for (int i = 0; i < Count; ++i) {
    const int64_t at = k + i * kBlockColumns;
    a[i] = S::mul(S::mul(S::load(x + at), factor), S::load(p.weight + at));
    b[i] = S::mul(S::mul(S::load(x + at + 16), factor), S::load(p.weight + at + 16));
    to[i] = {out.block(row, at / kBlockColumns), row % kTileTokens};
  }
  write_blocks<S, Count>(out.precision, a, b, to);
}

// RMS norm of a row into its slot of the next product's input.
template <class S>
inline void norm_row(const NormParams& p, const float* x, int64_t row, const Activation& out) {
  const int64_t width = p.out.num_columns;
  auto even = S::zero(), odd = S::zero();
  for (int64_t k = 0; k < width; k += 32) {
    const auto a = S::load(x + k), b = S::load(x + k + 16);
    even = S::fma(a, a, even);
    odd = S::fma(b, b, odd);
  }
  const float mean = S::reduce_add(S::add(even, odd)) / static_cast<float>(width);
  const auto factor = S::set1(1.0f / std::sqrt(mean + p.eps));
  constexpr int64_t kColumnsAtOnce = kBlocksAtOnce * kBlockColumns;
  int64_t k = 0;
  for (; k + kColumnsAtOnce <= width; k += kColumnsAtOnce) {
    write_norm<S, kBlocksAtOnce>(p, x, factor, k, row, out);
  }
  for (; k < width; k += kBlockColumns) write_norm<S, 1>(p, x, factor, k, row, out);
}

// Rows are shared out in whole tiles: two members never write to one cache line.
template <class S>
void norm(const NormParams& p, const StepHeader& step, int member, int num_members) {
  const int64_t num_rows = p.for_logits ? step.num_rows : step.num_tokens;
  Range rows = split(num_rows, member, num_members, kTileTokens);
  Activation out = p.out;
  if (num_rows <= kPrivateTokens) {
    rows = {0, num_rows};
    out.data += member * p.private_bytes;
  }
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const int64_t token = p.for_logits ? step.rows[row] : row;
    norm_row<S>(p, p.x + token * p.out.num_columns, row, out);
  }
}

}  // namespace
}  // namespace tgi::cpu::step
