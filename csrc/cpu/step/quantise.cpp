#include "quantise.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "pack.h"

namespace tgi::cpu::step {

namespace {

// Largest magnitude whose scale fits in a float16, even with four bits.
constexpr float kLargest = 65504.0f * 8;

// The loops below have no branches and no calls, so that they are vectorised.

// Returns the nearest integer, halves away from zero, as std::round does.
int rounded(float x) {
  const int whole = static_cast<int>(x);
  const float rest = x - static_cast<float>(whole);
  return whole + (rest >= 0.5f) - (rest <= -0.5f);
}

float write_scale(float scale, uint8_t* out) {
  const uint16_t half = float_to_half(scale);
  std::memcpy(out, &half, 2);
  return scale == 0.0f ? 0.0f : 1.0f / scale;
}

// x: 32 values, `largest` the greatest of their magnitudes.
void quantise_q8_0(const float* x, float largest, uint8_t* out) {
  const float inverse = write_scale(largest / 127.0f, out);
  for (int k = 0; k < 32; ++k) out[2 + k] = static_cast<uint8_t>(rounded(x[k] * inverse));
}

void quantise_q4_0(const float* x, float largest, uint8_t* out) {
  // The first of the largest values has the code 0, whatever its sign.
  const float* const first =
      std::find_if(x, x + 31, [largest](float value) { return std::fabs(value) == largest; });
  const float inverse = write_scale(*first / -8.0f, out);
  for (int k = 0; k < 16; ++k) {
    const int low = static_cast<int>(x[k] * inverse + 8.5f),
              high = static_cast<int>(x[16 + k] * inverse + 8.5f);
    out[2 + k] = static_cast<uint8_t>(std::min(low, 15) | std::min(high, 15) << 4);
  }
}

// Returns the greatest magnitude of 32 values; as for integers, NaN is above all others.
float largest_magnitude(const float* x) {
  int32_t largest = 0;
  for (int k = 0; k < 32; ++k) {
    int32_t bits;
    std::memcpy(&bits, x + k, 4);
    largest = std::max(largest, bits & 0x7FFFFFFF);
  }
  float magnitude;
  std::memcpy(&magnitude, &largest, 4);
  return magnitude;
}

}  // namespace

bool quantise_row(Format format, const float* x, int64_t columns, uint8_t* out) {
  for (int64_t at = 0; at < columns; at += 32, out += format_info(format).block_bytes) {
    float block[32] = {};
    std::memcpy(block, x + at,
                sizeof(float) * static_cast<size_t>(std::min<int64_t>(columns - at, 32)));
    const float largest = largest_magnitude(block);
    if (!(largest <= kLargest)) return false;
    if (format == Format::kQ8_0) {
      quantise_q8_0(block, largest, out);
    } else {
      quantise_q4_0(block, largest, out);
    }
  }
  return true;
}

}  // namespace tgi::cpu::step
