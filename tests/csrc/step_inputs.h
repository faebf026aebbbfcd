// Helpers for step_variants.cpp: random rows of every format, inputs of products, and results as
// bytes.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <random>
#include <vector>

#include "cpu/step/block_reader.h"
#include "cpu/step/step.h"

namespace {

using namespace tgi::cpu::step;  // NOLINT

constexpr int64_t kColumns = 256, kRows = 96, kTokens = 39, kContext = 300;
using Bytes = std::vector<uint8_t>;

constexpr int kMaxZero = 128;  // of INT4's zero points, which follow the scale

// Makes rows of random blocks. Each block is made again until its largest weight is in [2^-8, 1],
// so that scales are valid in every format, wherever it stores them.
Bytes random_rows(Format format, std::mt19937& random) {
  const FormatInfo& info = format_info(format);
  Bytes rows(kRows * file_row_bytes(format, kColumns));
  std::vector<float> weights(info.block_columns);
  const bool has_zero =
      format == Format::kINT4_32 || format == Format::kINT4_64 || format == Format::kINT4_128;
  for (size_t at = 0; at < rows.size(); at += info.block_bytes) {
    float largest = 0.0f;
    while (!(largest > 0x1p-8f && largest < 1.0f)) {
      for (int64_t i = 0; i < info.block_bytes; ++i) rows[at + i] = static_cast<uint8_t>(random());
      if (has_zero) rows[at + 2] %= kMaxZero + 1;
      decode_row(format, &rows[at], info.block_columns, weights.data());
      largest = 0.0f;
      for (const float weight : weights)
        largest = std::max(largest, std::isfinite(weight) ? std::fabs(weight) : INFINITY);
    }
  }
  return rows;
}

std::vector<int32_t> count_up(int64_t size) {
  std::vector<int32_t> all(static_cast<size_t>(size));
  for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<int32_t>(i);
  return all;
}

// A tiled input of products, aligned as the kernels require.
struct Input {
  Input(const Kernels& kernels, Precision precision, int64_t columns, int64_t tokens)
      : tile_tokens(kernels.tile_tokens), num_tokens(tokens) {
    view = {nullptr, precision, columns};
    const int64_t tiles = (tokens + tile_tokens - 1) / tile_tokens;
    bytes.resize(static_cast<size_t>(tiles * view.tile_bytes(tile_tokens) + 64));
    view.data = bytes.data() + (64 - reinterpret_cast<uintptr_t>(bytes.data()) % 64) % 64;
  }
  // Appends the values of each token, independent of the tile size.
  void append_to(Bytes& out) const {
    const bool is_int8 = view.precision == Precision::kInt8;
    const int64_t size = is_int8 ? kBlockColumns : tile_block_bytes(view.precision, 1);
    for (int64_t token = 0; token < num_tokens; ++token) {
      for (int64_t b = 0; b < view.num_columns / kBlockColumns; ++b) {
        const uint8_t* const block = view.block(token, b, tile_tokens);
        const int64_t slot = token % tile_tokens;
        out.insert(out.end(), block + slot * size, block + (slot + 1) * size);
        if (!is_int8) continue;
        const uint8_t* const numbers = block + token_numbers(tile_tokens) + slot * kTokenNumbers;
        out.insert(out.end(), numbers, numbers + kTokenNumbers);
      }
    }
  }
  Bytes bytes;
  Activation view;
  int64_t tile_tokens, num_tokens;
};

void append(Bytes& out, const std::vector<float>& values) {
  const auto* const bytes = reinterpret_cast<const uint8_t*>(values.data());
  out.insert(out.end(), bytes, bytes + values.size() * sizeof(float));
}

Bytes joined(std::initializer_list<const std::vector<float>*> parts) {
  Bytes out;
  for (const std::vector<float>* part : parts) append(out, *part);
  return out;
}

}  // namespace
