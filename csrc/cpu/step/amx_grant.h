// Whether a process may use AMX tiles. Tiles enlarge the context of every thread: the processor
// must have them, the operating system must save them, and a process must request them.
#pragma once

namespace tgi::cpu::step {

struct AmxState {
  bool is_supported;   // the processor has tile products of bf16 and of bytes
  bool is_os_enabled;  // the operating system saves tiles when it switches threads
};

// Reads what the processor reports. In a file of its own, because a test replaces it.
AmxState read_amx_state();

// Requests the tiles from the operating system, for all present and future threads and for forked
// children. Returns false if the processor has none or the request is refused; `refused` gives the
// reason for a refusal.
bool request_tiles(AmxState state, const char** refused);

}  // namespace tgi::cpu::step
