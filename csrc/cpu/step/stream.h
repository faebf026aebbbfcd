// Fetching what a kernel will read from memory ahead of its use. Included by the step_<isa>.cpp
// files.
#pragma once

#include "step.h"

namespace tgi::cpu::step {
namespace {

// Into the first level of cache where that has enough misses in flight for the whole bandwidth,
// else into the second, from where loads are a few cycles late.
template <class S>
inline void fetch_stream(const void* p) {
  if (kStreamsIntoL1) {
    S::prefetch(p);
  } else {
    S::prefetch_l2(p);
  }
}

}  // namespace
}  // namespace tgi::cpu::step
