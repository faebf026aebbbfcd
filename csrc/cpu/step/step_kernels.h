// Makes a Kernels table from a simd type. Included last by the step_<isa>.cpp files.
#pragma once

#include "attention_kernel.h"
#include "linear_kernels.h"
#include "pack.h"
#include "qkv_kernel.h"

namespace tgi::cpu::step {
namespace {

template <class S>
void embed(const EmbedParams& p, const StepHeader& step, int member, int num_members) {
  const Range tokens = split(step.num_tokens, member, num_members, kTileTokens);
  for (int64_t t = tokens.begin; t < tokens.end; ++t) {
    unpack_row(p.table, step.ids[t], p.factor, p.x + t * p.table.num_columns);
  }
}

template <class S>
constexpr Kernels make_kernels(const char* name) {
  return {name,          embed<S>,   norm<S>,   qkv<S>,       attention<S>,
          linear_add<S>, gate_up<S>, logits<S>, dequantise<S>};
}

}  // namespace
}  // namespace tgi::cpu::step
