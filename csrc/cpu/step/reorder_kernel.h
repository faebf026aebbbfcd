// The input of a product whose weight has its columns in another order. Included only by the
// step_<isa>.cpp files.
#pragma once

#include "../team.h"
#include "simd_math.h"
#include "step.h"

namespace tgi::cpu::step {
namespace {

// Writes `Count` blocks of a row, starting at `block`, from a row of float32 tiles.
template <class S, int Count>
inline void write_reordered(const ReorderParams& p, const float* from, int64_t block,
                            const ActivationRow& to) {
  alignas(64) float values[Count * kBlockColumns];
  const int32_t* const places = p.places + block * kBlockColumns;
  for (int64_t k = 0; k < Count * kBlockColumns; ++k) values[k] = from[places[k]];
  typename S::F a[Count], b[Count];
  BlockSlot slots[Count];
  TGI_UNROLL(16)
  for (int i = 0; i < Count; ++i) {
    a[i] = S::load(values + i * kBlockColumns);
    b[i] = S::load(values + i * kBlockColumns + 16);
    slots[i] = slot_of<S>(to.part, to.row, block + i);
  }
  write_blocks<S, Count>(to.part.precision, a, b, slots);
}

// Many tokens are divided by rows, as each row is read all over. Few are divided by columns, or all
// but one member would wait for it; a block has cache lines of its own.
template <class S>
void reorder(const ReorderParams& p, const StepHeader& step, int member, int num_members) {
  Range rows = {0, step.num_tokens}, blocks = {0, p.out.num_columns / kBlockColumns};
  if (step.num_tokens >= num_members * S::kSharedTokens) {
    rows = split(step.num_tokens, member, num_members, S::kSharedTokens);
  } else {
    blocks = split(blocks.end, member, num_members);
  }
  Activation in = p.in;
  if (p.is_private && step.num_tokens <= kPrivateTokens) {
    in.data += member * in.tile_bytes(S::kTileTokens);
  }
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const BlockSlot first = slot_of<S>(in, row, 0);
    const float* const from =
        reinterpret_cast<const float*>(first.block) + first.slot * kBlockColumns;
    const ActivationRow to = row_of(p.out, step, row);
    for_each_batch<S>(blocks.end - blocks.begin, [&](auto n, int64_t at) {
      write_reordered<S, n>(p, from, blocks.begin + at, to);
    });
  }
}

}  // namespace
}  // namespace tgi::cpu::step
