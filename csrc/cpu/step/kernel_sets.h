// The kernel sets in this build, one per instruction set. A process uses one set for all shapes,
// because sets differ in the last bits.
#pragma once

#include <vector>

#include "step.h"

namespace tgi::cpu::step {

// Returns the sets of this build that this machine can run, best last. Empty if it was made on a
// machine with another processor.
const std::vector<const Kernels*>& kernel_sets();

// Returns why the best set that the processor supports is not among them, or null.
const char* refused_kernel_set();

// Returns the set in use: the best, or the one named by the environment variable TGI_ISA if this
// machine can run it.
const Kernels& kernels();

// Switches to one of kernel_sets(). Must not be called during a run.
void use_kernels(const Kernels& set);

}  // namespace tgi::cpu::step
