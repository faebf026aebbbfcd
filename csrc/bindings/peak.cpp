// What the arithmetic units can do at most, measured: the floor that benchmarks hold products
// against.
#include <torch/library.h>

#include <chrono>

#include "bindings/packed.h"
#include "cpu/step/step.h"
#include "cpu/team.h"

namespace {

namespace step = tgi::step;
using step::Precision;

// Operations a second of the whole team at the instruction behind products of this precision: two a
// multiply-add.
double arithmetic_peak(c10::string_view precision_name) {
  constexpr int64_t kTimes = 4000000, kRegisters = 12, kLanes = 16;
  const Precision precision = tgi::precision_of(precision_name);
  const int64_t terms = precision == Precision::kInt8 ? 4 : precision == Precision::kBF16 ? 2 : 1;
  int members = 1;
  float sink = 0;
  const auto start = std::chrono::steady_clock::now();
  tgi::cpu::run_on_team([&](int member, int num_members) {
    const float sum = step::kernels().spin(precision, kTimes);
    if (member == 0) {
      members = num_members;
      sink = sum;
    }
  });
  const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
  TORCH_CHECK(sink == sink, "the sum of the peak's loop is a number");
  return 2.0 * static_cast<double>(kTimes * kRegisters * kLanes * terms * members) / taken.count();
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tgi, m) {
  m.def("arithmetic_peak(str precision) -> float", arithmetic_peak);
}
