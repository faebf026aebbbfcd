// Sampling of rows that follow draft tokens.
#pragma once

#include <cstdint>

#include "params.h"

namespace tgi::cpu {

// Says which rows of logits follow draft tokens. A slot has one row, or several consecutive rows,
// of which each but the first was computed with a draft as its preceding token:
//
//     row      0         1         2         3
//     slot     5         5         5         2
//     drafts   -1        a         b         -1        drafts of slot 5: a, then b
//     ahead    0         1         2         0
//     sampled  a         x         (y)       c         slot 5 gets a, x; row 2 is void
//
// Both arrays are [num_rows], or null if no row follows a draft.
struct DraftRows {
  const int32_t* drafts;
  const int32_t* ahead;
};

// A member's part of sampling `num_rows` rows, treating the drafts before a row as sampled. All
// members of a team call it, or a single caller as member 0 of 1. The rows' slots are not advanced.
// Each member samples whole rows by itself, and all members share the remaining rows; both ways
// yield the same bits. scratch: work memory for all members.
void sample(const ::tgi::SampleParams& p, const DraftRows& drafts, int64_t num_rows,
            uint8_t* scratch, int member, int num_members);

// Advances each row's slot by the tokens that `sample` has sampled, up to and including the first
// that differs from its draft. is_accepted: [num_rows], whether the row's sampled token counts.
void accept_drafts(const ::tgi::SampleParams& p, const DraftRows& drafts, int64_t num_rows,
                   bool* is_accepted);

}  // namespace tgi::cpu
