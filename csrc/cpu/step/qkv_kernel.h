// The QKV product with bias, norm of heads, RoPE, KV write and the scaled query in its epilogue;
// and the norms. Included by the step_<isa>.cpp files only.
#pragma once

#include <cmath>

#include "linear_kernels.h"

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

// Strip `strip` of a head's query; float32 keeps the pairs' halves apart as the keys do.
template <class S>
inline void store_query(const QkvParams& p, int64_t token, int64_t head, int64_t strip,
                        typename S::F first, typename S::F second) {
  const int64_t offset = (token * p.num_heads + head) * p.head_dim + strip * kStripRows;
  first = S::mul(first, S::set1(p.q_scale));
  second = S::mul(second, S::set1(p.q_scale));
  if (p.kv.precision == Precision::kBF16) {
    S::istore(static_cast<uint16_t*>(p.q) + offset, S::pair_bf16(first, second));
  } else {
    S::store(static_cast<float*>(p.q) + offset, first);
    S::store(static_cast<float*>(p.q) + offset + 16, second);
  }
}

template <class S>
inline void store_key(const KvLayerView& kv, int64_t head, int64_t slot, int64_t strip,
                      typename S::F first, typename S::F second) {
  uint8_t* keys = kv.keys + kv.sub_block(head, slot) + slot % 16 * 4;
  alignas(64) int32_t lanes[32];
  if (kv.precision == Precision::kBF16) {
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

// Sixteen dims of a value, from dim on.
template <class S>
inline void store_value(const KvLayerView& kv, int64_t head, int64_t slot, int64_t dim,
                        typename S::F values) {
  uint8_t* block = kv.values + kv.sub_block(head, slot);
  const int64_t offset = slot % 16;
  if (kv.precision == Precision::kBF16) {
    alignas(64) uint16_t lanes[16];
    S::store_bf16(lanes, values);
    uint8_t* out = block + (offset / 2 * kv.head_dim + dim) * 4 + offset % 2 * 2;
    for (int64_t i = 0; i < 16; ++i) std::memcpy(out + 4 * i, lanes + i, 2);
  } else {
    S::store(reinterpret_cast<float*>(block) + offset * kv.head_dim + dim, values);
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
      store_value<S>(p.kv, kv_head, slot, (strip + i) * kStripRows, rows.first[i]);
      store_value<S>(p.kv, kv_head, slot, (strip + i) * kStripRows + 16, rows.second[i]);
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

// A unit is a strip, or a whole head where heads are normalised.
template <class S>
void qkv(const QkvParams& p, const StepHeader& step, int member, int num_members) {
  const int64_t head_strips = p.head_dim / kStripRows;
  const int64_t unit_strips = p.q_norm == nullptr ? 1 : head_strips;
  int64_t num_units = 0;
  for (int32_t i = 0; i < p.num_parts; ++i)
    num_units += p.parts[i].weight.num_strips() / unit_strips;
  const Range all = split(num_units, member, num_members);
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
  for (int64_t k = 0; k < width; k += 32) {
    const auto a = S::mul(S::mul(S::load(x + k), factor), S::load(p.weight + k));
    const auto b = S::mul(S::mul(S::load(x + k + 16), factor), S::load(p.weight + k + 16));
    write_block<S>(out.precision, a, b, out.block(row, k / kBlockColumns), row % kTileTokens);
  }
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
