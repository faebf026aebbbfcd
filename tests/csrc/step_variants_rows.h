// Operators of each kernel set that read and write plain rows. Only step_variants.cpp includes
// this, inside its namespace.
#pragma once

// Returns norms and functions of rows of several widths, norms of groups of their columns, and rows
// added by their gates.
Bytes rows_of(const Kernels& kernels, const std::vector<float>& x) {
  StepHeader step = {};
  step.num_tokens = kTokens;
  Bytes found;
  for (const int64_t width : {5, 32, 77, 123, 256}) {
    for (const bool has_bias : {false, true}) {
      std::vector<float> out(kTokens * kColumns, NAN);
      for (int member = 0; member < 3; ++member) {
        kernels.norm_rows({x.data(), kColumns, x.data() + 9, has_bias ? x.data() + 300 : nullptr,
                           width, 1, 1e-5f, out.data(), kColumns},
                          step, member, 3);
      }
      append(found, out);
    }
    for (const auto kind : {tgi::MlpActivation::kSilu, tgi::MlpActivation::kGeluTanh,
                            tgi::MlpActivation::kGelu, tgi::MlpActivation::kRelu,
                            tgi::MlpActivation::kReluSquared, tgi::MlpActivation::kXielu}) {
      std::vector<float> out(kTokens * width, NAN);
      kernels.activate({x.data(), kColumns, width, {kind, 0.8f, 0.6f}, out.data()}, step, 0, 1);
      append(found, out);
    }
  }
  std::vector<float> groups(kTokens * kColumns, NAN);
  for (int member = 0; member < 3; ++member) {
    kernels.norm_rows({x.data(), kColumns, x.data() + 9, nullptr, kColumns / 4, 4, 1e-5f,
                       groups.data(), kColumns},
                      step, member, 3);
  }
  append(found, groups);
  std::vector<float> sums(kTokens * kColumns, 3.0f);
  kernels.gated_add({x.data(), x.data() + 40, kColumns, kColumns, 0.75f, sums.data()}, step, 0, 1);
  append(found, sums);
  return found;
}

// Returns embedded rows of a weight, and its products with one part of the input per head.
Bytes parts_of(const Kernels& kernels, const PackedMatrix& weight, Precision precision,
               const std::vector<float>& x) {
  constexpr int64_t kHeads = 3;
  std::vector<int32_t> ids = count_up(kTokens), positions(ids);
  for (int32_t& id : ids) id = static_cast<int32_t>(kRows - 1 - 2 * id);
  StepHeader step = {};
  step.num_tokens = kTokens;
  step.ids = ids.data();
  step.positions = positions.data();
  std::vector<float> embedded(kTokens * kColumns, NAN), placed(embedded);
  kernels.embed({weight, 1.0f, embedded.data(), nullptr}, step, 0, 1);
  kernels.embed({weight, 0.7f, placed.data(), x.data()}, step, 0, 1);
  std::vector<float> added(x.begin(), x.begin() + kTokens * kColumns), unpacked(3 * kColumns);
  for (int member = 0; member < 3; ++member) {
    kernels.embed_add({weight, 0.3f, unpacked.data(), added.data()}, step, member, 3);
  }
  Input input(kernels, precision, kHeads * kColumns, kTokens);
  kernels.pack({x.data(), kHeads * kColumns, kHeads * kColumns, input.view}, step, 0, 1);
  std::vector<float> scratch(scratch_of(kernels, weight, precision, 1));
  std::vector<float> out(kTokens * kRows, NAN);
  kernels.heads_linear(
      {{weight, nullptr, input.view, 0, scratch.data(), 0}, kHeads, out.data(), kRows}, step, 0, 1);
  return joined({&embedded, &placed, &added, &out});
}

// Returns queries, and the cache's keys and values, of two heads that are stored as they are.
Bytes stored_heads(const Kernels& kernels, Precision precision, int64_t head_dim,
                   const std::vector<float>& x) {
  constexpr int64_t kHeads = 2;
  const int64_t kept_dim = precision == Precision::kInt8 ? kStripRows * 2 : head_dim;
  KvLayerView kv = {nullptr,  precision, 0,    (kContext + 15) / 16, 0, 16, kHeads,
                    kept_dim, kept_dim,  false};
  kv.block_stride = kv.layer_bytes();
  Bytes pool(static_cast<size_t>(kv.num_blocks * kv.block_stride + kPoolSlack));
  Bytes query(static_cast<size_t>(kContext * kHeads * kv.query_bytes() + kPoolSlack));
  kv.data = pool.data();
  Text text(kv.num_blocks);
  const auto heads = [&](int64_t first) {
    return PlainHeads{x.data() + first, kColumns, 64, head_dim};
  };
  for (int member = 0; member < 3; ++member) {
    kernels.store_heads({heads(0), heads(7), heads(64), 0.25f, query.data(), kHeads, kv}, text.step,
                        member, 3);
  }
  Bytes found = pool;
  found.insert(found.end(), query.begin(), query.end());
  return found;
}
