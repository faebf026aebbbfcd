// How blocks of each weight format are read: floats as vectors ready to multiply, codes as vectors
// of bytes with their scales as sixteen floats. A reader has its format's name in formats.def.
// Templates over the simd type S, included only by the step_<isa>.cpp files.
#pragma once

#include <algorithm>

#include "packed.h"

namespace tgi::cpu::step {
namespace {

// Floats. Each step multiplies one vector of weights by one dword of the activation.
template <class S>
struct F32 {
  static constexpr Precision kPrecision = Precision::kFloat32;
  static constexpr int kSteps = 32;  // per block
  static constexpr int kStepBytes = 64;
  using Vector = typename S::F;
  static inline Vector load(const uint8_t* p) { return S::load(reinterpret_cast<const float*>(p)); }
  static inline typename S::F multiply_add(typename S::F acc, Vector weight, const uint8_t* value) {
    return S::fma(weight, S::set1(*reinterpret_cast<const float*>(value)), acc);
  }
};

template <class S>
struct F16 : F32<S> {
  static constexpr int kStepBytes = 32;
  static inline typename S::F load(const uint8_t* p) { return S::load_half(p); }
};

template <class S>
struct BF16 {
  static constexpr Precision kPrecision = Precision::kBF16;
  static constexpr int kSteps = 16;
  static constexpr int kStepBytes = 64;
  using Vector = typename S::I;
  static inline Vector load(const uint8_t* p) { return S::iload(p); }
  static inline typename S::F multiply_add(typename S::F acc, Vector weight, const uint8_t* value) {
    return S::dot_bf16(acc, weight, S::ibroadcast(value));
  }
};

// quad(p, j): the codes of columns 4j..4j+3 of sixteen rows, one row per dword. Once loops are
// unrolled, j is a compile-time constant; GCC finds that too late and would call some of them.
#define TGI_INLINE inline __attribute__((always_inline))

template <class S, int MaxCode>
struct SmallCodes {  // below 64
  static constexpr int kMaxCode = MaxCode;
  static constexpr bool kIsSigned = false;
  static inline typename S::I dot(typename S::I acc, typename S::I codes, typename S::I values) {
    return S::dot_small(acc, codes, values);
  }
  static inline typename S::I short_sums(typename S::I codes, typename S::I values) {
    return S::short_sums(codes, values);
  }
};

// How many quads' products of codes with values of -127..127 can be added up in 16 bits; each quad
// contributes two to a sum. Zero: the set multiplies and adds directly in 32 bits.
template <class S, class Codes>
constexpr int quads_in_short() {
  if constexpr (!S::kHasShortSums || Codes::kMaxCode == 0) return 0;
  constexpr int kQuads = 32767 / (2 * 127 * (Codes::kMaxCode > 0 ? Codes::kMaxCode : 1));
  return kQuads >= 8 ? 8 : kQuads >= 4 ? 4 : kQuads >= 2 ? 2 : 0;
}

// Shifts `plane` so that bit `from` of each byte becomes bit `to`, and applies `mask`.
template <class S>
inline typename S::I moved_bits(typename S::I plane, int from, int to, int32_t mask) {
  const auto moved = from == to  ? plane
                     : from < to ? S::ishl(plane, to - from)
                                 : S::ishr(plane, from - to);
  return S::iand(moved, S::iset1(mask));
}

template <class S>
struct NibbleCodes : SmallCodes<S, 15> {
  static constexpr int kCodeBytes = 256;
  static TGI_INLINE typename S::I quad(const uint8_t* p, int j) {
    return moved_bits<S>(S::iload(p + 64 * (j % 4)), j / 4 * 4, 0, 0x0F0F0F0F);
  }
};

template <class S>
struct FiveBitCodes : SmallCodes<S, 31> {
  static constexpr int kCodeBytes = 320;
  static TGI_INLINE typename S::I quad(const uint8_t* p, int j) {
    const auto high = moved_bits<S>(S::iload(p + 256), j, 4, 0x10101010);
    return S::ior(NibbleCodes<S>::quad(p, j), high);
  }
};

template <class S>
struct SixBitCodes : SmallCodes<S, 63> {
  static constexpr int kCodeBytes = 384;
  static TGI_INLINE typename S::I quad(const uint8_t* p, int j) {
    const auto high = moved_bits<S>(S::iload(p + 256 + 64 * (j / 4)), j % 4 * 2, 4, 0x30303030);
    return S::ior(NibbleCodes<S>::quad(p, j), high);
  }
};

template <class S>
struct TwoBitCodes : SmallCodes<S, 3> {
  static constexpr int kCodeBytes = 128;
  static TGI_INLINE typename S::I quad(const uint8_t* p, int j) {
    return moved_bits<S>(S::iload(p + 64 * (j / 4)), j % 4 * 2, 0, 0x03030303);
  }
};

template <class S>
struct ThreeBitCodes : SmallCodes<S, 7> {
  static constexpr int kCodeBytes = 192;
  static TGI_INLINE typename S::I quad(const uint8_t* p, int j) {
    const auto high = moved_bits<S>(S::iload(p + 128), j, 2, 0x04040404);
    return S::ior(TwoBitCodes<S>::quad(p, j), high);
  }
};

template <class S>
struct ByteCodes {
  static constexpr int kMaxCode = 0;  // too large for 16-bit sums
  static constexpr bool kIsSigned = false;
  static constexpr int kCodeBytes = 512;
  static TGI_INLINE typename S::I quad(const uint8_t* p, int j) { return S::iload(p + 64 * j); }
  static inline typename S::I dot(typename S::I acc, typename S::I codes, typename S::I values) {
    return S::dot(acc, codes, values);
  }
};

// Nibbles that represent signed bytes. If the set cannot multiply signed bytes directly, the table
// holds the bytes plus 128.
struct ByteTable {
  int8_t values[16];
};

constexpr ByteTable table_of(const int8_t (&values)[16], bool is_signed) {
  ByteTable out = {};
  for (int i = 0; i < 16; ++i) {
    // value + 128 as a signed byte.
    const int with_128 = values[i] < 0 ? values[i] + 128 : values[i] - 128;
    out.values[i] = static_cast<int8_t>(is_signed ? values[i] : with_128);
  }
  return out;
}

constexpr int largest_of(const int8_t (&values)[16]) {
  int largest = 0;
  for (const int value : values) largest = std::max(largest, value < 0 ? -value : value);
  return largest;
}

template <class S, const int8_t (&Values)[16]>
struct CodebookCodes {
  static constexpr bool kIsSigned = S::kHasSignedDot;
  static constexpr int kZeroShift = kIsSigned ? -1 : 0;
  static constexpr int kCodeBytes = 256;
  static constexpr int kMaxCode = kIsSigned ? largest_of(Values) : 0;
  static constexpr ByteTable kTable = table_of(Values, kIsSigned);
  static TGI_INLINE typename S::I quad(const uint8_t* p, int j) {
    return S::lookup16(NibbleCodes<S>::quad(p, j), S::load_table(kTable.values));
  }
  static inline typename S::I dot(typename S::I acc, typename S::I codes, typename S::I values) {
    if constexpr (kIsSigned) return S::dot_signed(acc, codes, values);
    return S::dot(acc, codes, values);
  }
  static inline typename S::I short_sums(typename S::I codes, typename S::I values) {
    return S::short_sums_signed(codes, values);
  }
};

// The common base of code readers. weight = scale * (code - zero) + min. The zero point is 128 >>
// kZeroShift, or none if kZeroShift is negative, or each row's own. A block has one scale and min,
// or one per half; halves whose scales are small integers are added up as integers.
template <class S, class CodesOf, Format format>
struct CodeReader : CodesOf {
  static constexpr PanelInfo kPanel = format_info(format).panel;
  static constexpr int kZeroShift = -1;
  static constexpr bool kHasZeros = false;  // each row's own
  static constexpr bool kHasMin = false;
  static constexpr int kNumHalves = 1;
  static constexpr bool kHasIntegerScales = false;
  static_assert(CodesOf::kCodeBytes == 64 * kPanel.code_bits, "these are the codes of the table");

