// Whether a process may use AMX's tiles. They are state that each thread's context grows by: the
// processor must have them, the system must keep them, and it must grant them to those who ask.
#pragma once

namespace tgi::cpu::step {

struct AmxState {
  bool is_there;  // products of bf16 and of bytes by tiles
  bool is_kept;   // by the system, when it switches threads
};

// What the processor says. A file of its own, as a test says otherwise.
AmxState read_amx_state();

// Asks the system for the tiles, for all threads that are and will be, and forked children's.
// False: they are not there, or why they are not ours is in `refused`.
bool request_tiles(AmxState state, const char** refused);

}  // namespace tgi::cpu::step
