// Preloaded into a process, records which thread first touches each page of an arena's pieces
// (64 MiB). Pages start without access rights; the fault handler records a touch and opens the
// page.
#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>

namespace {

constexpr size_t kPiece = size_t{64} << 20, kPage = 4096, kPages = kPiece / kPage;

std::atomic<uint8_t*> piece{nullptr};  // the latest
std::atomic<int32_t> toucher[kPages];

void note_touch(int number, siginfo_t* info, void*) {
  uint8_t* const begin = piece.load();
  const auto at = static_cast<size_t>(static_cast<uint8_t*>(info->si_addr) - begin);
  if (begin == nullptr || at >= kPiece) {  // a real fault, which will recur
    signal(number, SIG_DFL);
    return;
  }
  int32_t nobody = 0;
  toucher[at / kPage].compare_exchange_strong(nobody, static_cast<int32_t>(syscall(SYS_gettid)));
  mprotect(begin + at / kPage * kPage, kPage, PROT_READ | PROT_WRITE);
}

void* map(void* address, size_t size, int rights, int flags, int file, off_t offset) {
  return reinterpret_cast<void*>(syscall(SYS_mmap, address, size, rights, flags, file, offset));
}

}  // namespace

extern "C" {

void* mmap(void* address, size_t size, int rights, int flags, int file, off_t offset) noexcept {
  const bool is_piece = size == kPiece && (flags & MAP_ANONYMOUS) != 0 && address == nullptr;
  void* const found = map(address, size, is_piece ? PROT_NONE : rights, flags, file, offset);
  if (is_piece && found != MAP_FAILED) piece = static_cast<uint8_t*>(found);
  return found;
}

void* mmap64(void* address, size_t size, int rights, int flags, int file, off64_t offset) noexcept {
  return mmap(address, size, rights, flags, file, offset);
}

void begin_watch() {
  struct sigaction action = {};
  action.sa_sigaction = note_touch;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGSEGV, &action, nullptr);
}

// Writes the thread that first touched each page, or 0, and starts a new record.
void take_touches(int32_t* out) {
  for (size_t i = 0; i < kPages; ++i) out[i] = toucher[i].exchange(0);
  mprotect(piece, kPiece, PROT_NONE);
}
}