  struct Block {
    const uint8_t* codes;
    const uint8_t* header;
  };
  static inline Block block(const uint8_t* panel, int64_t b) {
    constexpr int64_t kBytes = kPanel.block_bytes(), kHeader = kPanel.header_bytes();
    if constexpr (kPanel.header_blocks == 0) return {panel + b * kBytes, nullptr};
    constexpr uint64_t kBlocks = kPanel.header_blocks > 0 ? kPanel.header_blocks : 1;
    const uint64_t index = static_cast<uint64_t>(b);  // so that the division is a shift
    const uint8_t* header = panel + index / kBlocks * (kHeader + kBlocks * kBytes);
    return {header + kHeader + index % kBlocks * kBytes, header};
  }
  // The i-th fp16 number, and the address of the i-th bytes.
  static inline typename S::F half(Block block, int i) {
    const bool is_in_block = kPanel.block_halves != 0;
    return S::load_half((is_in_block ? block.codes + CodesOf::kCodeBytes : block.header) + 32 * i);
  }
  static inline const uint8_t* factors(Block block, int i) {
    const uint8_t* p = kPanel.block_factors != 0
                           ? block.codes + CodesOf::kCodeBytes + 32 * kPanel.block_halves
                           : block.header + 32 * kPanel.header_halves;
    return p + 16 * i;
  }
  static inline typename S::F signed_factor(Block block, int i) {
    return S::to_float(S::load_i8(factors(block, i)));
  }
  static TGI_INLINE typename S::I quad(Block block, int j) { return CodesOf::quad(block.codes, j); }
  static inline typename S::I zeros(Block) { return S::izero(); }
  static inline typename S::F min(Block, int) { return S::zero(); }
};

template <class S, class CodesOf, Format format, int ZeroShift>
struct Scaled : CodeReader<S, CodesOf, format> {
  using Base = CodeReader<S, CodesOf, format>;
  static constexpr int kZeroShift = ZeroShift;
  static inline typename S::F scale(typename Base::Block block, int) {
    return Base::half(block, 0);
  }
};

template <class S, class CodesOf, Format format>
struct ScaledWithMin : Scaled<S, CodesOf, format, -1> {
  using Base = CodeReader<S, CodesOf, format>;
  static constexpr bool kHasMin = true;
  static inline typename S::F min(typename Base::Block block, int) { return Base::half(block, 1); }
};

// K-quants: fp16 numbers shared by eight blocks, times small integers per block. The products are
// exact.
template <class S, class CodesOf, Format format>
struct SuperWithMin : CodeReader<S, CodesOf, format> {
  using Base = CodeReader<S, CodesOf, format>;
  static constexpr bool kHasMin = true;
  static inline typename S::F scale(typename Base::Block block, int) {
    return S::mul(Base::half(block, 0), S::to_float(S::load_u8(Base::factors(block, 0))));
  }
  static inline typename S::F min(typename Base::Block block, int) {
    const auto factor = S::to_float(S::load_u8(Base::factors(block, 1)));
    return S::mul(Base::half(block, 1), S::sub(S::zero(), factor));
  }
};

template <class S, class CodesOf, Format format, int ZeroShift>
struct SuperHalves : CodeReader<S, CodesOf, format> {
  using Base = CodeReader<S, CodesOf, format>;
  static constexpr int kZeroShift = ZeroShift;
  static constexpr int kNumHalves = 2;
  static inline typename S::F scale(typename Base::Block block, int half) {
    return S::mul(Base::half(block, 0), Base::signed_factor(block, half));
  }
};

template <class S, Format format>
struct Int4 : Scaled<S, NibbleCodes<S>, format, -1> {
  using Base = CodeReader<S, NibbleCodes<S>, format>;
  static constexpr bool kHasZeros = true;
  static inline typename S::I zeros(typename Base::Block block) {
    return S::load_u8(Base::factors(block, 0));
  }
};

template <class S>
struct Q4_0 : Scaled<S, NibbleCodes<S>, Format::kQ4_0, 4> {};
template <class S>
struct Q4_1 : ScaledWithMin<S, NibbleCodes<S>, Format::kQ4_1> {};
template <class S>
struct Q5_0 : Scaled<S, FiveBitCodes<S>, Format::kQ5_0, 3> {};
template <class S>
struct Q5_1 : ScaledWithMin<S, FiveBitCodes<S>, Format::kQ5_1> {};
template <class S>
struct Q8_0 : Scaled<S, ByteCodes<S>, Format::kQ8_0, 0> {};
template <class S>
using Q8_1 = Q8_0<S>;  // identical, because panels do not store the sums

template <class S>
struct Q2_K : CodeReader<S, TwoBitCodes<S>, Format::kQ2_K> {
  using Base = CodeReader<S, TwoBitCodes<S>, Format::kQ2_K>;
  static constexpr bool kHasMin = true;
  static constexpr int kNumHalves = 2;
  static constexpr bool kHasIntegerScales = true;
  static inline typename S::I integer_scale(typename Base::Block block, int half) {
    return S::iand(S::load_u8(Base::factors(block, half)), S::iset1(15));
  }
  static inline typename S::F scale(typename Base::Block block, int half) {
    return S::mul(Base::half(block, 0), S::to_float(integer_scale(block, half)));
  }
  static inline typename S::F negative_min(typename Base::Block block, int half) {
    const auto high = S::ishr(S::load_u8(Base::factors(block, half)), 4);
    return S::mul(Base::half(block, 1), S::to_float(high));
  }
  static inline typename S::F min(typename Base::Block block, int half) {
    return S::sub(S::zero(), negative_min(block, half));
  }
};

template <class S>
struct Q3_K : SuperHalves<S, ThreeBitCodes<S>, Format::kQ3_K, 5> {
  using Base = CodeReader<S, ThreeBitCodes<S>, Format::kQ3_K>;
  static constexpr bool kHasIntegerScales = true;
  static inline typename S::I integer_scale(typename Base::Block block, int half) {
    return S::iand(S::load_i8(Base::factors(block, half)), S::iset1(0xFFFF));
  }
};

template <class S>
struct Q4_K : SuperWithMin<S, NibbleCodes<S>, Format::kQ4_K> {};
template <class S>
struct Q5_K : SuperWithMin<S, FiveBitCodes<S>, Format::kQ5_K> {};
template <class S>
struct Q6_K : SuperHalves<S, SixBitCodes<S>, Format::kQ6_K, 2> {};

template <class S>
using Iq4Codes = CodebookCodes<S, kIq4Values>;
template <class S>
struct IQ4_NL : Scaled<S, Iq4Codes<S>, Format::kIQ4_NL, Iq4Codes<S>::kZeroShift> {};

template <class S>
struct IQ4_XS : CodeReader<S, Iq4Codes<S>, Format::kIQ4_XS> {
  using Base = CodeReader<S, Iq4Codes<S>, Format::kIQ4_XS>;
  static constexpr int kZeroShift = Iq4Codes<S>::kZeroShift;
  static inline typename S::F scale(typename Base::Block block, int) {
    return S::mul(Base::half(block, 0), Base::signed_factor(block, 0));
  }
};

// Signed bytes that a table in the block's header has for nibbles.
template <class S>
struct BookCodes : NibbleCodes<S> {
  static constexpr bool kIsSigned = S::kHasSignedDot;
  static constexpr int kMaxCode = 0;  // may be too large for 16-bit sums
  static inline typename S::I dot(typename S::I acc, typename S::I codes, typename S::I values) {
    if constexpr (kIsSigned) return S::dot_signed(acc, codes, values);
    return S::dot(acc, codes, values);
  }
};

template <class S, Format format>
struct Book : CodeReader<S, BookCodes<S>, format> {
  using Base = CodeReader<S, BookCodes<S>, format>;
  static_assert(Base::kPanel.has_book, "the kernel reads it");
  static constexpr int kZeroShift = BookCodes<S>::kIsSigned ? -1 : 0;
  static constexpr int kNumHalves = Base::kPanel.block_factors;
  static TGI_INLINE typename S::I quad(typename Base::Block block, int j) {
    auto table = S::load_table(reinterpret_cast<const int8_t*>(block.header + kBookValues));
    if constexpr (kZeroShift == 0)  // plus 128
      table = S::ixor(table, S::iset1(static_cast<int32_t>(0x80808080u)), S::izero());
    return S::lookup16(NibbleCodes<S>::quad(block.codes, j), table);
  }
  static inline typename S::F scale(typename Base::Block block, int half) {
    const auto unit = S::load(reinterpret_cast<const float*>(block.header));
    return S::mul(unit, S::to_float(S::load_u8(Base::factors(block, half))));
  }
};
template <class S>
using IQ3_XXS = Book<S, Format::kIQ3_XXS>;
template <class S>
using IQ2_S = Book<S, Format::kIQ2_S>;
// The same kernels: the panels differ in their codebooks only.
template <class S>
using IQ1_S = IQ3_XXS<S>;
template <class S>
using IQ2_XXS = IQ3_XXS<S>;
template <class S>
using IQ3_S = IQ3_XXS<S>;
template <class S>
using IQ1_M = IQ2_S<S>;
template <class S>
using IQ2_XS = IQ2_S<S>;

template <class S>
struct MXFP4 : CodeReader<S, CodebookCodes<S, kMxfp4Values>, Format::kMXFP4> {
  using Base = CodeReader<S, CodebookCodes<S, kMxfp4Values>, Format::kMXFP4>;
  static constexpr int kZeroShift = CodebookCodes<S, kMxfp4Values>::kZeroShift;
  // 2^(e - 128), whose bits are (e - 1) << 23. For e = 0 and e = 1 it is denormal, with bits (e +
  // 1) << 21; for all other e that is the smaller number, so the maximum selects the right one.
  static inline typename S::F scale(typename Base::Block block, int) {
    const auto e = S::load_u8(Base::factors(block, 0));
    const auto normal = S::ishl(S::isub(e, S::iset1(1)), 23);
    return S::as_float(S::imax(normal, S::ishl(S::iadd(e, S::iset1(1)), 21)));
  }
};

template <class S>
struct FP4_16 : CodeReader<S, CodebookCodes<S, kMxfp4Values>, Format::kFP4_16> {
  using Base = CodeReader<S, CodebookCodes<S, kMxfp4Values>, Format::kFP4_16>;
  static constexpr int kZeroShift = CodebookCodes<S, kMxfp4Values>::kZeroShift;
  static constexpr int kNumHalves = 2;
  static inline typename S::F scale(typename Base::Block block, int half) {
    return Base::half(block, half);
  }
};

template <class S>
struct INT4_32 : Int4<S, Format::kINT4_32> {};
template <class S>
struct INT4_64 : Int4<S, Format::kINT4_64> {};
template <class S>
struct INT4_128 : Int4<S, Format::kINT4_128> {};

}  // namespace
}  // namespace tgi::cpu::step
