// Prepares queries against latents and writes the tokens' own latents to the cache (MLA). Included
// only by the step_<isa>.cpp files.
#pragma once

#include <cmath>

#include "norm_kernel.h"
#include "qkv_kernel.h"

namespace tgi::cpu::step {
namespace {

// Writes sixteen dims of a token's row.
template <class S>
inline void store_latent(const KvLayerView& kv, int64_t slot, int64_t dim, typename S::F values) {
  uint8_t* const block = kv.keys(0, slot / kv.block_size, slot % kv.block_size);
  const int64_t offset = slot % 16;
  if (kv.precision == Precision::kFloat32) {
    return S::store(reinterpret_cast<float*>(block) + offset * kv.head_dim + dim, values);
  }
  // The other half of each lane is the other token of the pair, which this member also writes.
  const int32_t half = offset % 2 == 0 ? 0xFFFF : static_cast<int32_t>(0xFFFF0000u);
  uint8_t* const out = block + (offset / 2 * kv.head_dim + dim) * 4;
  const auto kept = S::iand(S::iload(out), S::iset1(~half));
  S::istore(out, S::ior(kept, S::iand(S::pair_bf16(values, values), S::iset1(half))));
}

// Rotates a pair of vectors: `first` starts at dim 16 * pair, `second` half the rotated dims later.
template <class S>
inline void rotate_pair(const LatentQkvParams& p, const StepHeader& step, int64_t token,
                        int64_t pair, const float* from, typename S::F& first,
                        typename S::F& second) {
  const int64_t half = (p.kv.head_dim - p.kv.value_dim) / 2;
  first = S::load(from + 16 * pair);
  second = S::load(from + half + 16 * pair);
  const int64_t angles = step.positions[token] * half + 16 * pair;
  rotate<S>(first, second, p.cosines + angles, p.sines + angles);
}

template <class S>
inline void store_latent_query(const LatentQkvParams& p, const StepHeader& step, int64_t row) {
  const int64_t token = row / p.num_heads, head = row % p.num_heads;
  const int64_t rank = p.kv.value_dim, rotary_dim = p.kv.head_dim - rank;
  const float* const absorbed = p.absorbed + token * p.absorbed_stride + head * rank;
  const float* const rotary = p.rotary + token * p.rotary_stride + head * rotary_dim;
  float* const out = p.q + row * p.kv.head_dim;
  const auto scale = S::set1(p.q_scale);
  for (int64_t d = 0; d < rank; d += 16) S::store(out + d, S::mul(S::load(absorbed + d), scale));
  for (int64_t pair = 0; 32 * pair < rotary_dim; ++pair) {
    typename S::F first, second;
    rotate_pair<S>(p, step, token, pair, rotary, first, second);
    S::store(out + rank + 16 * pair, S::mul(first, scale));
    S::store(out + rank + rotary_dim / 2 + 16 * pair, S::mul(second, scale));
  }
}

// Queries are divided by rows. Latents are divided by dims, over all tokens, because two tokens
// share words of the cache; each member therefore computes the norms' factors itself.
template <class S>
void latent_qkv(const LatentQkvParams& p, const StepHeader& step, int member, int num_members) {
  const Range rows = split(step.num_tokens * p.num_heads, member, num_members);
  for (int64_t row = rows.begin; row < rows.end; ++row) store_latent_query<S>(p, step, row);
  const int64_t rank = p.kv.value_dim, half = (p.kv.head_dim - rank) / 2;
  const Range units = split(p.kv.head_dim / 32, member, num_members);
  if (units.begin == units.end) return;
  for (int64_t token = 0; token < step.num_tokens; ++token) {
    const float* const from = p.latents + token * p.latent_stride;
    const int64_t slot = step.slot(p.kv.group, token);
    const float mean = squares_of<S>(from, rank) / static_cast<float>(rank);
    const auto factor = S::set1(1.0f / std::sqrt(mean + p.eps));
    for (int64_t unit = units.begin; unit < units.end; ++unit) {
      const int64_t pair = unit - rank / 32;
      if (pair < 0) {
        for (int64_t d = 32 * unit; d < 32 * unit + 32; d += 16) {
          const auto normed = S::mul(S::mul(S::load(from + d), factor), S::load(p.norm + d));
          store_latent<S>(p.kv, slot, d, normed);
        }
        continue;
      }
      typename S::F first, second;
      rotate_pair<S>(p, step, token, pair, from + rank, first, second);
      store_latent<S>(p.kv, slot, rank + 16 * pair, first);
      store_latent<S>(p.kv, slot, rank + half + 16 * pair, second);
    }
  }
}

}  // namespace
}  // namespace tgi::cpu::step
