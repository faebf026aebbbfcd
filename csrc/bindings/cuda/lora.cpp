// torch bindings of the operators of LoRA adapters on CUDA.
#include <torch/library.h>

#include "bindings/cuda/checks.h"

namespace {

using at::kFloat;
using at::kInt;
using at::Tensor;
using tgi::cuda::check_tensor;
using tgi::cuda::check_type;
using tgi::cuda::LoraDownParams;
using tgi::cuda::LoraProduct;
using tgi::cuda::LoraUpParams;
using tgi::cuda::run;

// Checks a step's adapters and the pool. The places are data of the device, which nothing checks.
LoraProduct make_product(const Tensor& adapters, const Tensor& places, const Tensor& pool,
                         int64_t product, int64_t rank, int64_t columns, const Tensor& inner) {
  const auto type = check_type(pool, "pool");
  check_tensor(pool, "pool", pool.scalar_type(), {-1, -1});
  check_tensor(places, "places", kInt, {pool.size(0), -1, 2});
  check_tensor(adapters, "adapters", kInt, {-1});
  check_tensor(inner, "inner", kFloat, {adapters.size(0), -1});
  TORCH_CHECK(0 <= product && product < places.size(1), "`product` must be in [0, ", places.size(1),
              "), got ", product);
  TORCH_CHECK(columns > 0 && columns % 8 == 0, "a product has a multiple of 8 columns, got ",
              columns);
  TORCH_CHECK(rank > 0 && rank % 8 == 0, "`rank` must be a multiple of 8, got ", rank);
  TORCH_CHECK(inner.size(1) % rank == 0, "`inner` must have a multiple of ", rank, " columns, got ",
              inner.size(1));
  TORCH_CHECK(pool.size(1) % 8 == 0, "`pool` must have a multiple of 8 columns, got ",
              pool.size(1));
  return {
      .adapters = adapters.const_data_ptr<int32_t>(),
      .places = places.const_data_ptr<int32_t>(),
      .pool = pool.const_data_ptr(),
      .num_tokens = adapters.size(0),
      .num_slots = pool.size(0),
      .num_products = places.size(1),
      .product = product,
      .slot_stride = pool.size(1),
      .num_columns = columns,
      .rank = rank,
      .type = type,
  };
}

void lora_down(const Tensor& x, const Tensor& adapters, const Tensor& places, const Tensor& pool,
               int64_t product, int64_t rank, const Tensor& inner) {
  check_tensor(x, "x", pool.scalar_type(), {adapters.size(0), -1});
  const LoraDownParams params = {
      .product = make_product(adapters, places, pool, product, rank, x.size(1), inner),
      .x = x.const_data_ptr(),
      .inner = inner.mutable_data_ptr<float>(),
      .num_inner = inner.size(1),
  };
  run(tgi::cuda::lora_down, params, inner);
}

void lora_up(const Tensor& inner, const Tensor& adapters, const Tensor& places, const Tensor& pool,
             int64_t product, int64_t rank, int64_t columns, int64_t first_end, int64_t second_end,
             double factor, const Tensor& out) {
  const bool is_wide = out.scalar_type() == kFloat;
  check_tensor(out, "out", is_wide ? kFloat : pool.scalar_type(), {inner.size(0), -1});
  const int64_t num_rows = out.size(1);
  TORCH_CHECK(0 <= first_end && first_end <= second_end && second_end <= num_rows &&
                  (num_rows | first_end | second_end) % 2 == 0,
              "`first_end` and `second_end` must be even numbers of rows in order, up to ",
              num_rows, ", got ", first_end, " and ", second_end);
  const int64_t num_pieces = 1 + (first_end < num_rows) + (second_end < num_rows);
  const LoraProduct of_product =
      make_product(adapters, places, pool, product, rank, columns, inner);
  TORCH_CHECK(inner.size(1) == num_pieces * rank, "`inner` must have ", num_pieces * rank,
              " columns, got ", inner.size(1));
  const LoraUpParams params = {
      .product = of_product,
      .inner = inner.const_data_ptr<float>(),
      .out = out.mutable_data_ptr(),
      .num_rows = num_rows,
      .num_inner = inner.size(1),
      .first_end = first_end,
      .second_end = second_end,
      .factor = static_cast<float>(factor),
      .is_wide = is_wide,
  };
  run(tgi::cuda::lora_up, params, out);
}

}  // namespace

TORCH_LIBRARY_IMPL(tgi_cuda, CUDA, m) {
  m.impl("lora_down", lora_down);
  m.impl("lora_up", lora_up);
}
