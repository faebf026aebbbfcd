// Gathers rows of the embedding table. One variant: it is a copy.
#include <cstring>

#include "kernels.h"
#include "simd.h"

namespace tgi::cpu {

void embed(const ::tgi::EmbedParams& p, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token) {
    const int64_t first = int64_t{p.ids[token]} * p.hidden;
    float* out = p.out + token * p.hidden;  // [hidden]
    if (p.table_type == FloatType::kFloat32) {
      std::memcpy(out, static_cast<const float*>(p.table) + first,
                  size_t(p.hidden) * sizeof(float));
    } else {
      const uint16_t* row = static_cast<const uint16_t*>(p.table) + first;
      for (int64_t i = 0; i < p.hidden; ++i) out[i] = portable::from_bfloat16(row[i]);
    }
  }
}

}  // namespace tgi::cpu
