#include "isa.h"
#include "kernels.h"
#include "rms_norm_impl.h"

TGI_DECLARE_VARIANTS(rms_norm, RmsNormParams)

namespace tgi::cpu {

void rms_norm(const RmsNormParams& p, int64_t begin, int64_t end) {
  TGI_VARIANT(rms_norm)(p, begin, end);
}

}  // namespace tgi::cpu
