// What the plan and the two products of routed experts share: the size of tiles, the weights as
// operands of tensor cores, and what becomes of a sum.
#pragma once

#include "activation.cuh"
#include "async.cuh"
#include "codes.cuh"
#include "mma.cuh"

namespace tgi::cuda {

// Returns the number of pairs of a full tile. Small tiles stream the weights, of which each
// expert's are read once if its pairs fit in one tile; large tiles reuse them for more pairs. The
// average decides, because the host does not know the counts.
constexpr int64_t tile_pairs_of(int64_t num_pairs, int64_t num_experts, bool is_streamed) {
  if (num_pairs <= 4 * num_experts) return 8;
  if (is_streamed || num_pairs <= 16 * num_experts) return 16;
  return num_pairs <= 32 * num_experts ? 32 : 64;
}
constexpr int64_t kMaxStreamedPairs = 16;  // of a tile; larger ones are not streamed

// A unit of work: some pairs of one expert.
struct PairTile {
  int expert, first, count;  // `first` is an index in the plan's pairs

  static __device__ __forceinline__ PairTile load(const int32_t* tiles, int64_t index) {
    const uint4 words = reinterpret_cast<const uint4*>(tiles)[1 + index];
    return {int(words.x), int(words.y), int(words.z)};
  }
};

// Rows of weights as the 16-row operand of mma, in elements (`Code` void) or codes. A lane takes
// the same 16 bytes' worth of columns of rows l / 4 and l / 4 + 8, instead of the four pairs of
// mma's layout: both operands have their columns in the same order in registers, and the sum is the
// same in any order. It therefore copies exactly the data that it multiplies itself. Eight columns,
// 16 bytes of activations, are two mma.
template <typename Element, typename Code, typename Scale>
struct Weights {
  static constexpr int kColumns = kStep<Code>;  // of a lane, all in one group
  static constexpr int kPieces = kColumns / 8;
  static constexpr bool kHasGroups = true;

  // As stored: a conversion next to the load would wait for it.
  struct Loaded {
    Scale scale, offset;
  };
  struct Group {
    float scale, offset;
  };

  template <typename Integer>
  static __device__ __forceinline__ Integer bytes_of(Integer elements) {
    return elements / (8 / Code::kBits);
  }

  // place: index of the group in `scales`; not read if the row or the column does not exist
  static __device__ __forceinline__ Loaded load(const QuantMatrix& m, int place, bool exists) {
    if (!exists) return {};
    return {static_cast<const Scale*>(m.scales)[place],
            m.offsets == nullptr ? Scale() : static_cast<const Scale*>(m.offsets)[place]};
  }
  static __device__ __forceinline__ Group convert(const Loaded& loaded) {
    return {to_float(loaded.scale), to_float(loaded.offset)};
  }

  // Rounds to what `dequantise` writes.
  static __device__ __forceinline__ void unpack(const uint4& bytes, int piece, int zero,
                                                const Group& group, uint32_t (&out)[4]) {
    float values[8];
    Code::unpack(bytes, piece, kMagic + float(zero), values);
#pragma unroll
    for (int k = 0; k < 8; ++k) values[k] = fmaf(group.scale, values[k], group.offset);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      out[k] = Pair<Element>::pack(values[2 * k], values[2 * k + 1]);
    }
  }
};

// E2M1 codes: elements are made of their bits and multiplied by the scale in pairs.
template <typename Element>
struct Weights<Element, E2M1, e8m0> {
  static constexpr int kColumns = kStep<E2M1>;
  static constexpr int kPieces = kColumns / 8;
  static constexpr bool kHasGroups = true;

  using Loaded = e8m0;
  // Their product is the scale. The first changes no bit of a code's value, so that a weight is
  // rounded once.
  struct Group {
    uint32_t first, second;
  };

  template <typename Integer>
  static __device__ __forceinline__ Integer bytes_of(Integer elements) {
    return elements / 2;
  }
  static __device__ __forceinline__ Loaded load(const QuantMatrix& m, int place, bool exists) {
    return exists ? static_cast<const e8m0*>(m.scales)[place] : Loaded{};
  }
  static __device__ __forceinline__ Group convert(Loaded scale) {
    constexpr uint32_t kFactor = E2M1::Layout<Element>::kFactor;
    if constexpr (E2M1::Layout<Element>::kIsBfloat16) {
      const float half = to_float(scale);
      return {kFactor, Pair<Element>::pack(half, half)};
    } else {
      // float16 has 2^-24 to 2^15. Of a scale below 1, the first factor is 2^2, and the second is 0
      // only where all weights round to 0. Scales above 2^16 count as 2^16, with which codes of 1
      // and more overflow anyway.
      const uint32_t e = scale.bits;
      const float second = __uint_as_float((e < 127 ? e + 12 : min(e - 1, 142u)) << 23);
      return {e < 127 ? 0x44004400u : kFactor, Pair<Element>::pack(second, second)};
    }
  }
  static __device__ __forceinline__ void unpack(const uint4& bytes, int piece, int,
                                                const Group& group, uint32_t (&out)[4]) {
    const uint32_t words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint32_t scaled =
          multiply_pairs<Element>(E2M1::pair<Element>(words[piece], k), group.first);
      out[k] = multiply_pairs<Element>(scaled, group.second);
    }
  }
};

template <typename Element, typename Scale>
struct Weights<Element, void, Scale> {
  static constexpr int kColumns = 8;
  static constexpr int kPieces = 1;
  static constexpr bool kHasGroups = false;

  struct Loaded {};
  struct Group {};

