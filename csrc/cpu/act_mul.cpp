#include "act_mul_impl.h"
#include "isa.h"
#include "kernels.h"

TGI_DECLARE_VARIANTS(act_mul, ActMulParams)

namespace tgi::cpu {

void act_mul(const ActMulParams& p, int64_t begin, int64_t end) {
  TGI_VARIANT(act_mul)(p, begin, end);
}

}  // namespace tgi::cpu
