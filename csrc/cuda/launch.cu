// The switch for dependent launches.
#include "kernels.h"
#include "launch.cuh"

namespace tgi::cuda {

bool allows_dependent_launches = false;

void set_dependent_launches(bool is_on) { allows_dependent_launches = is_on; }

}  // namespace tgi::cuda
