// How a block of each weight format is read: codes as vectors of unsigned bytes, scales as sixteen
// floats. Templates over the simd type S, included by the step_<isa>.cpp files only.
#pragma once

#include "packed.h"

namespace tgi::cpu::step {
namespace {

// quad(p, j): the codes of columns 4j..4j+3 of sixteen rows, one row a dword. The index j is known
// at compile time once loops are unrolled.
template <class S>
struct NibbleCodes {
  static constexpr bool kIsSmall = true;
  static constexpr int kCodeBytes = 256;
  static inline typename S::I quad(const uint8_t* p, int j) {
    const auto mask = S::iset1(0x0F0F0F0F);
    if (j < 4) return S::iand(S::iload(p + 64 * j), mask);
    return S::iand(S::ishr(S::iload(p + 64 * (j - 4)), 4), mask);
  }
};

template <class S>
struct FiveBitCodes {
  static constexpr bool kIsSmall = true;
  static constexpr int kCodeBytes = 320;
  static inline typename S::I quad(const uint8_t* p, int j) {
    const auto high = S::iload(p + 256);
    const auto bit =
        S::iand(j < 4 ? S::ishl(high, 4 - j) : S::ishr(high, j - 4), S::iset1(0x10101010));
    return S::ior(NibbleCodes<S>::quad(p, j), bit);
  }
};

template <class S>
struct SixBitCodes {
  static constexpr bool kIsSmall = true;
  static constexpr int kCodeBytes = 384;
  static inline typename S::I quad(const uint8_t* p, int j) {
    const auto high =
        S::iload(p + 256 + 64 * (j / 4));  // bits 2i, 2i+1 of a byte: quad 4 * (j / 4) + i
    const int i = j % 4;
    const auto shifted = i < 2 ? S::ishl(high, 4 - 2 * i) : S::ishr(high, 2 * i - 4);
    return S::ior(NibbleCodes<S>::quad(p, j), S::iand(shifted, S::iset1(0x30303030)));
  }
};

template <class S>
struct ByteCodes {
  static constexpr bool kIsSmall = false;
  static constexpr int kCodeBytes = 512;
  static inline typename S::I quad(const uint8_t* p, int j) { return S::iload(p + 64 * j); }
};

// weight = scale * (code - zero) + min. The zero point is 128 >> kZeroShift, none if negative.
template <class S, class Codes, int ZeroShift, bool HasMin>
struct Plain : Codes {
  static constexpr int kZeroShift = ZeroShift;
  static constexpr bool kHasMin = HasMin;
  static constexpr int kNumHalves = 1;  // scales in a block
  static constexpr int64_t kBytes = Codes::kCodeBytes + (HasMin ? 64 : 32);
  struct Block {
    const uint8_t* codes;
  };
  static inline Block block(const uint8_t* panel, int64_t b) { return {panel + b * kBytes}; }
  static inline typename S::F scale(Block block, int) {
    return S::load_half(block.codes + Codes::kCodeBytes);
  }
  static inline typename S::F min(Block block) {
    return S::load_half(block.codes + Codes::kCodeBytes + 32);
  }
};

// K-quants: fp16 scales a super-block of eight blocks, times small integers a block. The products
// are exact.
template <class S, class Codes, Format format>
struct Super : Codes {
  static constexpr int64_t kBytes = panel_layout(format).block_bytes;
  static constexpr int64_t kHeader = panel_layout(format).header_bytes;
  struct Block {
    const uint8_t* codes;
    const uint8_t* header;
  };
  static inline Block block(const uint8_t* panel, int64_t b) {
    const uint8_t* header = panel + (b >> 3) * (kHeader + kSuperBlock * kBytes);
    return {header + kHeader + (b & 7) * kBytes, header};
  }
};

template <class S, class Codes, Format format>
struct SuperWithMin : Super<S, Codes, format> {
  static constexpr int kZeroShift = -1;
  static constexpr bool kHasMin = true;
  static constexpr int kNumHalves = 1;
  using Block = typename Super<S, Codes, format>::Block;
  static inline typename S::F scale(Block block, int) {
    return S::mul(S::load_half(block.header),
                  S::to_float(S::load_u8(block.codes + Codes::kCodeBytes)));
  }
  static inline typename S::F min(Block block) {
    const auto factor = S::to_float(S::load_u8(block.codes + Codes::kCodeBytes + 16));
    return S::mul(S::load_half(block.header + 32), S::sub(S::zero(), factor));
  }
};

template <class S>
struct Q6_K : Super<S, SixBitCodes<S>, Format::kQ6_K> {
  static constexpr int kZeroShift = 2;
  static constexpr bool kHasMin = false;
  static constexpr int kNumHalves = 2;
  using Block = typename Super<S, SixBitCodes<S>, Format::kQ6_K>::Block;
  static inline typename S::F scale(Block block, int half) {
    return S::mul(S::load_half(block.header),
                  S::to_float(S::load_i8(block.codes + 384 + 16 * half)));
  }
  static inline typename S::F min(Block) { return S::zero(); }
};

template <class S>
using Q8_0 = Plain<S, ByteCodes<S>, 0, false>;
template <class S>
using Q4_0 = Plain<S, NibbleCodes<S>, 4, false>;
template <class S>
using Q4_1 = Plain<S, NibbleCodes<S>, -1, true>;
template <class S>
using Q5_0 = Plain<S, FiveBitCodes<S>, 3, false>;
template <class S>
using Q5_1 = Plain<S, FiveBitCodes<S>, -1, true>;
template <class S>
using Q4_K = SuperWithMin<S, NibbleCodes<S>, Format::kQ4_K>;
template <class S>
using Q5_K = SuperWithMin<S, FiveBitCodes<S>, Format::kQ5_K>;

}  // namespace
}  // namespace tgi::cpu::step
