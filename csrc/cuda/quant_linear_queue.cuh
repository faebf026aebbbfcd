// What a block of a quantised product computes and in which order, and the queue that brings a warp
// its codes and scales.
//
// A visit is the unit of work: the codes of 16 rows and four pieces, 16 bytes of each row, which
// are 1 KB for any format, and the scales of their groups. A warp copies what it multiplies itself,
// so its queue needs no barrier of the block. The copies run ahead of the visits by the stages of
// the queue, over the ends of tiles, chunks and passes.
#pragma once

#include <climits>

#include "async.cuh"
#include "codes.cuh"

namespace tgi::cuda {
namespace {

constexpr int kParts = 8;  // of the columns, one per warp
constexpr int kThreads = kParts * kWarpSize;
constexpr int kPieces = 4;     // of a visit: 16 bytes of each row's codes
constexpr int kTileRows = 16;  // of weights

// Returns x. What is computed from it is computed there: the compiler would do so before the loops,
// and hold it in registers that the activations need.
__device__ __forceinline__ uint32_t late(uint32_t x) {
#ifdef __CUDACC__
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// The sizes of a kernel for tiles of this many tokens. Run: pieces of one group, after which its
// scale is applied.
template <typename CodeType, typename ScaleType, int Tokens, int Run>
struct Shape {
  using Code = CodeType;
  using Scale = ScaleType;
  static constexpr int kRun = Run;
  static constexpr bool kHasTail = Run < kPieces;  // rows may end within a visit
  static constexpr int kTokens = Tokens;
  static constexpr int kTokenTiles = Tokens / 8;
  static constexpr int kPieceColumns = kStep<Code>;
  static constexpr int kColumns = kPieces * kPieceColumns;  // of a visit
  static constexpr int kWords = kPieceColumns / 8;  // of a lane: a piece's activations of a token
  static constexpr int kGroups = kPieces / Run;     // of a visit
  // A stage, in units of 16 bytes: codes, [half][row / 2][piece], then scales, then offsets, each
  // [group][row].
  static constexpr int kCodeSlots = kTileRows * kPieces;
  static constexpr int kGroupSlots = sizeof(Scale);  // 16 rows
  static constexpr int kScaleSlots = kGroups * kGroupSlots;
  static constexpr int kSlots = kCodeSlots + (Code::kHasOffsets ? 2 : 1) * kScaleSlots;
  // Two blocks have 70 KB in flight; 30 KB are the bandwidth times the latency.
  static constexpr int kStages = Tokens <= 16 ? 5 : 4;
  static constexpr int kStageBytes = kSlots * 16;
  static constexpr int kWarpSlots = kStages * kSlots;
  // Sums of a chunk's activations over each group, [part][group][token].
  static constexpr int kPlainSums = kGroups * Tokens;
  static constexpr int kPlainBytes = Code::kHasOffsets ? kParts * kPlainSums * 4 : 0;
  static constexpr int kFixedBytes = kParts * kWarpSlots * 16 + kPlainBytes;
  // Sums of a tile of rows, [part][token tile][lane] of four.
  static constexpr int kTileSums = kParts * kTokenTiles * kWarpSize;
  static constexpr int kTileBytes = kTileSums * 16;
  static_assert(kFixedBytes + kTileBytes <= 80 << 10);  // two blocks on sm_80
};

// Which tiles of rows a block has: number `first` of the matrix and every `stride`-th after it.
// Multiprocessors have the blocks in turn, so their shares differ by one tile.
struct Tiles {
  int first, stride;
  int count;     // of this block
  int per_pass;  // as many as there is shared memory for their sums
};

// A warp's copies of codes and scales, visit by visit: of each pass, each chunk of the columns; of
// that, each tile. A stage is given as its first byte in the queue: an index of 16 bytes would be
// multiplied in every visit.
template <typename S>
class Source {
  using Code = typename S::Code;

 public:
  // queue: of this warp
  __device__ __forceinline__ Source(const QuantMatrix& m, const Tiles& tiles, uint4* queue)
      : m_(m),
        tiles_(tiles),
        end_byte_(int(m.num_columns) * Code::kBits / 8),
        code_step_(tiles.stride * kTileRows * end_byte_) {
    const int lane = int(threadIdx.x) % kWarpSize;
    // Within 8 rows, slots are permuted so that both these writes and ldmatrix access each bank
    // once.
    code_out_ = reinterpret_cast<uint8_t*>(queue + lane / 4 * 4 + (lane % 4 ^ lane / 8));
    const int array = lane / 16, group = lane / 4 % 4, quarter = lane % 4;
    has_scales_ = group < S::kGroups && quarter < S::kGroupSlots &&
                  (array == 0 || (Code::kHasOffsets && m.offsets != nullptr));
    scale_out_ = reinterpret_cast<uint8_t*>(queue + S::kCodeSlots + array * S::kScaleSlots +
                                            group * S::kGroupSlots + quarter);
    start_chunk();
  }

  // Returns how many chunks have columns of this part.
  static __device__ __forceinline__ int num_chunks(const QuantMatrix& m, int part) {
    return (ceil_divide(int(m.num_columns), S::kColumns) - part + kParts - 1) / kParts;
  }

  // Copies the next visit's operands, if there is one, to this stage and commits them.
  __device__ __forceinline__ void copy(int stage) {
    const bool is_inside = !S::kHasTail || is_inside_;
    async_copy16(code_out_ + stage, codes_, is_inside && rows_left_ > 0);
    async_copy16(code_out_ + stage + kWarpSize * 16, codes_ + end_byte_,
                 is_inside && rows_left_ > 1);
    if (has_scales_ != 0) async_copy16(scale_out_ + stage, scales_, true);
    rows_left_ -= tiles_.stride * kTileRows;
    codes_ += code_step_;
    scales_ += tiles_.stride * (kTileRows * S::kGroupSlots);
    if (--tiles_left_ == 0) {
      if (++chunk_ == num_chunks(m_, int(late(threadIdx.x) / kWarpSize)))
        chunk_ = 0, first_ += tiles_.per_pass;
      start_chunk();
    }
    async_commit();
  }

 private:
  // Moves to the first tile of the pass. After the last pass, and without columns, what is copied
  // has no rows and no scales, so that `copy` need not ask whether there is a visit.
  __device__ __forceinline__ void start_chunk() {
    const uint32_t thread = late(threadIdx.x);
    const int lane = int(thread % kWarpSize), warp = int(thread / kWarpSize);
    const bool has_ended = num_chunks(m_, warp) <= 0 || first_ >= tiles_.count;
    tiles_left_ = has_ended ? INT_MAX : min(tiles_.per_pass, tiles_.count - first_);
    if (has_ended) has_scales_ = 0;
    const int tile_row = (tiles_.first + first_ * tiles_.stride) * kTileRows;
    // Two rows that are adjacent in memory are rows l / 4 and l / 4 + 8 of mma.
    const int row = tile_row + lane / 4 * 2;
    rows_left_ = has_ended ? 0 : int(m_.num_rows) - row;
    const int part = chunk_ * kParts + warp, byte = (part * kPieces + lane % 4) * 16;
    is_inside_ = byte < end_byte_;
    codes_ = static_cast<const uint8_t*>(m_.codes) + int64_t{row} * end_byte_ + byte;
    const int column = (part * kPieces + lane / 4 % S::kGroups * S::kRun) * S::kPieceColumns;
    const auto group = int(divide_narrow(column, m_.group));
    const int last = int(divide_narrow(m_.num_columns, m_.group)) - 1;
    const int64_t place = int64_t{min(group, last)} * m_.scale_stride + tile_row;
    const auto* from = static_cast<const uint8_t*>(lane < 16 ? m_.scales : m_.offsets);
    scales_ = from + place * S::kGroupSlots + lane % 4 * 16;
  }

  const QuantMatrix& m_;
  const Tiles& tiles_;
  const uint8_t *codes_, *scales_;
  uint8_t *code_out_, *scale_out_;
  int end_byte_;               // of a row's codes
  int code_step_;              // to the block's next tile
  int chunk_ = 0, first_ = 0;  // of the visit that is copied next; the pass's first tile
  int tiles_left_, rows_left_;
  bool is_inside_;
  int has_scales_;  // a bool takes one instruction more
};

// Returns the scales or offsets of a group that a lane multiplies: of its two rows.
template <typename Scale>
__device__ __forceinline__ float2 read_scales(const uint4* group) {
  const int pair = int(threadIdx.x) % kWarpSize / 4;
  if constexpr (std::is_same_v<Scale, float>) {
    return reinterpret_cast<const float2*>(group)[pair];
  } else if constexpr (std::is_same_v<Scale, fp16>) {
    return Pair<fp16>::unpack(reinterpret_cast<const uint32_t*>(group)[pair]);
  } else {
    const uint32_t two = reinterpret_cast<const uint16_t*>(group)[pair];
    return float2{to_float(e8m0{uint8_t(two)}), to_float(e8m0{uint8_t(two >> 8)})};
  }
}

}  // namespace
}  // namespace tgi::cuda
