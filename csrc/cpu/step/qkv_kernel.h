// The QKV product, whose epilogue does bias, head norms, RoPE, KV write and query scaling; and the
// same from existing rows. Included only by the step_<isa>.cpp files.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "head_kernel.h"
#include "linear_kernels.h"
#include "norm_kernel.h"
#include "pack.h"

namespace tgi::cpu::step {
namespace {

// Thirty-two values as codes of magnitude at most `most`, and their scale. If all magnitudes are
// below 1e-30, all codes are zero. NaN or infinity result in a scale that is not finite.
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
  const auto half = S::iset1(128);  // rounds, because the low byte is signed too
  S::store_i8(high, S::ishr(S::iadd(codes.first, half), 8));
  S::store_i8(high + 16, S::ishr(S::iadd(codes.second, half), 8));
  S::store_i8(high + 32, codes.first);
  S::store_i8(high + 48, codes.second);
  // Unsigned, because NaN can round to any integer.
  const auto sum = static_cast<uint32_t>(S::reduce_iadd(S::iadd(codes.first, codes.second)));
  const uint32_t start = 0u - 128u * sum;
  std::memcpy(strip + kInt8QueryScale, &codes.scale, 4);
  std::memcpy(strip + kInt8QueryStart, &start, 4);
}

// Joins a strip of `dims` dims: the first elements of all rotated pairs, then the second ones,
// which is the float32 layout.
template <class S>
inline void join_pairs(typename S::F first, typename S::F second, int64_t dims, float* out) {
  if (dims == kStripRows) {
    S::store(out, first);
    S::store(out + 16, second);
    return;
  }
  alignas(64) float lanes[kStripRows];
  S::store(lanes, first);
  S::store(lanes + 16, second);
  std::memcpy(out, lanes, static_cast<size_t>(dims / 2) * sizeof(float));
  std::memcpy(out + dims / 2, lanes + 16, static_cast<size_t>(dims / 2) * sizeof(float));
}

// Writes strip `strip` of a query, which is head `row` of `out`. As for keys, float32 stores the
// two halves of the pairs one after the other.
template <class S>
TGI_INLINE void store_query(const KvLayerView& kv, float scale, void* out, int64_t row,
                            int64_t strip, typename S::F first, typename S::F second) {
  const int64_t offset = row * kv.head_dim + strip * kStripRows, dims = kv.strip_dims(strip);
  first = S::mul(first, S::set1(scale));
  second = S::mul(second, S::set1(scale));
  if (kv.precision == Precision::kInt8) {
    auto* const query = static_cast<uint8_t*>(out) + offset / kStripRows * kInt8QueryStrip;
    store_int8_query<S>(first, second, query);
  } else if (kv.precision == Precision::kBF16) {
    auto* const query = static_cast<uint16_t*>(out) + offset;
    if (dims == kStripRows) return S::istore(query, S::pair_bf16(first, second));
    alignas(64) int32_t lanes[16];
    S::istore(lanes, S::pair_bf16(first, second));
    std::memcpy(query, lanes, static_cast<size_t>(dims) * 2);
  } else {
    join_pairs<S>(first, second, dims, static_cast<float*>(out) + offset);
  }
}

// Writes the codes of a strip of keys or values; returns the scale.
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
TGI_INLINE void store_key(const KvLayerView& kv, int64_t head, int64_t slot, int64_t strip,
                          typename S::F first, typename S::F second) {
  uint8_t* const block = kv.keys(head, slot / kv.block_size, slot % kv.block_size);
  uint8_t* keys = block + slot % 16 * 4;
  alignas(64) int32_t lanes[32];
  const int64_t dims = kv.strip_dims(strip);
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
    for (int64_t i = 0; i < dims / 2; ++i) std::memcpy(keys + 64 * i, lanes + i, 4);
  } else {
    join_pairs<S>(first, second, dims, reinterpret_cast<float*>(lanes));
    keys += strip * 32 * 64;
    for (int64_t i = 0; i < dims; ++i) std::memcpy(keys + 64 * i, lanes + i, 4);
  }
}

