// Prints which kernel set kernel_sets.cpp chooses on a processor that reports AMX, with dummy
// kernels, if the system refuses or grants AMX.
//     amx_grant <is there> <is kept> <system's answer: an errno, 0 for granted, -1 for its own>
// Prints four lines: the sets, the chosen one, the one of a forked child, and the refusal.
#include "cpu/step/amx_grant.h"

#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstddef>
#include <cstdio>
#include <cstdlib>

#include "cpu/step/kernel_sets.h"

namespace tgi::cpu::step {

namespace {

AmxState simulated_state;

double spin(Precision, int64_t) { return 0.0; }  // as fast as any other

Kernels named(const char* name, const char* arithmetic) {
  Kernels kernels = {};
  kernels.name = name;
  kernels.arithmetic = arithmetic;
  kernels.spin = spin;
  return kernels;
}

}  // namespace

AmxState read_amx_state() { return simulated_state; }

extern const Kernels kPortableKernels = named("portable", "fma");
extern const Kernels kAvx2Kernels = named("avx2", "fma");
extern const Kernels kAvxVnniKernels = named("avx_vnni", "fma");
extern const Kernels kAvx512VnniKernels = named("avx512_vnni", "fma");
extern const Kernels kAvx512Kernels = named("avx512", "vdpbf16ps");
extern const Kernels kAmxKernels = named("amx", "tdpbf16ps");
extern const Kernels kAmxModelKernels = named("amx_model", "tdpbf16ps");

}  // namespace tgi::cpu::step

namespace {

// Makes the system answer arch_prctl(ARCH_REQ_XCOMP_PERM) with `error` without executing it.
bool answer_requests(unsigned error) {
  const sock_filter program[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_arch_prctl, 0, 3),
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, args)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, 0x1023, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | error),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  const sock_fprog filter = {sizeof(program) / sizeof(program[0]),
                             const_cast<sock_filter*>(program)};
  return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 &&
         prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter) == 0;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 4) return 2;
  tgi::cpu::step::simulated_state = {std::atoi(arguments[1]) != 0, std::atoi(arguments[2]) != 0};
  const int answer = std::atoi(arguments[3]);
  if (answer >= 0 && !answer_requests(static_cast<unsigned>(answer))) return 77;
  for (const tgi::cpu::step::Kernels* set : tgi::cpu::step::kernel_sets()) {
    std::printf("%s ", set->name);
  }
  std::printf("\n%s\n", tgi::cpu::step::kernels().name);
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    std::printf("%s\n", tgi::cpu::step::kernels().name);
    return 0;
  }
  int status = 1;
  if (waitpid(child, &status, 0) != child || status != 0) return 1;
  const char* const refused = tgi::cpu::step::refused_kernel_set();
  std::printf("%s\n", refused == nullptr ? "" : refused);
}
