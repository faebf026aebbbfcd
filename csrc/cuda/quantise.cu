// Activations as E4M3 codes, for products of FP8 with FP8: value = code * scale, with one scale per
// token or per 128 columns of a token. The largest magnitude becomes 448, the largest code.
#include "kernels.h"
#include "reduce.cuh"
#include "vec.cuh"

namespace tgi::cuda {
namespace {

constexpr float kMaxCode = 448.0f;
// A scale is at least this, so that its inverse is finite. Values below are lost, as zeros.
constexpr float kMinScale = 0x1p-120f;

// Returns the larger number, or NaN if one of them is.
struct Larger {
  __device__ __forceinline__ float operator()(float a, float b) const {
    return a >= b || a != a ? a : b;
  }
};

// Eight values of a row.
struct Eight {
  float at[8];

  template <typename Element>
  __device__ __forceinline__ void load(const Element* from) {
    load8(from, at);
  }
  __device__ __forceinline__ float largest() const {
    float found = 0;
#pragma unroll
    for (const float x : at) found = Larger()(found, fabsf(x));
    return found;
  }
  __device__ __forceinline__ void store(float inverse, uint8_t* to) const {
    uint32_t words[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      words[i] = Pair<fp8>::pack(at[4 * i] * inverse, at[4 * i + 1] * inverse) |
                 uint32_t(Pair<fp8>::pack(at[4 * i + 2] * inverse, at[4 * i + 3] * inverse)) << 16;
    }
    *reinterpret_cast<uint2*>(to) = uint2{words[0], words[1]};
  }
};

constexpr int kMaxThreads = 1024;
constexpr int kVectors = 4;  // of eight values, per thread
static_assert(kMaxThreads * kVectors * 8 == kMaxQuantised);

// One block per token, with the row in registers.
template <typename Element>
__global__ void __launch_bounds__(kMaxThreads, 1) quantise_tokens_kernel(QuantiseParams p) {
  allow_next_kernel();
  wait_for_previous_kernel();
  SHARED_ARRAY(float, scratch, kMaxThreads / kWarpSize);
  const int64_t token = blockIdx.x;
  const Element* row = static_cast<const Element*>(p.x) + token * p.num_columns;
  Eight values[kVectors] = {};
  float largest = 0;
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const int64_t column = (int64_t{k} * blockDim.x + threadIdx.x) * 8;
    if (column < p.num_columns) values[k].load(row + column);
    largest = Larger()(largest, values[k].largest());
  }
  largest = block_reduce(largest, Larger(), scratch);
  const float scale = Larger()(kMinScale, __fdividef(largest, kMaxCode));
  if (threadIdx.x == 0) p.scales[token] = scale;
  const float inverse = __fdividef(1.0f, scale);
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const int64_t column = (int64_t{k} * blockDim.x + threadIdx.x) * 8;
    if (column < p.num_columns) values[k].store(inverse, p.codes + token * p.num_columns + column);
  }
}

constexpr int kGroup = 128;
constexpr int kGroupLanes = kGroup / 8;
constexpr int kGroupThreads = 256;

// Sixteen lanes have a group of a token's columns.
template <typename Element>
__global__ void __launch_bounds__(kGroupThreads) quantise_groups_kernel(QuantiseParams p) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const int64_t token = blockIdx.x;
  const int64_t column = (int64_t{blockIdx.y} * kGroupThreads + threadIdx.x) * 8;
  const int64_t place = token * p.num_columns + column;
  const int64_t padded = ceil_divide(p.num_tokens, kTokenMultiple) * kTokenMultiple;
  const bool exists = column < p.num_columns;
  Eight values = {};
  if (exists) values.load(static_cast<const Element*>(p.x) + place);
  float largest = values.largest();
#pragma unroll
  for (int lanes = kGroupLanes / 2; lanes > 0; lanes /= 2) {
    largest = Larger()(largest, __shfl_xor_sync(kAllLanes, largest, lanes));
  }
  const float scale = Larger()(kMinScale, __fdividef(largest, kMaxCode));
  if (!exists) return;
  if (threadIdx.x % kGroupLanes == 0)
    p.scales[divide_narrow(column, kGroup) * padded + token] = scale;
  values.store(__fdividef(1.0f, scale), p.codes + place);
}

template <typename Element>
cudaError_t launch_type(const QuantiseParams& p, cudaStream_t stream) {
  if (p.has_groups) {
    const dim3 grid(unsigned(p.num_tokens),
                    unsigned(ceil_divide<int64_t>(p.num_columns, 8 * kGroupThreads)));
    return launch_dependent(quantise_groups_kernel<Element>, grid, dim3(kGroupThreads), 0, stream,
                            p);
  }
  const int64_t warps = ceil_divide<int64_t>(p.num_columns, 8 * kVectors * kWarpSize);
  return launch_dependent(quantise_tokens_kernel<Element>, dim3(unsigned(p.num_tokens)),
                          dim3(unsigned(warps * kWarpSize)), 0, stream, p);
}

}  // namespace

cudaError_t quantise(const QuantiseParams& p, cudaStream_t stream) {
  const bool fits = p.has_groups ? p.num_columns % kGroup == 0
                                 : p.num_columns % 8 == 0 && p.num_columns <= kMaxQuantised;
  if (!fits) return cudaErrorInvalidValue;
  if (p.num_tokens == 0 || p.num_columns == 0) return cudaSuccess;
  return p.type == Type::kBfloat16 ? launch_type<bf16>(p, stream) : launch_type<fp16>(p, stream);
}

}  // namespace tgi::cuda
