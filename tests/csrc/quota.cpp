// Prints quota_cores(8) for a hierarchy and a membership file given as arguments.
#include <cstdio>

#include "cpu/platform.h"

int main(int, char** arguments) {
  std::printf("%d\n", tgi::cpu::quota_cores(8, arguments[1], arguments[2]));
}
