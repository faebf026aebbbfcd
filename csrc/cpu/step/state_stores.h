// How recurrent layers write their states. Included only by the step_<isa>.cpp files.
//
// A token that advances a state reads it from one place and writes it to another. The next step
// reads it there after all weights of the model, which have evicted it from the caches by then. So
// it is written past them, without fetching the lines first, which saves a third of the traffic.
#pragma once

#include <cstdint>

#include "states.h"

namespace tgi::cpu::step {
namespace {

// Whether a span writes each number of its state once, to whole lines.
inline bool streams_state(const StateSpan& span, const float* to) {
  return span.from >= 0 && span.from != span.to && span.end == span.begin + 1 &&
         reinterpret_cast<uintptr_t>(to) % 64 == 0;
}

// Writes 16 numbers of a state; call `S::end_stream()` after the last.
template <class S, bool Streams>
inline void store_state(float* to, typename S::F state) {
  if constexpr (Streams) {
    S::stream(to, state);
  } else {
    S::store(to, state);
  }
}

}  // namespace
}  // namespace tgi::cpu::step