template <class S>
TGI_INLINE void store_value(const KvLayerView& kv, int64_t head, int64_t slot, int64_t strip,
                            typename S::F first, typename S::F second) {
  uint8_t* const block = kv.values(head, slot / kv.block_size, slot % kv.block_size);
  const int64_t offset = slot % 16, dim = strip * kStripRows, dims = kv.value_strip_dims(strip);
  if (kv.precision == Precision::kInt8) {
    alignas(64) int8_t lanes[32];
    store_scale(block, kv.value_dim, strip, slot, store_int8<S>(first, second, lanes));
    auto* out =
        reinterpret_cast<int8_t*>(block) + (offset / 4 * kv.value_dim + dim) * 4 + offset % 4;
    for (int64_t i = 0; i < 32; ++i) out[4 * i] = lanes[i];
  } else if (kv.precision == Precision::kBF16) {
    // The other half of each lane is the other token of the pair, which this member also writes.
    const int32_t half = offset % 2 == 0 ? 0xFFFF : static_cast<int32_t>(0xFFFF0000u);
    const auto mine = S::iset1(half), others = S::iset1(~half);
    uint8_t* const out = block + (offset / 2 * kv.value_dim + dim) * 4;
    const typename S::I pairs[2] = {S::pair_bf16(first, first), S::pair_bf16(second, second)};
    if (dims < kStripRows) {  // another member may be writing what follows
      alignas(64) int32_t lanes[32];
      S::istore(lanes, pairs[0]);
      S::istore(lanes + 16, pairs[1]);
      for (int64_t i = 0; i < dims; ++i) std::memcpy(out + 4 * i + offset % 2 * 2, lanes + i, 2);
      return;
    }
    for (int64_t i = 0; i < 2; ++i) {
      const auto kept = S::iand(S::iload(out + 64 * i), others);
      S::istore(out + 64 * i, S::ior(kept, S::iand(pairs[i], mine)));
    }
  } else {
    float* out = reinterpret_cast<float*>(block) + offset * kv.value_dim + dim;
    alignas(64) float lanes[kStripRows];
    float* const to = dims == kStripRows ? out : lanes;
    S::store(to, first);
    S::store(to + 16, second);
    if (to != out) std::memcpy(out, lanes, static_cast<size_t>(dims) * sizeof(float));
  }
}

// Rotates those of strips [strip, strip + num_strips) of a token's head that have rotated pairs.
template <class S>
TGI_INLINE void rotate_head(const HeadParams& p, const StepHeader& step, int64_t token,
                            int64_t strip, int64_t num_strips, HeadRows<S>& rows) {
  const int64_t place = step.rotary[token];
  const bool is_own = place < 0;
  const int64_t angles = ((is_own ? -1 - place : place) * p.rotary_strips + strip) * 16;
  const float* const cosines = (is_own ? step.cosines : p.cosines) + angles;
  const float* const sines = (is_own ? step.sines : p.sines) + angles;
  const int64_t left = p.rotary_strips - strip, count = left < num_strips ? left : num_strips;
  for (int64_t i = 0; i < count; ++i) {
    rotate<S>(rows.first[i], rows.second[i], cosines + i * 16, sines + i * 16);
  }
}

// What a head is. Known at compile time, so that loops over tokens have no branches for the others.
enum class HeadKind { kQuery, kKey, kValue };

// Calls function(kind, head) with the kind of a token's head as a constant, and its index among
// those of its kind.
template <class Function>
inline void with_kind(const HeadParams& p, int64_t head, const Function& function) {
  const int64_t key = head - p.num_heads, value = key - p.kv.num_heads;
  if (key < 0) {
    function(std::integral_constant<HeadKind, HeadKind::kQuery>(), head);
  } else if (value < 0) {
    function(std::integral_constant<HeadKind, HeadKind::kKey>(), key);
  } else {
    function(std::integral_constant<HeadKind, HeadKind::kValue>(), value);
  }
}

