// Draws of rows that follow drafts.
#pragma once

#include <cstdint>

#include "params.h"

namespace tgi::cpu {

// Which rows of logits follow drafts. A slot has one row, or several in a row, of which each but
// the first was given a draft as the token before:
//
//     row      0         1         2         3
//     slot     5         5         5         2
//     drafts   -1        a         b         -1        5 may go on with a, then b
//     ahead    0         1         2         0
//     drawn    a         x         (y)       c         5 goes on with a, x; the draw of row 2 is
//     void
//
// Both [num_rows]; or null, where no row follows a draft.
struct DraftRows {
  const int32_t* drafts;
  const int32_t* ahead;
};

// As `sample` of sample.h, each row as if the drafts before it had been drawn.
void sample(const ::tgi::SampleParams& p, const DraftRows& drafts, int64_t num_rows,
            uint8_t* scratch, int member, int num_members);

// Moves the slots of all rows on by what `sample` has drawn, up to the first token of each that is
// not its draft. is_kept: [num_rows], whether the row's draw counts.
void keep_drawn(const ::tgi::SampleParams& p, const DraftRows& drafts, int64_t num_rows,
                bool* is_kept);

}  // namespace tgi::cpu
