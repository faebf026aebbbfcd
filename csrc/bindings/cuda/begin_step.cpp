// torch binding of what completes a step's inputs on CUDA.
#include <torch/library.h>

#include <optional>

#include "bindings/cuda/checks.h"

namespace {

using at::kInt;
using at::Tensor;
using tgi::cuda::check_tensor;

void begin_step(const std::optional<Tensor>& records, const Tensor& from_slot,
                const Tensor& context_len, const Tensor& table_slots, const Tensor& table_firsts,
                const Tensor& table_starts, const Tensor& entries, int64_t block_size,
                const Tensor& ids, const Tensor& kept, const Tensor& tables) {
  tgi::cuda::BeginStepParams p = {};
  if (records) {
    check_tensor(*records, "records", at::kByte,
                 {-1, static_cast<int64_t>(sizeof(tgi::SampleSlot))});
    p.records = static_cast<const tgi::SampleSlot*>(records->const_data_ptr());
    p.num_slots = records->size(0);
  }
  check_tensor(context_len, "context_len", kInt, {-1});
  p.num_sequences = context_len.size(0);
  check_tensor(from_slot, "from_slot", kInt, {-1});
  check_tensor(table_slots, "table_slots", kInt, {p.num_sequences});
  check_tensor(table_firsts, "table_firsts", kInt, {p.num_sequences});
  check_tensor(table_starts, "table_starts", kInt, {p.num_sequences});
  check_tensor(entries, "entries", kInt, {-1});
  check_tensor(ids, "ids", kInt, {-1});
  check_tensor(kept, "kept", kInt, {-1, -1});
  check_tensor(tables, "tables", kInt, {p.num_sequences, kept.size(1)});
  p.num_decodes = from_slot.size(0);
  TORCH_CHECK(p.num_decodes <= p.num_sequences && p.num_decodes <= ids.size(0), "`from_slot` has ",
              p.num_decodes, " sequences, of ", p.num_sequences, " with ", ids.size(0), " `ids`");
  TORCH_CHECK(entries.size(0) > 0 && block_size > 0,
              "`entries` must not be empty, and `block_size` positive");
  p.from_slot = from_slot.const_data_ptr<int32_t>();
  p.context_len = context_len.const_data_ptr<int32_t>();
  p.table_slots = table_slots.const_data_ptr<int32_t>();
  p.table_firsts = table_firsts.const_data_ptr<int32_t>();
  p.table_starts = table_starts.const_data_ptr<int32_t>();
  p.entries = entries.const_data_ptr<int32_t>();
  p.ids = ids.mutable_data_ptr<int32_t>();
  p.kept = kept.mutable_data_ptr<int32_t>();
  p.tables = tables.mutable_data_ptr<int32_t>();
  p.num_entries = entries.size(0);
  p.num_tables = kept.size(0);
  p.stride = kept.size(1);
  p.block_size = block_size;
  tgi::cuda::run(tgi::cuda::begin_step, p, tables);
}

}  // namespace

TORCH_LIBRARY_IMPL(tgi_cuda, CUDA, m) { m.impl("begin_step", begin_step); }
