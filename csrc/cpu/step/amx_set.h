// The simd type of kernel sets that have tiles. Included only by step_amx.cpp and
// step_amx_model.cpp, after simd_avx512.h.
#pragma once

#include "amx_tiles.h"
#include "step_kernels.h"

namespace tgi::cpu::step {
namespace {

template <class TilesOf>
struct WithTiles : Avx512 {
  using Tiles = TilesOf;
  static constexpr const char* kArithmetic = "tdpbf16ps";
  static constexpr bool kHasTiles = true;
  static constexpr int kTileTokens = 16;
  static constexpr int kSharedTokens = 4;
  static constexpr int attention_rows(Precision precision) {
    return precision == Precision::kBF16 ? 16 : Avx512::attention_rows(precision);
  }
};

}  // namespace
}  // namespace tgi::cpu::step
