// Tensor-core primitives: fragments are gathered into matrices according to the tables of the PTX
// ISA (9.7.15.5.8, the m16n8k16 fragments, and 9.7.15.5.15, ldmatrix), computed on, and distributed
// again.
#include "machine.h"

namespace emu {
namespace {

float to_float(uint16_t bits, Element element) {
  if (element == Element::kBfloat16) return from_bits<float>(uint32_t(bits) << 16);
  _Float16 half;
  std::memcpy(&half, &bits, sizeof(half));
  return float(half);
}

struct MmaArgument {
  Element element;
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

uint16_t half_of(uint32_t word, int which) { return uint16_t(word >> (16 * which)); }

void compute_mma(void* const* arguments, uint32_t mask) {
  if (mask != 0xffffffffu) return report("mask", machine.current->site, "mma needs the whole warp");
  float a[16][16], b[16][8], d[16][8];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const auto& argument = *static_cast<MmaArgument*>(arguments[lane]);
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 4; ++i) {
        a[group + i % 2 * 8][pair + i / 2 * 8 + half] =
            to_float(half_of(argument.a[i], half), argument.element);
      }
      for (int i = 0; i < 2; ++i) {
        b[pair + i * 8 + half][group] = to_float(half_of(argument.b[i], half), argument.element);
      }
    }
  }
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      d[row][column] = sum;
    }
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    float* out = static_cast<MmaArgument*>(arguments[lane])->d;
    for (int i = 0; i < 4; ++i) out[i] += d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  }
}

struct LoadArgument {
  uint32_t* out;
  uint16_t row[8];
  bool is_transposed;
};

void compute_load(void* const* arguments, uint32_t mask) {
  if (mask != 0xffffffffu)
    return report("mask", machine.current->site, "ldmatrix needs the whole warp");
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const auto& argument = *static_cast<LoadArgument*>(arguments[lane]);
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint32_t word = 0;
      for (int half = 0; half < 2; ++half) {
        int row = lane / 4, column = lane % 4 * 2 + half;
        if (argument.is_transposed) std::swap(row, column);
        const auto& source = *static_cast<LoadArgument*>(arguments[matrix * 8 + row]);
        word |= uint32_t(source.row[column]) << (16 * half);
      }
      argument.out[matrix] = word;
    }
  }
}

}  // namespace

void mma_m16n8k16(Element element, float* d, const uint32_t* a, const uint32_t* b) {
  MmaArgument argument = {element, d, a, b};
  collective(0xffffffffu, compute_mma, &argument, __builtin_return_address(0));
}

void load_matrix_x4(uint32_t* out, const void* row, bool is_transposed) {
  const void* site = __builtin_return_address(0);
  if (reinterpret_cast<uintptr_t>(row) % 16) report("align", site, "a row of ldmatrix at %p", row);
  check_access(row, 16, false, false, site);
  LoadArgument argument = {out, {}, is_transposed};
  std::memcpy(argument.row, row, 16);
  collective(0xffffffffu, compute_load, &argument, site);
}

}  // namespace emu
