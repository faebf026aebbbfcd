// LoRA adapters: each adds two small matrices to a model's products, for the rows that use it.
//
//   inner = scale * (x @ down.T)      [tokens, num_inner], float32
//   y    += inner @ up.T
//
// Source: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685.
#pragma once

#include <cstdint>

namespace tgi::cpu::step {

// Sixteen rows of `up`, those of one panel of the product's weight. Several matrices packed as one
// (q, k and v; gate and up) have separate inner values, stored one after the other.
struct AdapterPanel {
  const uint16_t* up;  // [num_inner][16 rows], bf16
  int32_t first_inner;
  int32_t num_inner;  // 0: these rows do not change
};

// The term that an adapter adds to one product.
struct AdapterTerm {
  int64_t num_inner;     // 0: nothing
  const uint16_t* down;  // [num_inner][columns of the product's weight], bf16
  const float* scales;   // [num_inner]
  const AdapterPanel* panels;
};

// Tokens [begin, end) of a step have this adapter.
struct AdapterSpan {
  int32_t begin;
  int32_t end;
  const AdapterTerm* terms;  // one per product
};

// Where a product finds its adapter terms.
struct AdapterPlace {
  int64_t product = 0;     // index of the product's term
  float* inner = nullptr;  // [tokens, stride]; null: no adapter applies to the product
  int64_t stride = 0;
};

}  // namespace tgi::cpu::step
