#include "amx_grant.h"

#include <cerrno>

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace tgi::cpu::step {

bool request_tiles(AmxState state, const char** refused) {
  if (!state.is_supported) return false;
  if (!state.is_os_enabled) {
    *refused = "amx: the system does not keep the tiles of its threads";
    return false;
  }
#if defined(__x86_64__) && defined(__linux__)
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  if (syscall(SYS_arch_prctl, kRequest, kTileData) == 0) return true;
  *refused = errno == ENOSPC
                 ? "amx: a thread's signal stack is too small for its tiles (sigaltstack)"
                 : "amx: the system refused its tiles (arch_prctl)";
#endif
  return false;
}

}  // namespace tgi::cpu::step
