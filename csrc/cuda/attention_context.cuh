// How decode attention splits contexts into chunks, and where chunks write their results.
#pragma once

#include "kernels.h"
#include "launch.cuh"

namespace tgi::cuda {

__host__ __device__ constexpr int64_t chunk_length(int64_t context) {
  return context <= 8192 ? 256 : context <= 32768 ? 512 : 1024;
}

// The maximum number of chunks in a context of up to `longest`.
constexpr int64_t max_chunks(int64_t longest) {
  if (longest <= 8192) return ceil_divide<int64_t>(longest, 256);
  if (longest <= 32768) return max(int64_t{32}, ceil_divide<int64_t>(longest, 512));
  return max(int64_t{64}, ceil_divide<int64_t>(longest, 1024));
}

// A sequence's context as the kernels see it: positions [begin, end) in chunks [first_chunk,
// first_chunk + count).
struct Context {
  int64_t begin;
  int64_t end;
  int64_t length;  // of a chunk

  __device__ __forceinline__ Context(const AttentionParams& p, int64_t sequence) {
    const int64_t longest = p.block_table_stride * p.block_size;
    end = min(max(int64_t{p.context_len[sequence]}, int64_t{0}), longest);
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
    const int64_t chunks = p.num_sequences * max_chunks_on_device(p);
    stats = reinterpret_cast<float2*>(out + chunks * p.num_heads * p.head_dim);
  }
  static __device__ __forceinline__ int64_t max_chunks_on_device(const AttentionParams& p) {
    const int64_t longest = p.block_table_stride * p.block_size;
    const int64_t least = longest <= 8192 ? 0 : longest <= 32768 ? 32 : 64;
    return max(least, divide_narrow(longest + chunk_length(longest) - 1, chunk_length(longest)));
  }
};

template <typename Element, typename KvElement>
cudaError_t launch_decode(const AttentionParams& p, cudaStream_t stream);

}  // namespace tgi::cuda
