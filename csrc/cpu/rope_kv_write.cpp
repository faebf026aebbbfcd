// Rotary embedding of queries and keys, and the write of keys and values into the pool. One
// variant: the write is a scatter of head_dim elements a head, and the rotation is vectorised by
// the compiler.
#include "kernels.h"
#include "kv_layout.h"
#include "simd.h"

namespace tgi::cpu {

namespace {

using portable::to_bfloat16;

constexpr int64_t kMaxHeadDim = 256;

// Rotates in [head_dim] by one position's cos and sin [half] into out [head_dim].
void rotate(const float* __restrict__ in, float* __restrict__ out, const float* __restrict__ cos,
            const float* __restrict__ sin, int64_t half, int64_t head_dim) {
  for (int64_t i = 0; i < half; ++i) {
    out[i] = in[i] * cos[i] - in[i + half] * sin[i];
    out[i + half] = in[i + half] * cos[i] + in[i] * sin[i];
  }
  for (int64_t i = 2 * half; i < head_dim; ++i) out[i] = in[i];
}

inline void put(float* to, float x) { *to = x; }
inline void put(uint16_t* to, float x) { *to = to_bfloat16(x); }

template <typename Element>
void write_tokens(const ::tgi::RopeParams& p, int64_t begin, int64_t end) {
  using Layout = KvLayout<Element>;
  const int64_t dim = p.head_dim, half = p.rotary_dim / 2;
  const int64_t row_size = (p.num_heads + 2 * p.num_kv_heads) * dim;
  const int64_t block_elements = p.block_size * dim;
  float rotated[kMaxHeadDim];
  for (int64_t token = begin; token < end; ++token) {
    const float* row = p.qkv + token * row_size;  // [num_heads + 2 * num_kv_heads, head_dim]
    const float* cos = p.cos + p.positions[token] * half;
    const float* sin = p.sin + p.positions[token] * half;
    for (int64_t head = 0; head < p.num_heads; ++head) {
      float* q = p.q + (token * p.num_heads + head) * dim;
      rotate(row + head * dim, q, cos, sin, half, dim);
    }
    const int64_t block = p.slots[token] / p.block_size, offset = p.slots[token] % p.block_size;
    for (int64_t head = 0; head < p.num_kv_heads; ++head) {
      Element* key = static_cast<Element*>(p.kv) + block * p.block_stride + head * block_elements;
      Element* value = key + p.num_kv_heads * block_elements;
      const float* v = row + (p.num_heads + p.num_kv_heads + head) * dim;
      rotate(row + (p.num_heads + head) * dim, rotated, cos, sin, half, dim);
      for (int64_t d = 0; d < dim; ++d) put(key + Layout::key_offset(offset, d, dim), rotated[d]);
      for (int64_t d = 0; d < dim; ++d) put(value + Layout::value_offset(offset, d, dim), v[d]);
    }
  }
}

}  // namespace

void rope_kv_write(const ::tgi::RopeParams& p, int64_t begin, int64_t end) {
  if (p.kv_type == FloatType::kFloat32) {
    write_tokens<float>(p, begin, end);
  } else {
    write_tokens<uint16_t>(p, begin, end);
  }
}

}  // namespace tgi::cpu
