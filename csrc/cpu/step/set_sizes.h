// In which pieces a kernel set works, where its simd type says nothing else: accumulators of six
// tokens by two panels leave registers for what they are made of. Included by simd_*.h.
#pragma once

#include "packed.h"

namespace tgi::cpu::step {
namespace {

struct SetSizes {
  static constexpr bool kHasTiles = false;           // AMX's, see amx_set.h
  static constexpr int kGroupTokens = 6;             // multiplied together
  static constexpr int kTileTokens = kGroupTokens;   // of an activation: one group or several
  static constexpr int kSharedTokens = kTileTokens;  // of which one member writes all
  static constexpr int kBlocksAtOnce = 6;            // blocks that are quantised together
  // Up to so many tokens of a group are multiplied by both panels of a strip at once, more by one
  // after the other.
  static constexpr int paired_tokens(Precision) { return kGroupTokens; }
  // Rows of queries that attend together, in a cache of this precision.
  static constexpr int attention_rows(Precision) { return 6; }
};

}  // namespace
}  // namespace tgi::cpu::step
