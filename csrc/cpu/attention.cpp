#include "attention.h"

#include <algorithm>

#include "attention_impl.h"
#include "isa.h"
#include "team.h"

namespace tgi::cpu {

namespace {

// Rows a tile: a multiple of common groups, all of a larger group up to 16.
int64_t tile_rows(int64_t group) { return std::clamp<int64_t>(group, 12, kMaxTileRows); }

// What a member may have to store of a tile that another began: never more than it computes.
int64_t parts_capacity(const AttentionPlan& plan, int num_members) {
  return std::min(plan.max_chunks, (plan.num_units + num_members - 1) / num_members);
}

float* member_workspace(const ::tgi::AttentionParams& p, const AttentionPlan& plan,
                        float* workspace, int member, int num_members) {
  const int64_t parts = 1 + parts_capacity(plan, num_members);
  return workspace + member * parts * attention_part_floats(p.head_dim);
}

}  // namespace

void attention_plan(const ::tgi::AttentionParams& p, AttentionPlan& plan) {
  const int64_t group = p.num_heads / p.num_kv_heads, rows_a_tile = tile_rows(group);
  plan.tiles.clear();
  plan.max_chunks = 0;
  int64_t unit = 0;
  for (int64_t s = 0; s < p.num_sequences; ++s) {
    const int64_t num_queries = p.query_start[s + 1] - p.query_start[s];
    const int64_t num_rows = num_queries * group;
    for (int64_t row = 0; row < num_rows; row += rows_a_tile) {
      const int64_t rows = std::min(rows_a_tile, num_rows - row);
      const int64_t visible = p.context_len[s] - num_queries + (row + rows - 1) / group + 1;
      const int64_t chunks = (visible + kChunk - 1) / kChunk;
      plan.tiles.push_back({unit, static_cast<int32_t>(s), static_cast<int32_t>(row),
                            static_cast<int32_t>(rows), static_cast<int32_t>(chunks)});
      plan.max_chunks = std::max(plan.max_chunks, chunks);
      unit += chunks;
    }
  }
  plan.units_per_head = unit;
  plan.num_units = unit * p.num_kv_heads;
}

int64_t attention_workspace(const ::tgi::AttentionParams& p, const AttentionPlan& plan,
                            int num_members) {
  return num_members * (1 + parts_capacity(plan, num_members)) * attention_part_floats(p.head_dim);
}

void attention(const ::tgi::AttentionParams& p, const AttentionPlan& plan, float* workspace,
               int member, int num_members) {
  const Range units = split(plan.num_units, member, num_members);
  if (units.begin == units.end) return;
  float* own = member_workspace(p, plan, workspace, member, num_members);
  const AttentionShare share = {plan.tiles.data(),
                                plan.units_per_head,
                                units.begin,
                                units.end,
                                own,
                                own + attention_part_floats(p.head_dim)};
  TGI_VARIANT(attention_share)(p, share);
}

void attention_finish(const ::tgi::AttentionParams& p, const AttentionPlan& plan, float* workspace,
                      int member, int num_members) {
  const Range units = split(plan.num_units, member, num_members);
  if (units.begin == units.end) return;
  // The tile of this member's last unit: is it begun here, and completed elsewhere?
  const int64_t head = (units.end - 1) / plan.units_per_head,
                last = (units.end - 1) % plan.units_per_head;
  const auto after = std::upper_bound(
      plan.tiles.begin(), plan.tiles.end(), last,
      [](int64_t unit, const AttentionTile& tile) { return unit < tile.first_unit; });
  const AttentionTile& tile = *(after - 1);
  const int64_t tile_begin = head * plan.units_per_head + tile.first_unit;
  const int64_t tile_end = tile_begin + tile.num_chunks;
  if (tile_begin < units.begin || tile_end == units.end) return;
  std::vector<const float*> parts;
  parts.reserve(static_cast<size_t>(tile_end - units.end));
  for (int other = member + 1; other < num_members; ++other) {
    const Range theirs = split(plan.num_units, other, num_members);
    if (theirs.begin >= tile_end) break;
    const float* part = member_workspace(p, plan, workspace, other, num_members);
    for (int64_t unit = theirs.begin; unit < std::min(theirs.end, tile_end); ++unit) {
      part += attention_part_floats(p.head_dim);
      parts.push_back(part);
    }
  }
  float* state = member_workspace(p, plan, workspace, member, num_members);
  TGI_VARIANT(attention_merge)(p, tile, head, state, parts.data(),
                               static_cast<int64_t>(parts.size()));
}

}  // namespace tgi::cpu
