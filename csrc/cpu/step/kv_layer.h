// The layout of keys and values in the cache, and of the queries that meet them. Plain structs
// without torch, shared by all instruction sets.
#pragma once

#include <cstdint>

#include "packed.h"

namespace tgi::cpu::step {

// Offset of the scales of a strip of 32 dims in a sub-block of an int8 cache: after all codes.
constexpr int64_t int8_scales(int64_t head_dim, int64_t strip) {
  return 16 * head_dim + 32 * strip;
}

// A strip of a query against an int8 cache: 32 high bytes and 32 low bytes of 16-bit codes, the
// scale, and -128 times the sum of the codes, which is the start value for sums of products with
// unsigned keys.
constexpr int64_t kInt8QueryScale = 64;
constexpr int64_t kInt8QueryStart = 68;
constexpr int64_t kInt8QueryStrip = 72;

// One layer's keys and values: its part [keys, values][KV head] of each block of its group, in
// sub-blocks of 16 tokens:
//   bf16      keys [pair of dims][16 tokens][2], values [pair of tokens][dim][2]
//   float32   keys [dim][16], values [16][dim]
//   int8      keys [quad of dims][16 tokens][4] as code + 128, values [quad of tokens][dim][4],
//             then in both fp16 scales [strip of 32 dims][16 tokens]
// The dims of keys (and of q) are in the order of the packed rows: strip by strip, the first
// element of each rotated pair, then the second. A last strip of fewer than 32 dims is not padded.
// Reads of whole vectors may go up to kPoolSlack bytes past the last block. Latents (MLA) are one
// row per token for both: the first `value_dim` dims are the values, and the whole row has the
// layout of values.
constexpr int64_t kPoolSlack = 256;
struct KvLayerView {
  uint8_t* data;
  Precision precision;
  int64_t group;  // index of its block tables and slots
  int64_t num_blocks;
  int64_t block_stride;  // bytes from one block to the next
  int64_t block_size;    // tokens, a multiple of 16
  int64_t num_heads;
  int64_t head_dim;   // of keys, as stored: even; int8 keeps whole strips of 32
  int64_t value_dim;  // the same for values
  bool is_latent;     // values are the first dims of keys; queries are float32

  int64_t num_strips() const { return strips_of(head_dim); }
  int64_t num_value_strips() const { return strips_of(value_dim); }
  // Dims of a strip of keys, and of a strip of values.
  int64_t strip_dims(int64_t strip) const { return dims_of(head_dim, strip); }
  int64_t value_strip_dims(int64_t strip) const { return dims_of(value_dim, strip); }
  // Bytes of one head of a token's query.
  int64_t query_bytes() const {
    if (is_latent) return head_dim * 4;
    return precision == Precision::kInt8   ? head_dim / kStripRows * kInt8QueryStrip
           : precision == Precision::kBF16 ? head_dim * 2
                                           : head_dim * 4;
  }
  // The sub-block of keys, or of values, that holds the token at `offset` of a block.
  uint8_t* keys(int64_t head, int64_t block, int64_t offset) const {
    return data + block * block_stride +
           (head * block_size + offset) / 16 * sub_block_bytes(head_dim);
  }
  uint8_t* values(int64_t head, int64_t block, int64_t offset) const {
    if (is_latent) return keys(head, block, offset);
    return data + block * block_stride + key_bytes() +
           (head * block_size + offset) / 16 * sub_block_bytes(value_dim);
  }
  // Bytes of this layer in a block.
  int64_t layer_bytes() const {
    return key_bytes() + (is_latent ? 0 : num_heads * block_size / 16 * sub_block_bytes(value_dim));
  }

 private:
  static int64_t strips_of(int64_t dim) { return (dim + kStripRows - 1) / kStripRows; }
  static int64_t dims_of(int64_t dim, int64_t strip) {
    const int64_t left = dim - strip * kStripRows;
    return left < kStripRows ? left : kStripRows;
  }
  int64_t sub_block_bytes(int64_t dim) const {
    return precision == Precision::kInt8   ? dim * 17
           : precision == Precision::kBF16 ? dim * 32
                                           : dim * 64;
  }
  int64_t key_bytes() const { return num_heads * block_size / 16 * sub_block_bytes(head_dim); }
};

// Maximum widths: of a head, and of a row of latents.
constexpr int64_t kMaxHeadDim = 512;
constexpr int64_t kMaxLatentDim = 640;

}  // namespace tgi::cpu::step
