// How products share a weight's strips out over the team's members: the same when a weight is
// packed as when it is read, so that a member reads what it has written first. The system then has
// those pages in memory near to that member's core, where memories differ.
#pragma once

#include <cstdint>

#include "../team.h"

namespace tgi::cpu::step {

// Where a member's part of the units of queries, keys and values begins. Sequences that decode
// write keys a few bytes a line, so that a unit of keys or values takes half as long again; tokens
// of a prompt write to the same lines.
inline int64_t qkv_share(bool is_decode, int64_t query_units, int64_t num_units, int member,
                         int num_members) {
  const int64_t query_cost = 2, cost = is_decode ? 3 : 2;
  const int64_t queries = query_cost * query_units;
  const int64_t before = (queries + cost * (num_units - query_units)) * member / num_members;
  if (before <= queries) return (before + query_cost / 2) / query_cost;
  return query_units + (before - queries + cost / 2) / cost;
}

// Of which product a matrix is. Members have whole units.
struct Shares {
  int64_t unit_strips = 1;
  // Of queries, keys and values: strips of queries, and of all three; 0: of no such product.
  int64_t query_strips = 0;
  int64_t all_strips = 0;
  int64_t first_strip = 0;  // the matrix's, of all

  // A member's strips of a matrix of so many, when it decodes.
  Range of(int64_t num_strips, int member, int num_members) const {
    if (all_strips == 0) {
      const Range units = split(num_strips / unit_strips, member, num_members);
      return {units.begin * unit_strips, units.end * unit_strips};
    }
    const auto border = [&](int which) {
      const int64_t unit =
          qkv_share(true, query_strips / unit_strips, all_strips / unit_strips, which, num_members);
      const int64_t strip = unit * unit_strips - first_strip;
      return strip < 0 ? 0 : strip < num_strips ? strip : num_strips;
    };
    return {border(member), border(member + 1)};
  }
};

}  // namespace tgi::cpu::step