// Writes strips [strip, strip + num_strips) of a finished head to the query buffer or the cache.
template <class S, HeadKind Kind>
TGI_INLINE void store_head(const HeadParams& p, const StepHeader& step, int64_t token, int64_t head,
                           int64_t strip, int64_t num_strips, const HeadRows<S>& rows) {
  if constexpr (Kind == HeadKind::kQuery) {
    float scale = p.q_scale;
    if (p.query_scales != nullptr) scale *= p.query_scales[step.positions[token]];
    for (int64_t i = 0; i < num_strips; ++i) {
      store_query<S>(p.kv, scale, p.q, token * p.num_heads + head, strip + i, rows.first[i],
                     rows.second[i]);
    }
  } else {
    const int64_t slot = step.slot(p.kv.group, token);
    for (int64_t i = 0; i < num_strips; ++i) {
      if constexpr (Kind == HeadKind::kKey) {
        store_key<S>(p.kv, head, slot, strip + i, rows.first[i], rows.second[i]);
      } else {
        store_value<S>(p.kv, head, slot, strip + i, rows.first[i], rows.second[i]);
      }
    }
  }
}

// Rotates and writes strips of a normalised head.
template <class S, HeadKind Kind>
TGI_INLINE void place_head(const HeadParams& p, const StepHeader& step, int64_t token, int64_t head,
                           int64_t strip, int64_t num_strips, HeadRows<S>& rows) {
  if constexpr (Kind != HeadKind::kValue) {
    if (p.cosines != nullptr) rotate_head<S>(p, step, token, strip, num_strips, rows);
  }
  store_head<S, Kind>(p, step, token, head, strip, num_strips, rows);
}

// Normalises a query or key head.
template <class S, HeadKind Kind>
inline void norm_head(const HeadParams& p, int64_t head, int64_t num_strips, HeadRows<S>& rows) {
  constexpr bool kIsQuery = Kind == HeadKind::kQuery;
  const int64_t at = head * p.norm_stride;
  const float* const weight = (kIsQuery ? p.q_norm : p.k_norm) + at;
  if (p.q_bias != nullptr) {
    const float* const bias = (kIsQuery ? p.q_bias : p.k_bias) + at;
    layer_norm_head<S>(rows, num_strips, p.true_dim, p.eps, weight, bias);
  } else {
    scale_head<S>(rows, num_strips, norm_factor<S>(rows, num_strips, p.true_dim, p.eps), weight);
  }
}

// Applies all steps to strips of a head; a head that is normalised must be whole.
template <class S, HeadKind Kind>
TGI_INLINE void finish_head(const HeadParams& p, const StepHeader& step, int64_t token,
                            int64_t head, int64_t strip, int64_t num_strips, HeadRows<S>& rows) {
  if (p.clip != 0) clip_head<S>(rows, num_strips, p.clip);
  if constexpr (Kind == HeadKind::kValue) {
    if (p.norms_values) {
      scale_head<S>(rows, num_strips, norm_factor<S>(rows, num_strips, p.true_dim, p.eps));
    }
  }
  const bool is_normed = p.q_norm != nullptr && Kind != HeadKind::kValue;
  if (!is_normed) return place_head<S, Kind>(p, step, token, head, strip, num_strips, rows);
  if (!p.is_norm_last) {
    norm_head<S, Kind>(p, head, num_strips, rows);
    return place_head<S, Kind>(p, step, token, head, strip, num_strips, rows);
  }
  if (p.cosines != nullptr) rotate_head<S>(p, step, token, strip, num_strips, rows);
  norm_head<S, Kind>(p, head, num_strips, rows);
  store_head<S, Kind>(p, step, token, head, strip, num_strips, rows);
}

