// The sets of kernels that this build has: one an instruction set. A process uses one for all
// shapes, because sets differ in the last bits.
#pragma once

#include <vector>

#include "step.h"

namespace tgi::cpu::step {

// Those that this machine runs, best last.
const std::vector<const Kernels*>& kernel_sets();

// Why a set that the processor has is not among them, or null.
const char* refused_kernel_set();

// The set in use: the best, or what the environment variable TGI_ISA names, if this machine runs
// that.
const Kernels& kernels();

// Uses one of kernel_sets() from now on. Not during a run.
void use_kernels(const Kernels& set);

}  // namespace tgi::cpu::step
