// Compares products of decoded codes, by vectors part by part and by a model of AMX's tiles, with
// products of the codes as stored, for all formats: the bits must be the same. Prints the number of
// formats, or an error with status 1.
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "cpu/step/simd_portable.h"
// Must come after the simd type.
#include "cpu/step/amx_linear.h"
#include "cpu/step/decoded_linear.h"

using namespace tgi::cpu::step;

namespace {

// As on processors without products of signed bytes, whose sets decode codes.
struct Set : Portable {
  static constexpr bool kHasSignedDot = false;
};

struct TileSet : Set {
  using Tiles = ModelTiles<Set>;
  static constexpr bool kHasTiles = true;
  static constexpr int kTileTokens = 16;
};

constexpr int64_t kBlocks = 40;  // four parts of ten
constexpr int64_t kPart = 10;
constexpr int kTokens = Set::kTileTokens;
using Outputs = std::array<float, kTokens * kStripRows>;

std::minstd_rand random_bits(1);

uint8_t random_byte(int low, int high) {
  return static_cast<uint8_t>(std::uniform_int_distribution<int>(low, high)(random_bits));
}

// Random codes, with valid scales and zero points.
template <class Fmt>
std::vector<uint8_t> random_panel(Format format) {
  std::vector<uint8_t> panel(static_cast<size_t>(panel_bytes(format, kBlocks * kBlockColumns)));
  for (uint8_t& byte : panel) byte = random_byte(0, 255);
  for (int64_t b = 0; b < kBlocks; ++b) {
    const auto block = Fmt::block(panel.data(), b);
    const PanelInfo& info = Fmt::kPanel;
    const bool is_in_block = info.block_halves != 0;
    const uint8_t* const halves = is_in_block ? block.codes + Fmt::kCodeBytes : block.header;
    const int64_t num_halves = is_in_block ? info.block_halves : info.header_halves;
    for (int64_t i = 0; i < 16 * num_halves; ++i) {
      panel[static_cast<size_t>(halves - panel.data() + 2 * i + 1)] = random_byte(0x10, 0x2F);
    }
    const auto bytes = static_cast<size_t>(Fmt::factors(block, 0) - panel.data());
    for (size_t r = 0; r < 16; ++r) {
      if (Fmt::kHasZeros) panel[bytes + r] = random_byte(0, 128);
      if (format == Format::kMXFP4) panel[bytes + r] = random_byte(118, 121);
      if (!info.has_book) continue;
      const float unit = random_byte(1, 255) / 4096.0f;
      std::memcpy(&panel[static_cast<size_t>(block.header - panel.data()) + 4 * r], &unit, 4);
    }
  }
  return panel;
}

template <int kTokens>
std::vector<uint8_t> random_tile() {
  constexpr int64_t kBytes = tile_block_bytes(Precision::kInt8, kTokens);
  std::vector<uint8_t> tile(kBlocks * kBytes);
  for (int64_t b = 0; b < kBlocks; ++b) {
    uint8_t* const block = tile.data() + b * kBytes;
    for (int t = 0; t < kTokens; ++t) {
      int32_t sums[2] = {};  // of the block and of its first half
      for (int k = 0; k < kBlockColumns; ++k) {
        const auto value = static_cast<int8_t>(random_byte(0, 254) - 127);
        block[t * kBlockColumns + k] = static_cast<uint8_t>(value);
        sums[0] += value;
        if (k < kBlockColumns / 2) sums[1] += value;
      }
      const float scale = random_byte(1, 255) / 4096.0f;
      const float scaled = scale * static_cast<float>(sums[0]);
      const int32_t starts[2] = {-128 * sums[0], -128 * sums[1]};
      uint8_t* const numbers = block + token_numbers(kTokens) + t * kTokenNumbers;
      std::memcpy(numbers + kTokenScale, &scale, 4);
      std::memcpy(numbers + kTokenSum, &scaled, 4);
      std::memcpy(numbers + kTokenZero, &starts[0], 4);
      std::memcpy(numbers + kTokenZeroFirst, &starts[1], 4);
    }
  }
  return tile;
}

template <class Fmt>
bool is_same_by_parts(const char* name, Format format) {
  using D = DecodedOf<Set, Fmt>;
  constexpr int64_t kTileBlock = tile_block_bytes(Precision::kInt8, kTokens);
  const std::vector<uint8_t> panels[2] = {random_panel<Fmt>(format), random_panel<Fmt>(format)};
  const std::vector<uint8_t> tiles[2] = {random_tile<kTokens>(), random_tile<kTokens>()};
  const uint8_t* const stored[2] = {panels[0].data(), panels[1].data()};
  Outputs expected[2] = {}, found[2];
  for (Outputs& out : found) out.fill(1e30f);  // whatever the memory held before
  int8_tile<Set, Fmt, 2, kTokens>(stored, {tiles[0].data(), 0}, kBlocks, expected[0].data(),
                                  NothingAhead());
  int8_tile<Set, Fmt, 2, kTokens - 1>(stored, {tiles[1].data(), 0}, kBlocks, expected[1].data(),
                                      NothingAhead());
  std::vector<uint8_t> decoded(2 * kPartBlocks * D::kBlockBytes, 0xA5);
  for (int64_t begin = 0; begin < kBlocks; begin += kPart) {
    const StripPart part = {{stored[0], stored[1]}, begin, kPart};
    const int64_t offset = begin * kTileBlock;
    decode_part<Set, Fmt>(part, {tiles[0].data() + offset, 0}, decoded.data(), found[0].data());
    multiply_part<Set, D, kTokens - 1>(part, {tiles[1].data() + offset, 0}, decoded.data(),
                                       found[1].data());
  }
  const bool is_equal = found[0] == expected[0] && std::memcmp(found[1].data(), expected[1].data(),
                                                               (kTokens - 1) * kStripRows * 4) == 0;
  if (!is_equal) std::printf("%s: other bits by parts\n", name);
  return is_equal;
}

template <class Fmt>
bool is_same_by_tiles(const char* name, Format format) {
  if constexpr (!kIsByTiles<Fmt>) return true;
  using D = DecodedOf<TileSet, Fmt>;
  constexpr int kRows = TileSet::kTileTokens;
  const std::vector<uint8_t> panels[2] = {random_panel<Fmt>(format), random_panel<Fmt>(format)};
  const std::vector<uint8_t> tile = random_tile<kRows>();
  const uint8_t* const stored[2] = {panels[0].data(), panels[1].data()};
  std::array<float, kRows * kStripRows> expected = {}, found = {};
  const auto expect = [&]<int Tokens>(std::integral_constant<int, Tokens>, int64_t first) {
    int8_tile<TileSet, Fmt, 2, Tokens>(stored, {tile.data(), first}, kBlocks,
                                       expected.data() + first * kStripRows, NothingAhead());
  };
  expect(std::integral_constant<int, 6>(), 0);
  expect(std::integral_constant<int, 6>(), 6);
  expect(std::integral_constant<int, 4>(), 12);
  TileSet::Tiles::configure(kInt8Tiles);
  std::vector<uint8_t> decoded(kBlocks * D::kBlockBytes);
  for (int p = 0; p < 2; ++p) {
    decode_codes<TileSet, Fmt>(stored[p], kBlocks, decoded.data());
    int8_tiles_panel<TileSet, D>(decoded.data(), {tile.data(), 0}, kBlocks,
                                 found.data() + p * kPanelRows, {nullptr, 0});
  }
  TileSet::Tiles::release();
  if (found != expected) std::printf("%s: other bits by tiles\n", name);
  return found == expected;
}

}  // namespace

int main() {
  int count = 0;
#define TGI_FLOAT_FORMAT(...)
#define TGI_CODE_FORMAT(name, ...)                                        \
  if (!is_same_by_parts<name<Set>>(#name, Format::k##name)) return 1;     \
  if (!is_same_by_tiles<name<TileSet>>(#name, Format::k##name)) return 1; \
  ++count;
#define TGI_DECODED_FORMAT(...)
#include "formats.def"
  std::printf("%d formats\n", count);
}
