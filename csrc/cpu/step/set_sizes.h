// Default tile sizes of a kernel set, for simd types that do not override them. Accumulators of six
// tokens by two panels leave enough registers for their operands. Included by simd_*.h.
#pragma once

#include "packed.h"

namespace tgi::cpu::step {
namespace {

struct SetSizes {
  static constexpr bool kHasTiles = false;           // AMX tiles, see amx_set.h
  static constexpr bool kHasBF16Dot = false;         // one instruction; else dot_bf16 is two fma
  static constexpr bool kStoresBF16Pairs = false;    // store_bf16 also takes two vectors
  static constexpr bool kDecodesCodes = false;       // can decode codes for many tokens
  static constexpr int kGroupTokens = 6;             // multiplied together
  static constexpr int kTileTokens = kGroupTokens;   // of an activation: one or more groups
  static constexpr int kSharedTokens = kTileTokens;  // tokens written entirely by one member
  static constexpr int kBlocksAtOnce = 6;            // blocks quantised together
  // Groups of up to this many tokens are multiplied by both panels of a strip at once, larger ones
  // by one panel after the other.
  static constexpr int paired_tokens(Precision) { return kGroupTokens; }
  // Query rows processed together by attention over a cache of this precision.
  static constexpr int attention_rows(Precision) { return 6; }
};

}  // namespace
}  // namespace tgi::cpu::step
