#include "formats.h"

namespace tgi::cpu::step {

bool find_format(std::string_view name, Format* out) {
  for (int i = 0; i < kNumFormats; ++i) {
    if (name != table::kInfos[i].name) continue;
    *out = static_cast<Format>(i);
    return true;
  }
  return false;
}

}  // namespace tgi::cpu::step
