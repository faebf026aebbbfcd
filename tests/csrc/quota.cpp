// Prints quota_cores(8) for a hierarchy and a membership file, or, with one argument, the usable
// cores of that topology.
#include <cstdio>

#include "cpu/platform.h"

int main(int count, char** arguments) {
  if (count == 2) {
    for (const int core : tgi::cpu::usable_cores(arguments[1])) std::printf("%d ", core);
    return 0;
  }
  std::printf("%d\n", tgi::cpu::quota_cores(8, arguments[1], arguments[2]));
}
