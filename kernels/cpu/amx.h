// The tile registers of AMX: eight matrices, and an instruction that adds the product of two of them to a third.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "simd.h"

#if defined(OCTAVO_AMX)
namespace octavo {

// A tile has at most 16 rows of 64 bytes: float32 sums [16 rows][16 columns], activations [16 rows][16 pairs of inputs], or
// weights [16 pairs][16 columns][2], which is how packed weights and pages of the KV cache lie in memory.
constexpr int kAmxRows = 16;
constexpr int kAmxColumns = 16;
constexpr int kAmxPairs = 16;
constexpr int kAmxInputs = 2 * kAmxPairs;

// The roles of the eight registers.
//
// 0 to 3  sums: 0 and 1 of the first group of rows, 2 and 3 of the second
// 4, 5    activations of either group, of whole tiles of inputs
// 6, 7    weights, of whole tiles of inputs
//
// With `AmxShapes::halves`, where there is no second group:
// 0 to 3  sums
// 4       activations and 6 weights, of whole tiles of inputs
// 5       activations and 7 weights, of half as many inputs
//
// The registers' shapes are a setting of the thread, which this makes for its lifetime; registers are zero then. Kernels need
// permission to use them at all: see library.py.
class AmxShapes {
 public:
  AmxShapes(int first_rows, int second_rows) {
    for (int tile : {0, 1, 4}) set(tile, first_rows, 64);
    for (int tile : {2, 3, 5}) set(tile, second_rows, 64);
    for (int tile : {6, 7}) set(tile, kAmxPairs, 64);
    load();
  }
  ~AmxShapes() { asm volatile("tilerelease" ::: "memory"); }
  AmxShapes(const AmxShapes&) = delete;
  AmxShapes& operator=(const AmxShapes&) = delete;

  static AmxShapes halves(int num_rows) { return AmxShapes(num_rows); }

 private:
  explicit AmxShapes(int num_rows) {
    for (int tile : {0, 1, 2, 3, 4}) set(tile, num_rows, 64);
    set(5, num_rows, 32);
    set(6, kAmxPairs, 64);
    set(7, kAmxPairs / 2, 64);
    load();
  }

  void set(int tile, int rows, int row_bytes) {
    if (rows == 0) return;
    layout_.row_bytes[tile] = static_cast<uint16_t>(row_bytes);
    layout_.rows[tile] = static_cast<uint8_t>(rows);
  }
  void load() const { asm volatile("ldtilecfg %0" ::"m"(layout_) : "memory"); }

  struct Layout {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } layout_;
  static_assert(sizeof(Layout) == 64);
};

template <int kTile>
inline void amx_clear() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}

// Rows are `stride` bytes apart. What is not read again soon takes no place in the first cache from what is.
template <int kTile, bool kIsReused = true>
inline void amx_load(const void* source, int64_t stride) {
  if constexpr (kIsReused) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(source), "r"(stride), "i"(kTile) : "memory");
  } else {
    asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(source), "r"(stride), "i"(kTile) : "memory");
  }
}

template <int kTile>
inline void amx_store(void* target, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(target), "r"(stride), "i"(kTile) : "memory");
}

// sums += activations * weights. In each element the products of even inputs are summed up in their order, each rounded once
// with the sum, and those of odd inputs, and the sum of both is added to the element; subnormal numbers are zero.
template <int kSums, int kActivations, int kWeights>
inline void amx_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kActivations), "i"(kWeights));
}

// While it lives, subnormal numbers are zero, as they are in tile registers.
class SubnormalsAreZero {
 public:
  SubnormalsAreZero() { set(before_ | kFlushToZero | kInputsAreZero); }
  ~SubnormalsAreZero() { set(before_); }
  SubnormalsAreZero(const SubnormalsAreZero&) = delete;
  SubnormalsAreZero& operator=(const SubnormalsAreZero&) = delete;

 private:
  static constexpr unsigned kFlushToZero = 0x8000, kInputsAreZero = 0x40;

  // What is computed from memory, and stored there, stays on its side of this.
  static void set(unsigned control) {
    asm volatile("" ::: "memory");
    _mm_setcsr(control);
    asm volatile("" ::: "memory");
  }

  const unsigned before_ = _mm_getcsr();
};

}  // namespace octavo
#endif
