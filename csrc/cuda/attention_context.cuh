// How decode attention splits contexts into chunks, and where chunks write their results.
#pragma once

#include "kernels.h"
#include "launch.cuh"

namespace tgi::cuda {

// Longer chunks write fewer results, shorter ones occupy more of the device if the batch is small:
// a prompt of 1,024 tokens with eight KV heads has 64 items. All are multiples of the kernels'
// tiles.
__host__ __device__ constexpr int64_t chunk_length(int64_t context) {
  return context <= 2048 ? 128 : context <= 8192 ? 256 : context <= 32768 ? 512 : 1024;
}

// The maximum number of chunks in a context of up to `longest`: a longer context has fewer than a
// shorter one just after its chunks have doubled.
__host__ __device__ constexpr int64_t max_chunks(int64_t longest) {
  const int64_t least = longest <= 2048 ? 0 : longest <= 8192 ? 16 : longest <= 32768 ? 32 : 64;
  const int64_t own = divide_narrow(longest + chunk_length(longest) - 1, chunk_length(longest));
  return least < own ? own : least;  // nvcc's `max` is not constexpr
}

// A sequence's context as the kernels see it: positions [begin, end) in chunks [first_chunk,
// first_chunk + count).
struct Context {
  int64_t begin;
  int64_t end;
  int64_t length;  // of a chunk

  __device__ __forceinline__ Context(const AttentionParams& p, int32_t context_len) {
    const int64_t longest = p.block_table_stride * p.block_size;
    end = min(max(int64_t{context_len}, int64_t{0}), longest);
    begin = p.window > 0 ? max(end - p.window, int64_t{0}) : 0;
    length = chunk_length(end);
  }
  __device__ __forceinline__ int64_t first_chunk() const { return divide_narrow(begin, length); }
  __device__ __forceinline__ int64_t num_chunks() const {
    return end == 0 ? 0 : divide_narrow(end + length - 1, length) - first_chunk();
  }
};

// The workspace: the chunks' results, which the second kernel merges. The plan holds the index of
// each sequence's first chunk.
struct Workspace {
  float* out;     // [chunk, num_heads, head_dim], not yet divided
  float2* stats;  // [chunk, num_heads]: maximum, sum

  __device__ __forceinline__ explicit Workspace(const AttentionParams& p) {
    out = static_cast<float*>(p.workspace);
    const int64_t chunks = p.num_sequences * max_chunks(p.block_table_stride * p.block_size);
    stats = reinterpret_cast<float2*>(out + chunks * p.num_heads * p.head_dim);
  }
};

template <typename Element, typename KvElement>
cudaError_t launch_decode(const AttentionParams& p, cudaStream_t stream);

}  // namespace tgi::cuda
