// The launchers that the bindings call, as emulated kernels: the functions of shim.cpp, which are
// in a library that has no torch.
#include <dlfcn.h>

#include <cstdint>
#include <mutex>
#include <stdexcept>
#include <string>

#include "cuda/dependent_launch.h"
#include "cuda/kernels.h"

namespace {

void* library = nullptr;
std::mutex running;  // the emulator runs one kernel at a time
void (*observer)(const char*) = nullptr;

template <class Function>
Function* function(const std::string& name) {
  void* const found = library == nullptr ? nullptr : dlsym(library, ("emu_" + name).c_str());
  if (found == nullptr) throw std::runtime_error("the emulation has no " + name);
  return reinterpret_cast<Function*>(found);
}

cudaError_t launch(const char* name, const void* params) {
  if (observer != nullptr) observer(name);
  const std::lock_guard<std::mutex> lock(running);
  function<void(uint64_t)>("seed")(1);
  const int status = function<int(const void*)>(name)(params);
  const std::string reports = function<const char*()>("reports")();
  if (!reports.empty()) throw std::runtime_error(std::string(name) + ": " + reports);
  return status;
}

}  // namespace

// Opens the library of emulated kernels; before any launch.
extern "C" __attribute__((visibility("default"))) void emu_open(const char* path) {
  library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw std::runtime_error(dlerror());
}

// Calls a function with the name of each kernel that is launched, after "follow_library" if it
// does; null: none.
extern "C" __attribute__((visibility("default"))) void emu_observe(void (*function)(const char*)) {
  observer = function;
}

namespace tgi::cuda {

#define LAUNCHER(name, Params) \
  cudaError_t name(const Params& params, cudaStream_t) { return launch(#name, &params); }

LAUNCHER(begin_step, BeginStepParams)
LAUNCHER(embed, EmbedParams)
LAUNCHER(norm, NormParams)
LAUNCHER(activate, ActivateParams)
LAUNCHER(rope_kv_write, RopeParams)
LAUNCHER(attention_plan, AttentionParams)
LAUNCHER(attention_decode, AttentionParams)
LAUNCHER(attention_prefill, AttentionParams)
LAUNCHER(attention_gather, AttentionGatherParams)
LAUNCHER(attention_merge, AttentionMergeParams)
LAUNCHER(linear, LinearParams)
LAUNCHER(quant_linear, QuantLinearParams)
LAUNCHER(dequantise, DequantiseParams)
LAUNCHER(quantise, QuantiseParams)
LAUNCHER(lora_down, LoraDownParams)
LAUNCHER(lora_up, LoraUpParams)
LAUNCHER(route, RouteParams)
LAUNCHER(experts_plan, ExpertsPlanParams)
LAUNCHER(experts_product, ExpertsProductParams)
LAUNCHER(experts_sum, ExpertsSumParams)
LAUNCHER(residual_add, ResidualAddParams)
LAUNCHER(gated_add, GatedAddParams)
LAUNCHER(sample, SampleParams)
LAUNCHER(draft_slots, DraftSlotsParams)
LAUNCHER(accept_drafts, DraftSlotsParams)
LAUNCHER(token_logprobs, TokenLogprobsParams)

int64_t attention_workspace_bytes(int64_t num_sequences, int64_t block_table_stride,
                                  int64_t block_size, int64_t num_heads, int64_t head_dim) {
  using Function = int64_t(int64_t, int64_t, int64_t, int64_t, int64_t);
  return function<Function>("attention_workspace_bytes")(num_sequences, block_table_stride,
                                                         block_size, num_heads, head_dim);
}

int64_t sample_workspace_bytes(int64_t num_rows) {
  return function<int64_t(int64_t)>("sample_workspace_bytes")(num_rows);
}

int64_t experts_max_tiles(int64_t num_pairs, int64_t num_experts, bool is_streamed) {
  return function<int64_t(int64_t, int64_t, bool)>("experts_max_tiles")(num_pairs, num_experts,
                                                                        is_streamed);
}

void set_dependent_launches(bool) {}

void follow_library() {
  if (observer != nullptr) observer("follow_library");
}

}  // namespace tgi::cuda