// Finishes a unit's outputs for `count` tokens: strips [strip, strip + num_strips) of a head.
template <class S, HeadKind Kind>
TGI_INLINE void finish_head_outputs(const HeadParams& p, const StepHeader& step, int64_t token,
                                    int64_t count, int64_t head, int64_t strip, int64_t num_strips,
                                    const float* bias, const UnitOutputs& out) {
  for (int64_t t = 0; t < count; ++t) {
    HeadRows<S> rows;
    for (int64_t s = 0; s < num_strips; ++s) {
      const float* const values = out.row(s, t);
      rows.first[s] = biased<S>(bias, s * kStripRows, values);
      rows.second[s] = biased<S>(bias, s * kStripRows + 16, values + 16);
    }
    finish_head<S, Kind>(p, step, token + t, head, strip, num_strips, rows);
  }
}

// A unit is a strip, or a whole head if heads are normalised.
template <class S>
void qkv(const QkvParams& p, const StepHeader& step, int member, int num_members) {
  const int64_t head_strips = p.heads.kv.num_strips();
  const int64_t unit_strips = p.heads.q_norm == nullptr ? 1 : head_strips;
  int64_t num_units = 0;
  for (int32_t i = 0; i < p.num_parts; ++i)
    num_units += p.parts[i].weight.num_strips() / unit_strips;
  const int64_t query_units = p.heads.num_heads * head_strips / unit_strips;
  const bool is_decode = step.num_tokens == step.num_sequences;
  const Range all = {qkv_share(is_decode, query_units, num_units, member, num_members),
                     qkv_share(is_decode, query_units, num_units, member + 1, num_members)};
  int64_t before = 0;
  for (int32_t i = 0; i < p.num_parts; ++i) {
    const LinearParams& part = p.parts[i];
    const int64_t part_units = part.weight.num_strips() / unit_strips;
    Range units = {all.begin - before, all.end - before};
    units.begin = units.begin > 0 ? units.begin : 0;
    units.end = units.end < part_units ? units.end : part_units;
    if (units.begin < units.end) {
      const auto finish = [&](int64_t unit, int64_t token, int64_t count, const UnitOutputs& out) {
        const int64_t first = (before + unit) * unit_strips, strip = first % head_strips;
        const float* const bias =
            part.bias == nullptr ? nullptr : part.bias + unit * unit_strips * kStripRows;
        with_kind(p.heads, first / head_strips, [&](auto kind, int64_t head) {
          if (unit_strips == 1) {  // a constant, so that a strip stays in registers
            finish_head_outputs<S, kind()>(p.heads, step, token, count, head, strip, 1, bias, out);
          } else {
            finish_head_outputs<S, kind()>(p.heads, step, token, count, head, strip, unit_strips,
                                           bias, out);
          }
        });
      };
      run_linear<S>(part, tokens_of(step), units, unit_strips, member,
                    adapted<S>(part, step, unit_strips, finish));
    }
    before += part_units;
  }
}

// Each member owns whole heads, for all tokens, because two tokens may share a cache line. A norm
// over all heads is computed by each member itself.
template <class S>
void head_rows(const HeadRowsParams& p, const StepHeader& step, int member, int num_members) {
  const HeadParams& heads = p.heads;
  const int64_t strips = heads.kv.num_strips(), width = strips * kStripRows;
  const int64_t num_rotated = heads.num_heads + (p.has_keys ? heads.kv.num_heads : 0);
  const Range mine =
      split(num_rotated + (p.has_keys ? heads.kv.num_heads : 0), member, num_members);
  for (int64_t token = 0; token < step.num_tokens; ++token) {
    const float* const row = p.rows + token * p.stride;
    float factors[2] = {1.0f, 1.0f};  // of queries and of keys
    for (int64_t i = 0; p.is_whole_norm && i < (p.has_keys ? 2 : 1); ++i) {
      const int64_t count = i == 0 ? heads.num_heads : heads.kv.num_heads;
      const float squares =
          squares_of<S>(row + (i == 0 ? 0 : heads.num_heads * width), count * width);
      factors[i] =
          1.0f / std::sqrt(squares / static_cast<float>(count * heads.true_dim) + heads.eps);
    }
    for (int64_t head = mine.begin; head < mine.end; ++head) {
      HeadRows<S> values;
      for (int64_t i = 0; i < strips; ++i) {
        values.first[i] = S::load(row + head * width + i * kStripRows);
        values.second[i] = S::load(row + head * width + i * kStripRows + 16);
      }
      with_kind(heads, head, [&](auto kind, int64_t index) {
        constexpr HeadKind kKind = kind();
        if (!p.is_whole_norm) {
          return finish_head<S, kKind>(heads, step, token, index, 0, strips, values);
        }
        if constexpr (kKind != HeadKind::kValue) {
          constexpr bool kIsQuery = kKind == HeadKind::kQuery;
          const float* const weight = (kIsQuery ? heads.q_norm : heads.k_norm) + index * width;
          scale_head<S>(values, strips, factors[kIsQuery ? 0 : 1], weight);
        }
        place_head<S, kKind>(heads, step, token, index, 0, strips, values);
      });
    }
  }
}

