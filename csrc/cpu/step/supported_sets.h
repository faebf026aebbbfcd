// The kernel sets that this processor and system can run, whether or not they are in this build.
// The build asks as well (setup.py), so that this file's sources include no kernels.
#pragma once

#include <vector>

namespace tgi::cpu::step {

struct SupportedSets {
  std::vector<const char*> names;  // best last
  const char* refused = nullptr;   // why a set that the processor supports is not among them
};

SupportedSets supported_sets();

}  // namespace tgi::cpu::step
