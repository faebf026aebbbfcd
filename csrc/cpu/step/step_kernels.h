// Makes a Kernels table from a simd type. The step_<isa>.cpp files include it last.
#pragma once

#include "attention_kernel.h"
#include "channel_scan_kernel.h"
#include "delta_rule_kernel.h"
#include "experts_kernel.h"
#include "heads_linear_kernel.h"
#include "latent_qkv_kernel.h"
#include "linear_kernels.h"
#include "mlp_kernels.h"
#include "norm_kernel.h"
#include "pack.h"
#include "qkv_kernel.h"
#include "reorder_kernel.h"
#include "route_kernel.h"
#include "sample_rows.h"
#include "selective_scan_kernel.h"
#include "short_conv_kernel.h"

namespace tgi::cpu::step {
namespace {

template <class S>
void embed(const EmbedParams& p, const StepHeader& step, int member, int num_members) {
  const Range tokens = split(step.num_tokens, member, num_members);
  for (int64_t t = tokens.begin; t < tokens.end; ++t) {
    const int64_t width = p.table.num_columns;
    float* const x = p.x + t * width;
    unpack_row(p.table, step.ids[t], p.factor, x);
    if (p.positions == nullptr) continue;
    const float* const added = p.positions + step.positions[t] * width;
    for (int64_t k = 0; k < width; k += 16)
      S::store(x + k, S::add(S::load(x + k), S::load(added + k)));
  }
}

template <class S>
void embed_add(const EmbedAddParams& p, const StepHeader& step, int member, int num_members) {
  const int64_t width = p.table.num_columns;
  float* const added = p.scratch + member * width;
  const Range tokens = split(step.num_tokens, member, num_members);
  for (int64_t t = tokens.begin; t < tokens.end; ++t) {
    float* const rows = p.rows + t * width;
    unpack_row(p.table, step.ids[t], p.factor, added);
    for (int64_t k = 0; k < width; k += 16)
      S::store(rows + k, S::add(S::load(rows + k), S::load(added + k)));
  }
}

constexpr int kSpinRegisters = 12;  // more than latency times throughput on any processor

// The sums are also a factor; otherwise the compiler would multiply once for all of them.
template <class S>
inline typename S::I add_bytes(typename S::I sums, typename S::I codes) {
  if constexpr (S::kHasShortSums) return S::add_short(sums, S::short_sums(codes, sums));
  return S::dot(sums, codes, sums);
}

template <class S>
double spin_vectors(Precision precision, int64_t times) {
  typename S::I sums[kSpinRegisters];
  typename S::F totals[kSpinRegisters];
  TGI_UNROLL(12)
  for (int i = 0; i < kSpinRegisters; ++i) {
    sums[i] = S::iset1(i);  // all different, or the compiler would keep only one
    totals[i] = S::set1(static_cast<float>(i));
  }
  const auto codes = S::iset1(0x3F803F80);  // small bytes, and two bf16 of 1.0
  const auto one = S::set1(1.0f);
  for (int64_t n = 0; n < times; ++n) {
    TGI_UNROLL(12)
    for (int i = 0; i < kSpinRegisters; ++i) {
      if (precision == Precision::kInt8) {
        sums[i] = add_bytes<S>(sums[i], codes);
      } else if (precision == Precision::kBF16) {
        totals[i] = S::dot_bf16(totals[i], codes, codes);
      } else {
        totals[i] = S::fma(one, one, totals[i]);
      }
    }
  }
  auto all = S::zero();
  for (int i = 0; i < kSpinRegisters; ++i) {
    all = S::add(all, S::add(totals[i], S::to_float(sums[i])));
  }
  volatile const float sink = S::reduce_add(all);  // keeps the compiler from removing the loop
  static_cast<void>(sink);
  const int terms = precision == Precision::kInt8 ? 4 : precision == Precision::kBF16 ? 2 : 1;
  return 2.0 * static_cast<double>(times) * kSpinRegisters * 16 * terms;
}

// The same with tiles: products of sixteen tokens by sixteen rows and 32 columns.
template <class S>
double spin_tiles(Precision precision, int64_t times) {
  using T = typename S::Tiles;
  const bool is_bf16 = precision == Precision::kBF16;
  const TileScope<T> scope(is_bf16 ? bf16_tiles(kTileRows) : kInt8Tiles);
  for (int64_t n = 0; n < times; ++n) {
    if (is_bf16) {
      T::template dot_bf16<0, 4, 6>();
      T::template dot_bf16<1, 5, 7>();
    } else {
      T::template dot_int8<0, 4, 6>();
      T::template dot_int8<1, 5, 7>();
    }
  }
  return 2.0 * static_cast<double>(times) * 2 * kTileRows * kPanelRows * kBlockColumns;
}

template <class S>
double spin(Precision precision, int64_t times) {
  if constexpr (S::kHasTiles) {
    if (precision != Precision::kFloat32) return spin_tiles<S>(precision, times);
  }
  return spin_vectors<S>(precision, times);
}

template <class S>
constexpr Kernels make_kernels(const char* name) {
  return {name,
          S::kArithmetic,
          S::kTileTokens,
          [](Precision precision) -> int64_t { return S::attention_rows(precision); },
          embed<S>,
          embed_add<S>,
          norm<S>,
          norm_add<S>,
          pack<S>,
          reorder<S>,
          norm_rows<S>,
          linear_rows<S>,
          qkv<S>,
          head_rows<S>,
          store_heads<S>,
          heads_linear<S>,
          latent_qkv<S>,
          attention<S>,
          linear_add<S>,
          up<S>,
          gate_up<S>,
          act_mul<S>,
          activate_rows<S>,
          logits<S>,
          shrink<S>,
          route<S>,
          experts<S>,
          gated_add<S>,
          short_conv<S>,
          selective_scan<S>,
          channel_scan<S>,
          delta_rule<S>,
          gated_norm<S>,
          scratch_floats<S>,
          spin<S>,
          make_row_passes<S>()};
}

}  // namespace
}  // namespace tgi::cpu::step
