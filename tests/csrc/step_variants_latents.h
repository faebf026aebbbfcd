// Latent attention of each kernel set. Only step_variants.cpp includes this, inside its namespace.
#pragma once

// Runs latent_qkv for the same text and attention of three heads over it; returns the bytes of the
// cache, the queries and the results.
Bytes latents_and_attention(const Kernels& kernels, Precision precision,
                            const std::vector<float>& x) {
  constexpr int64_t kHeads = 3, kRank = 64, kRotary = 32, kWidth = kHeads * kRank;
  KvLayerView kv = {nullptr,         precision, 0,   (kContext + 15) / 16, 0, 16, 1,
                    kRank + kRotary, kRank,     true};
  kv.block_stride = kv.layer_bytes();
  Bytes pool(static_cast<size_t>(kv.num_blocks * kv.block_stride + kPoolSlack), 0xFF);  // NaN
  kv.data = pool.data();
  std::vector<float> angles(kContext * kRotary / 2), out(kContext * kWidth, NAN);
  for (size_t i = 0; i < angles.size(); ++i) {
    angles[i] = static_cast<float>(static_cast<int>(i % 97) - 48) / 64.0f;
  }
  const std::vector<float> norm(kRank, 0.75f);
  std::vector<float> query(kContext * kHeads * kv.head_dim);
  Text text(kv.num_blocks);
  StepHeader& step = text.step;
  split_attention(step, {{}, {kHeads, 1, kernels.attention_rows(precision)}}, 1, text.split);
  LatentQkvParams params = {};
  params.absorbed = params.latents = x.data();
  params.rotary = x.data() + 64;
  params.absorbed_stride = params.latent_stride = params.rotary_stride = kColumns;
  params.norm = norm.data();
  params.eps = 1e-5f;
  params.cosines = params.sines = angles.data();
  params.num_heads = kHeads;
  params.q_scale = 0.25f;
  params.q = query.data();
  params.kv = kv;
  for (int member = 0; member < 2; ++member) kernels.latent_qkv(params, step, member, 2);
  AttentionParams attention = {};
  attention.q = query.data();
  attention.kv = kv;
  attention.num_heads = kHeads;
  attention.true_dim = kRank;
  attention.rows = out.data();
  attention.stride = kWidth;
  kernels.attention(attention, step, 0, 1);
  Bytes found = pool;
  append(found, query);
  append(found, out);
  return found;
}
