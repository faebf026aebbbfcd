// Completes the inputs of a step with what is on the device: the tokens that its sequences sampled
// last, and the block tables of their slots.
//
//     slot 5 keeps    7 2 9 .        entries of the step    4
//     its sequence                   in this step           7 2 9 4
//     slot 5 keeps    7 2 9 4
//
// The host sends the entries of the blocks that a step writes to, one for a sequence that decodes:
// for 128 tables of 128k tokens that is 0.5 KB, and all of them are 4 MB.
#include "kernels.h"
#include "launch.cuh"

namespace tgi::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kColumns = 4;  // of a thread: loads in flight

// A block copies consecutive columns of one sequence's table.
__global__ void __launch_bounds__(kThreads, 4) begin_step_kernel(BeginStepParams p) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const int64_t sequence = blockIdx.x;
  if (blockIdx.y == 0 && threadIdx.x == 0 && sequence < p.num_decodes) {
    const int64_t slot = p.from_slot[sequence];
    if (slot >= 0 && slot < p.num_slots) p.ids[sequence] = p.records[slot].last_id;
  }
  const int64_t slot = p.table_slots[sequence];
  if (slot < 0 || slot >= p.num_tables) return;
  const int64_t length = max(p.context_len[sequence], 0);
  const int64_t num_columns = min(divide_narrow(length + p.block_size - 1, p.block_size), p.stride);
  const int64_t first_new = p.table_firsts[sequence];
  const int64_t ahead = p.table_starts[sequence] - first_new;  // of a column's place in `entries`
  int32_t* kept = p.kept + slot * p.stride;
  int32_t* table = p.tables + sequence * p.stride;
  const int64_t first = int64_t{blockIdx.y} * kThreads * kColumns + threadIdx.x;
  int32_t blocks[kColumns];
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    const int64_t column = first + i * kThreads;
    if (column >= num_columns) continue;
    const int64_t place = min(max(column + ahead, int64_t{0}), p.num_entries - 1);
    blocks[i] = column < first_new ? kept[column] : p.entries[place];
  }
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    const int64_t column = first + i * kThreads;
    if (column >= num_columns) continue;
    table[column] = blocks[i];
    if (column >= first_new) kept[column] = blocks[i];
  }
}

}  // namespace

cudaError_t begin_step(const BeginStepParams& p, cudaStream_t stream) {
  const bool fits = p.num_decodes <= p.num_sequences && p.block_size > 0 && p.num_entries > 0 &&
                    (p.records != nullptr || p.num_slots == 0);
  if (!fits) return cudaErrorInvalidValue;
  if (p.num_sequences == 0) return cudaSuccess;
  const dim3 grid(unsigned(p.num_sequences),
                  unsigned(ceil_divide<int64_t>(max(p.stride, int64_t{1}), kThreads * kColumns)));
  return launch_dependent(begin_step_kernel, grid, dim3(kThreads), 0, stream, p);
}

}  // namespace tgi::cuda