// Loads a strip of a head whose `dim` dims are in order, as two parts of `half` dims, with zeros
// past the last dim.
template <class S>
inline void load_strip(const float* head, int64_t dim, int64_t strip, int64_t half,
                       typename S::F& first, typename S::F& second) {
  const float* const from = head + strip * kStripRows;
  const int64_t left = dim - strip * kStripRows;
  if (left >= kStripRows) {
    first = S::load(from);
    second = S::load(from + 16);
    return;
  }
  const int64_t count = left < half ? left : half, rest = left - count;
  first = S::load_head(from, static_cast<int>(count), S::zero());
  second = rest > 0 ? S::load_head(from + half, static_cast<int>(rest), S::zero()) : S::zero();
}

// A float cache stores the two halves of a short strip of keys side by side; int8 has no short
// strips.
inline int64_t key_half(const KvLayerView& kv, int64_t strip) {
  return kv.precision == Precision::kInt8 ? 16 : kv.strip_dims(strip) / 2;
}

// Queries are divided by rows; keys and values by heads, for all tokens, because two tokens may
// share a cache line, and even a word of it.
template <class S>
void store_heads(const StoreHeadsParams& p, const StepHeader& step, int member, int num_members) {
  const KvLayerView& kv = p.kv;
  const auto head_of = [](const PlainHeads& heads, int64_t token, int64_t head) {
    return heads.data + token * heads.token_stride + head * heads.head_stride;
  };
  typename S::F first, second;
  const Range rows = split(step.num_tokens * p.num_heads, member, num_members);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const float* const from = head_of(p.q, row / p.num_heads, row % p.num_heads);
    for (int64_t strip = 0; strip < kv.num_strips(); ++strip) {
      load_strip<S>(from, p.q.dim, strip, key_half(kv, strip), first, second);
      store_query<S>(kv, p.q_scale, p.out, row, strip, first, second);
    }
  }
  if (p.k.data == nullptr) return;
  const Range mine = split(2 * kv.num_heads, member, num_members);
  for (int64_t head = mine.begin; head < mine.end; ++head) {
    const bool is_key = head < kv.num_heads;
    const int64_t kv_head = is_key ? head : head - kv.num_heads;
    const PlainHeads& heads = is_key ? p.k : p.v;
    const int64_t num_strips = is_key ? kv.num_strips() : kv.num_value_strips();
    for (int64_t token = 0; token < step.num_tokens; ++token) {
      const float* const from = head_of(heads, token, kv_head);
      for (int64_t strip = 0; strip < num_strips; ++strip) {
        load_strip<S>(from, heads.dim, strip, is_key ? key_half(kv, strip) : 16, first, second);
        if (is_key) {
          store_key<S>(kv, kv_head, step.slot(kv.group, token), strip, first, second);
        } else {
          store_value<S>(kv, kv_head, step.slot(kv.group, token), strip, first, second);
        }
      }
    }
  }
}

}  // namespace
}  // namespace tgi::cpu::step
