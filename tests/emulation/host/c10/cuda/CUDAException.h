// c10's check of CUDA's statuses, for launchers of emulated kernels.
#pragma once

#include <c10/util/Exception.h>

#define C10_CUDA_CHECK(status) TORCH_CHECK((status) == cudaSuccess, "the launch was refused")