  template <typename Integer>
  static __device__ __forceinline__ Integer bytes_of(Integer elements) {
    return elements * 2;
  }
  static __device__ __forceinline__ Loaded load(const QuantMatrix&, int, bool) { return {}; }
  static __device__ __forceinline__ Group convert(const Loaded&) { return {}; }
  static __device__ __forceinline__ void unpack(const uint4& bytes, int, int, const Group&,
                                                uint32_t (&out)[4]) {
    out[0] = bytes.x, out[1] = bytes.y, out[2] = bytes.z, out[3] = bytes.w;
  }
};

// Returns the operands of two mma, of a piece of rows l / 4 and l / 4 + 8.
template <typename W>
__device__ __forceinline__ void make_operands(const uint4& low, const uint4& high, int piece,
                                              int zero, const typename W::Group& low_group,
                                              const typename W::Group& high_group,
                                              uint32_t (&out)[2][4]) {
  uint32_t lower[4], upper[4];
  W::unpack(low, piece, zero, low_group, lower);
  W::unpack(high, piece, zero, high_group, upper);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    out[i][0] = lower[2 * i], out[i][1] = upper[2 * i];
    out[i][2] = lower[2 * i + 1], out[i][3] = upper[2 * i + 1];
  }
}

// How an expert's rows are divided: into two halves of 16, which a warp multiplies together. If
// gated, these are the gates and the ups of the same 16 columns of the output.
struct ExpertRows {
  int64_t count;    // of an expert
  int64_t columns;  // of the output
  int64_t second;   // rows from a half to the other
  bool is_gated;

  __device__ __forceinline__ explicit ExpertRows(const ExpertsProductParams& p)
      : count(divide_narrow(p.weight.num_rows, p.num_experts)),
        columns(p.is_gated ? count / 2 : count),
        second(p.is_gated ? columns : 16),
        is_gated(p.is_gated != 0) {}
};

// The rows that a lane multiplies: rows l / 4 and l / 4 + 8 of both halves. Columns of a step begin
// at lane % 4 times W::kColumns. Offsets have 32 bits, which saves registers; `experts_product`
// checks that they suffice.
template <typename W>
class LaneRows {
 public:
  // first: the first row of the first half, in the expert
  __device__ __forceinline__ LaneRows(const ExpertsProductParams& p, const ExpertRows& rows,
                                      int expert, int64_t first)
      : stride_(int(p.weight.num_columns)),
        second_(int(rows.second)),
        column_(int(threadIdx.x) % 4 * W::kColumns) {
    const int64_t row = first + int(threadIdx.x) % kWarpSize / 4;  // of the output's columns
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      exists_[k] = row + k % 2 * 8 + (rows.is_gated ? 0 : k / 2 * 16) < rows.columns;
    }
    const int64_t whole_row = expert * rows.count + row;
    row_ = int(whole_row);
    scale_stride_ = int(p.weight.scale_stride);
    codes_ =
        static_cast<const uint8_t*>(p.weight.codes) + W::bytes_of(whole_row * stride_ + column_);
  }

  // Copies a lane's codes of the step that begins at `column` to every kThreads-th of `out`.
  template <int kThreads>
  __device__ __forceinline__ void copy(int column, uint4* out) const {
    const bool is_inside = column_ + column < stride_;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      async_copy16(out + k * kThreads, codes_ + W::bytes_of(row_of(k) * stride_ + column),
                   is_inside && exists_[k]);
    }
  }

  // Loads the scales and offsets of that step.
  __device__ __forceinline__ void load_groups(const QuantMatrix& m, int column,
                                              typename W::Loaded (&out)[4]) const {
    const int from = column_ + column;
    const int place = W::kHasGroups ? int(divide_narrow(from, m.group)) * scale_stride_ + row_ : 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      out[k] = W::load(m, place + row_of(k), from < stride_ && exists_[k]);
    }
  }

 private:
  __device__ __forceinline__ int row_of(int k) const { return k % 2 * 8 + k / 2 * second_; }

  int stride_, second_, column_;
  int row_, scale_stride_;
  const uint8_t* codes_;
  bool exists_[4];
};

// Adds the bias of an expert's row, if there is one.
__device__ __forceinline__ float with_bias(const ExpertsProductParams& p, const ExpertRows& rows,
                                           int expert, int64_t row, float sum) {
  return p.bias == nullptr ? sum : sum + p.bias[expert * rows.count + row];
}

// Output columns of a pair of halves.
__host__ __device__ inline int width_of(const ExpertsProductParams& p) {
  return p.is_gated ? 16 : 32;
}

// Returns f(gate) * up. NaN stays NaN: it reaches the logits, where it is detected.
__device__ __forceinline__ float gate_value(const ExpertsProductParams& p, float gate, float up) {
  if (p.limit <= 0) return activate(gate, p.activation, 0, 0) * up;
  gate = gate > p.limit ? p.limit : gate;
  up = up > p.limit ? p.limit : up < -p.limit ? -p.limit : up;
  return __fdividef(gate, 1.0f + expf(-p.slope * gate)) * (up + p.offset);
}

// Calls body with the weights' policy class.
template <typename Body>
cudaError_t for_weights(const ExpertsProductParams& p, const Body& body) {
  const auto with_element = [&](auto element) {
    using Element = decltype(element);
    if (p.weight.bits == 16) return body(element, Weights<Element, void, float>());
    return for_codes(p.weight, [&](auto scale, auto code) {
      return body(element, Weights<Element, decltype(code), decltype(scale)>());
    });
  };
  return p.type == Type::kBfloat16 ? with_element(bf16()) : with_element(fp16());
}

cudaError_t experts_stream(const ExpertsProductParams& p, cudaStream_t stream);
cudaError_t experts_tile(const ExpertsProductParams& p, cudaStream_t stream);

}  // namespace tgi::cuda
