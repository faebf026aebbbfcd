// Prints the kernel sets that this machine can run, best last, for a build that compiles no others.
#include "cpu/step/supported_sets.h"

#include <cstdio>

int main() {
  for (const char* name : tgi::cpu::step::supported_sets().names) std::printf("%s\n", name);
}
