// Prefetching of data that a kernel will read from memory. Included by the step_<isa>.cpp files.
#pragma once

#include "step.h"

namespace tgi::cpu::step {
namespace {

// Prefetches into L1 if it allows enough misses in flight for the full bandwidth, else into L2,
// from which loads are a few cycles slower.
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
