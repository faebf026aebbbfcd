// Adapters: what a request adds to a model's products, by two small matrices each, as rows have it.
//
//   inner = scale * (x @ down.T)      [tokens, num_inner], float32
//   y    += inner @ up.T
//
// Source: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685.
#pragma once

#include <cstdint>

namespace tgi::cpu::step {

// Sixteen rows of `up`, those of a panel of the product's weight. Several matrices that are packed
// as one (q, k and v; gate and up) have inner values of their own, one behind the other.
struct AdapterPanel {
  const uint16_t* up;  // [num_inner][16 rows], bf16
  int32_t first_inner;
  int32_t num_inner;  // 0: these rows stay as they are
};

// What an adapter adds to one product.
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
  const AdapterTerm* terms;  // one a product
};

// Where a product finds what adapters add to it.
struct AdapterPlace {
  int64_t product = 0;     // which of the terms is its own
  float* inner = nullptr;  // [tokens, stride]; null: no adapter changes the product
  int64_t stride = 0;
};

}  // namespace tgi::cpu::step
