// Products through torch's GEMM, its rows of weights split over our team. torch's own threads stay
// out: they would fight the team for the cores.
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <exception>
#include <vector>

#include "bindings/checks.h"
#include "cpu/platform.h"
#include "cpu/team.h"

namespace {

using at::kFloat;
using at::Tensor;

constexpr int64_t kGrain = 32;  // rows of weights: two cache lines of a row of outputs

void matmul(const Tensor& a, const Tensor& weight, const std::optional<Tensor>& bias,
            const Tensor& out) {
  TORCH_CHECK(weight.scalar_type() == kFloat || weight.scalar_type() == at::kBFloat16,
              "`weight` must be float32 or bfloat16, got ", weight.scalar_type());
  tgi::check_tensor(weight, "weight", weight.scalar_type(), {-1, -1});
  tgi::check_tensor(a, "a", kFloat, {-1, weight.size(1)});
  tgi::check_tensor(out, "out", kFloat, {a.size(0), weight.size(0)});
  if (bias) tgi::check_tensor(*bias, "bias", kFloat, {weight.size(0)});
  if (out.numel() == 0) return;
  const Tensor input = a.to(weight.scalar_type());
  std::vector<std::exception_ptr> errors;
  const auto prepare = [&](int num_members) { errors.resize(static_cast<size_t>(num_members)); };
  tgi::cpu::run_on_team(prepare, [&](int member, int num_members) {
    try {
      thread_local const bool is_serial = (at::set_num_threads(1), true);
      static_cast<void>(is_serial);
      const at::AutoDispatchBelowAutograd below_autograd;
      const tgi::cpu::Range rows = tgi::cpu::split(weight.size(0), member, num_members, kGrain);
      if (rows.begin == rows.end) return;
      Tensor part = out.slice(1, rows.begin, rows.end);
      const Tensor turned = weight.slice(0, rows.begin, rows.end).t();
      if (weight.scalar_type() == kFloat) {
        at::mm_out(part, input, turned);
      } else {
        part.copy_(at::mm(input, turned));
      }
      if (bias) part.add_(bias->slice(0, rows.begin, rows.end));
    } catch (...) {
      errors[static_cast<size_t>(member)] = std::current_exception();
    }
  });
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

void advise_huge_pages(const Tensor& memory) {
  TORCH_CHECK(memory.is_contiguous(), "`memory` must be contiguous");
  tgi::cpu::advise_huge_pages(memory.mutable_data_ptr(), static_cast<int64_t>(memory.nbytes()));
}

}  // namespace

TORCH_LIBRARY_IMPL(tgi, CPU, m) {
  m.impl("matmul", matmul);
  m.impl("advise_huge_pages", advise_huge_pages);
}
