// Where a token's key and value lie in a layer's part of the pool: the one description for the
// write and for attention. The pool is [block][layer][keys, values][KV head]: all of a block lies
// together, so that the memory that consecutive blocks have touched has no holes. A (block, keys or
// values, head) is block_size * head_dim elements. Keys lie as the score kernel reads them, 16
// tokens side by side; bfloat16 packs two elements of the summed dimension into a word.
// tgi_asgi/ops/kv.py has the same in torch, for tests.
#pragma once

#include <cstdint>

namespace tgi::cpu {

constexpr int64_t kKeyTile = 16;  // tokens side by side

template <typename Element>
struct KvLayout;

template <>
struct KvLayout<float> {
  // keys [block / 16][head_dim][16 tokens], values [block][head_dim]
  static int64_t key_offset(int64_t token, int64_t d, int64_t head_dim) {
    return (token / kKeyTile * head_dim + d) * kKeyTile + token % kKeyTile;
  }
  static int64_t value_offset(int64_t token, int64_t d, int64_t head_dim) {
    return token * head_dim + d;
  }
};

template <>
struct KvLayout<uint16_t> {
  // keys [block / 16][head_dim / 2][16 tokens][2], values [block / 2][head_dim][2 tokens]
  static int64_t key_offset(int64_t token, int64_t d, int64_t head_dim) {
    return (token / kKeyTile * (head_dim / 2) + d / 2) * 2 * kKeyTile + token % kKeyTile * 2 +
           d % 2;
  }
  static int64_t value_offset(int64_t token, int64_t d, int64_t head_dim) {
    return (token / 2 * head_dim + d) * 2 + token % 2;
  }
};

}  // namespace tgi::cpu
