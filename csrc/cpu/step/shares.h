// How products divide a weight's strips among the team's members. Packing and reading use the same
// division, so the member that reads a page is the first to write it. On NUMA machines the
// operating system then places the page in memory close to that member's core.
#pragma once

#include <cstdint>

#include "../team.h"

namespace tgi::cpu::step {

// Where a member's share of the units of queries, keys and values begins. In decode, keys are
// written a few bytes per cache line, so a unit of keys or values takes half as long again; in
// prefill, tokens of a prompt write to the same lines.
inline int64_t qkv_share(bool is_decode, int64_t query_units, int64_t num_units, int member,
                         int num_members) {
  const int64_t query_cost = 2, cost = is_decode ? 3 : 2;
  const int64_t queries = query_cost * query_units;
  const int64_t before = (queries + cost * (num_units - query_units)) * member / num_members;
  if (before <= queries) return (before + query_cost / 2) / query_cost;
  return query_units + (before - queries + cost / 2) / cost;
}

// How a matrix is divided, which depends on the product it belongs to. Members own whole units.
struct Shares {
  int64_t unit_strips = 1;
  // For the QKV product: strips of queries, and of queries, keys and values together; 0: another
  // product.
  int64_t query_strips = 0;
  int64_t all_strips = 0;
  int64_t first_strip = 0;  // this matrix's first strip among all_strips

  // A member's strips, in decode, of a matrix of `num_strips` strips.
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
