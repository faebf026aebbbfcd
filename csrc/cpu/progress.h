// Whether the team gets on, for a watchdog on another thread.
#pragma once

#include <cstdint>

namespace tgi::cpu {

// Returns a number that changes whenever all members of a run meet: many times in a step, however
// slow the machine is, and never in one that hangs.
uint64_t team_progress();

}  // namespace tgi::cpu
