// Products of many tokens whose codes are decoded once for all of them (decoded_codes.h). Some
// blocks of a strip at a time are decoded and multiplied by all tokens, so that they stay in L1.
// Included by linear_kernels.h, for kernel sets that decode codes.
#pragma once

#include <algorithm>
#include <array>
#include <type_traits>
#include <utility>

#include "decoded_codes.h"
#include "linear_tile.h"
#include "step.h"

namespace tgi::cpu::step {
namespace {

constexpr int64_t kPartBlocks = 12;      // at most, of a strip: 18 KiB with scales and mins
constexpr int64_t kDecodedTokens = 576;  // most that cached_tokens() allows

// Some blocks of a strip, as stored.
struct StripPart {
  const uint8_t* panels[2];
  int64_t begin;
  int64_t num_blocks;
};

// Decodes a part, each block while the one before it is multiplied.
template <class S, class Fmt>
struct DecodedAhead {
  const StripPart& part;
  uint8_t* const (&decoded)[2];
  int64_t next = 0;

  template <class, int>
  inline void fetch(const uint8_t*) {
    if (next == part.num_blocks) return;
    for (int p = 0; p < 2; ++p) {
      decode_block<S, Fmt>(part.panels[p], part.begin + next,
                           decoded[p] + next * DecodedOf<S, Fmt>::kBlockBytes);
    }
    ++next;
  }
};

// Where the second panel of a decoded part begins.
template <class D>
constexpr int64_t kSecondPanel = kPartBlocks * D::kBlockBytes;

// Decodes a part and multiplies it by the first group of tokens, which must be whole: out
// [tokens][32], to which it adds unless the part is the strip's first.
template <class S, class Fmt>
void decode_part(const StripPart& part, TokenGroup<S> x, uint8_t* decoded, float* out) {
  using D = DecodedOf<S, Fmt>;
  uint8_t* const to[2] = {decoded, decoded + kSecondPanel<D>};
  DecodedAhead<S, Fmt> ahead = {part, to};
  ahead.template fetch<S, 0>(nullptr);
  int8_tile<S, D, 2, S::kGroupTokens>({to[0], to[1]}, x, part.num_blocks, out, ahead,
                                      part.begin == 0);
}

// The same for another group, once the part is decoded.
template <class S, class D, int Tokens>
void multiply_part(const StripPart& part, TokenGroup<S> x, uint8_t* decoded, float* out) {
  int8_tile<S, D, 2, Tokens>({decoded, decoded + kSecondPanel<D>}, x, part.num_blocks, out,
                             NothingAhead(), part.begin == 0);
}

template <class S>
using PartFunction = void (*)(const StripPart& part, TokenGroup<S> x, uint8_t* decoded, float* out);

// A format's functions, for `min_groups` groups of tokens and more; `multiply` is indexed by a
// group's number of tokens minus one. None if decoding does not pay.
template <class S>
struct PartFunctions {
  int64_t min_groups = INT64_MAX;
  PartFunction<S> decode = nullptr;
  std::array<PartFunction<S>, S::kGroupTokens> multiply = {};
};

template <class S, class D, int... Before>
constexpr std::array<PartFunction<S>, S::kGroupTokens> multiply_functions(
    std::integer_sequence<int, Before...>) {
  return {multiply_part<S, D, Before + 1>...};
}

// Bytes are codes already; the more there is to unpack and to convert, the fewer tokens it takes.
template <class S, class Fmt>
constexpr PartFunctions<S> part_functions() {
  if constexpr (std::is_base_of_v<ByteCodes<S>, Fmt>) return {};
  constexpr int64_t kMinGroups = Fmt::kPanel.header_blocks > 0 ? 4 : 8;
  constexpr std::make_integer_sequence<int, S::kGroupTokens> kBefore;
  return {kMinGroups, decode_part<S, Fmt>, multiply_functions<S, DecodedOf<S, Fmt>>(kBefore)};
}

template <class S>
inline PartFunctions<S> part_functions(Format format) {
  switch (format) {
#define TGI_FLOAT_FORMAT(...)
#define TGI_CODE_FORMAT(name, ...) \
  case Format::k##name:            \
    return part_functions<S, name<S>>();
#define TGI_DECODED_FORMAT(...)
#include "../../formats.def"
    default:
      return {};
  }
}

// Multiplies tokens [first, end) by one strip, whose codes are decoded: out [tokens][32].
template <class S>
void run_decoded_strip(const LinearParams& p, const PartFunctions<S>& functions, int64_t first,
                       int64_t end, int64_t strip, uint8_t* decoded, float* out) {
  const int64_t num_blocks = p.weight.num_columns / kBlockColumns;
  const int64_t num_parts = (num_blocks + kPartBlocks - 1) / kPartBlocks;
  const int64_t part_blocks = (num_blocks + num_parts - 1) / num_parts;
  const int64_t tile_bytes = p.in.tile_bytes(S::kTileTokens);
  const int64_t block_bytes = tile_block_bytes(Precision::kInt8, S::kTileTokens);
  const int64_t groups = num_groups<S>(end - first);
  StripPart part = {{p.weight.panel(2 * strip), p.weight.panel(2 * strip + 1)}, 0, 0};
  for (; part.begin < num_blocks; part.begin += part_blocks) {
    const int64_t stop = std::min(part.begin + part_blocks, num_blocks);
    part.num_blocks = stop - part.begin;
    // After the last part comes the next strip's first one.
    const bool is_last = stop == num_blocks;
    const int64_t from = block_offset(p.weight.format, is_last ? 0 : stop);
    const int64_t lines = (part.num_blocks * p.weight.panel_size() / num_blocks + 63) / 64;
    PanelsAhead ahead = {{p.weight.panel(2 * strip + (is_last ? 2 : 0)) + from,
                          p.weight.panel(2 * strip + (is_last ? 3 : 1)) + from},
                         (lines + groups - 1) / groups};
    for (int64_t token = first; token < end;) {
      const int64_t count = group_size<S>(token, end);
      const TokenGroup<S> x = {
          p.in.data + token / S::kTileTokens * tile_bytes + part.begin * block_bytes,
          token % S::kTileTokens};
      const auto function = token == first ? functions.decode : functions.multiply[count - 1];
      function(part, x, decoded, out + (token - first) * kStripRows);
      ahead.template fetch<S>();
      token += count;
    }
  }
}

// The size of a decoded part, in floats.
template <class S>
inline int64_t part_floats(Format format) {
  return 2 * kPartBlocks * decoded_block_bytes<S>(format) / 4;
}

// A member's work memory, in floats, for units of `unit_strips` strips: a decoded part, then sums.
template <class S>
inline int64_t decoded_scratch_floats(Format format, int64_t unit_strips) {
  if (part_functions<S>(format).decode == nullptr) return 0;
  return part_floats<S>(format) + unit_strips * kDecodedTokens * kStripRows;
}

}  // namespace
}  // namespace tgi::cpu::step
