// Paged, variable-length, causal attention: one kernel for prefill and decode.
//
// The work of one KV head is a list of tiles, each up to kTileRows query rows of one sequence (row
// = token * group + query head in the group), and a tile is a list of chunks of kChunk positions at
// absolute boundaries. A unit is (KV head, tile, chunk); members take contiguous ranges of units. A
// chunk is reduced alone and chunk results are merged in order, so a row's bits depend on nothing
// but its own sequence.
#pragma once

#include <cstdint>
#include <vector>

#include "params.h"

namespace tgi::cpu {

constexpr int64_t kChunk = 256;
constexpr int64_t kMaxTileRows = 16;

struct AttentionTile {
  int64_t first_unit;  // within a KV head
  int32_t sequence;
  int32_t first_row;
  int32_t num_rows;
  int32_t num_chunks;
};

struct AttentionPlan {
  std::vector<AttentionTile> tiles;  // ascending in first_unit
  int64_t units_per_head = 0;
  int64_t max_chunks = 0;  // of one tile
  int64_t num_units = 0;
};

// Cuts the work. Once a step: the plan is the same in every layer.
void attention_plan(const ::tgi::AttentionParams& p, AttentionPlan& plan);

// Floats of work memory for a team of num_members.
int64_t attention_workspace(const ::tgi::AttentionParams& p, const AttentionPlan& plan,
                            int num_members);

// Computes the member's units; tiles that lie wholly in them are written to p.out.
void attention(const ::tgi::AttentionParams& p, const AttentionPlan& plan, float* workspace,
               int member, int num_members);

// After all members have returned from attention(): finishes the tile, if any, that this member
// began and others continued.
void attention_finish(const ::tgi::AttentionParams& p, const AttentionPlan& plan, float* workspace,
                      int member, int num_members);

// Units [begin, end) for one member; the state of a tile that is begun but not completed goes to
// `carried`, chunks of a tile that another member began go to `parts`, one after the other.
struct AttentionShare {
  const AttentionTile* tiles;
  int64_t units_per_head;
  int64_t begin;
  int64_t end;
  float* carried;
  float* parts;
};

// A tile's running softmax, or one chunk's: maximum, sum, and values [num_rows, head_dim] not yet
// divided.
constexpr int64_t attention_part_floats(int64_t head_dim) { return kMaxTileRows * (head_dim + 2); }

namespace portable {
void attention_share(const ::tgi::AttentionParams& p, const AttentionShare& share);
void attention_merge(const ::tgi::AttentionParams& p, const AttentionTile& tile, int64_t head,
                     float* state, const float* const* parts, int64_t num_parts);
}  // namespace portable
namespace avx2 {
void attention_share(const ::tgi::AttentionParams& p, const AttentionShare& share);
void attention_merge(const ::tgi::AttentionParams& p, const AttentionTile& tile, int64_t head,
                     float* state, const float* const* parts, int64_t num_parts);
}  // namespace avx2
namespace avx512 {
void attention_share(const ::tgi::AttentionParams& p, const AttentionShare& share);
void attention_merge(const ::tgi::AttentionParams& p, const AttentionTile& tile, int64_t head,
                     float* state, const float* const* parts, int64_t num_parts);
}  // namespace avx512

}  // namespace tgi::cpu
