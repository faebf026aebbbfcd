// AMX's tile registers: eight registers of up to 16 rows of 64 bytes. A product of two of them is
// added to a third. Two types offer the same functions: HardwareTiles uses the instructions, and
// ModelTiles emulates them in plain code, so that tests can run every tile kernel on any machine.
// Included only by amx_set.h.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "../platform.h"

namespace tgi::cpu::step {
namespace {

constexpr int kNumTiles = 8;
constexpr int64_t kTileRows = 16;
constexpr int64_t kTileRowBytes = 64;
constexpr int64_t kTileBytes = kTileRows * kTileRowBytes;

// LDTILECFG's operand.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  constexpr void set(int tile, int num_rows, int bytes) {
    rows[tile] = static_cast<uint8_t>(num_rows);
    row_bytes[tile] = static_cast<uint16_t>(bytes);
  }
};
static_assert(sizeof(TileConfig) == 64);

// Native wrappers, because GCC 12's intrinsics do not tell the compiler that loading a tile reads
// memory, which loses the preceding stores.
struct HardwareTiles {
  static inline void configure(const TileConfig& config) {
    asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
  }
  // Without the release, every context switch would save the live tiles: 8 KiB.
  static inline void release() { asm volatile("tilerelease" ::: "memory"); }
  template <int T>
  static inline void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(T));
  }
  template <int T>
  static inline void load(const void* p, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
  }
  template <int T>
  static inline void store(void* p, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(T) : "memory");
  }
  // C += A times B, both pairs of bf16.
  template <int C, int A, int B>
  static inline void dot_bf16() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
  }
  // C += A times B, quads of signed bytes times quads of unsigned bytes. Exact.
  template <int C, int A, int B>
  static inline void dot_int8() {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
  }
};

// The same functions in terms of S, whose sixteen lanes are one row of a tile. How TDPBF16PS rounds
// was measured on Sapphire Rapids, over 23 million outputs: two sums starting at +0, over the even
// and over the odd elements, in ascending order, each step one fma; then c + (even + odd);
// denormals are zero everywhere. (With several NaNs, the resulting NaN may differ.) Whatever would
// make the instructions trap aborts the process.
template <class S>
struct ModelTiles {
  static void configure(const TileConfig& config) {
    // A tile that has rows but no columns, or the other way round, is refused at once.
    for (int tile = 0; tile < kNumTiles; ++tile) {
      trap_unless((config.rows[tile] == 0) == (config.row_bytes[tile] == 0));
      trap_unless(config.rows[tile] <= kTileRows && config.row_bytes[tile] <= kTileRowBytes);
    }
    registers().config = config;
    registers().is_configured = true;
    std::memset(registers().bytes, 0, sizeof(registers().bytes));
  }
  static void release() { registers().is_configured = false; }
  template <int T>
  static void zero() {
    std::memset(shape_of<T>().data, 0, kTileBytes);
  }
  template <int T>
  static void load(const void* p, int64_t stride) {
    const Shape tile = shape_of<T>();
    std::memset(tile.data, 0, kTileBytes);
    for (int64_t r = 0; r < tile.rows; ++r) {
      std::memcpy(tile.row(r), static_cast<const uint8_t*>(p) + r * stride, tile.row_bytes);
    }
  }
  template <int T>
  static void store(void* p, int64_t stride) {
    const Shape tile = shape_of<T>();
    for (int64_t r = 0; r < tile.rows; ++r) {
      std::memcpy(static_cast<uint8_t*>(p) + r * stride, tile.row(r), tile.row_bytes);
    }
  }
  template <int C, int A, int B>
  static void dot_bf16() {
    const FlushDenormals flush;
    const Shape c = shape_of<C>(), a = shape_of<A>(), b = shape_of<B>();
    check_product(c, a, b);
    const auto high = S::iset1(static_cast<int32_t>(0xFFFF0000u));
    for (int64_t r = 0; r < c.rows; ++r) {
      auto even = S::zero(), odd = S::zero();
      for (int64_t k = 0; k < b.rows; ++k) {
        const auto x = S::ibroadcast(a.row(r) + 4 * k), y = S::iload(b.row(k));
        even = S::fma(S::as_float(S::ishl(x, 16)), S::as_float(S::ishl(y, 16)), even);
        odd = S::fma(S::as_float(S::iand(x, high)), S::as_float(S::iand(y, high)), odd);
      }
      auto* const sums = reinterpret_cast<float*>(c.row(r));
      S::store(sums, S::add(S::load(sums), S::add(even, odd)));
    }
  }
  template <int C, int A, int B>
  static void dot_int8() {
    const Shape c = shape_of<C>(), a = shape_of<A>(), b = shape_of<B>();
    check_product(c, a, b);
    for (int64_t r = 0; r < c.rows; ++r) {
      auto sum = S::iload(c.row(r));
      for (int64_t k = 0; k < b.rows; ++k) {
        sum = S::dot(sum, S::iload(b.row(k)), S::ibroadcast(a.row(r) + 4 * k));
      }
      S::istore(c.row(r), sum);
    }
  }

 private:
  struct Registers {
    alignas(64) uint8_t bytes[kNumTiles][kTileBytes];
    TileConfig config;
    bool is_configured;
  };
  struct Shape {
    uint8_t* data;
    int64_t rows, row_bytes;
    uint8_t* row(int64_t r) const { return data + r * kTileRowBytes; }
  };

  static Registers& registers() {
    static thread_local Registers mine;
    return mine;
  }
  template <int T>
  static Shape shape_of() {
    static_assert(T >= 0 && T < kNumTiles);
    Registers& all = registers();
    const TileConfig& config = all.config;
    trap_unless(all.is_configured && config.rows[T] > 0);
    return {all.bytes[T], config.rows[T], config.row_bytes[T]};
  }
  static void check_product(const Shape& c, const Shape& a, const Shape& b) {
    trap_unless(c.rows == a.rows && c.row_bytes == b.row_bytes && a.row_bytes == 4 * b.rows);
  }
  static void trap_unless(bool is_legal) {
    if (is_legal) return;
    std::fputs("an instruction of tiles that do not fit each other\n", stderr);
    std::abort();
  }
};

// Configures the calling thread's tiles for the lifetime of the object.
template <class Tiles>
class TileScope {
 public:
  explicit TileScope(const TileConfig& config) { Tiles::configure(config); }
  ~TileScope() { Tiles::release(); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};

}  // namespace
}  // namespace tgi::cpu::step
