// What linear layers over bf16 weights and over quantised ones have in common, and the two forms of the first.
#pragma once

#include <algorithm>
#include <cstdint>

#include "amx.h"
#include "gemm.h"

namespace octavo {

#if defined(OCTAVO_AMX)
constexpr int kRowsPerTile = 2 * kAmxRows;
constexpr int kMostTilesPerItem = 16;
constexpr int64_t kActivationBytesInCache = 1 << 20;  // of the rows that an item reads again for every block
#else
constexpr int kRowsPerTile = kMaxTileRows;
constexpr int kMostTilesPerItem = 96 / kRowsPerTile;
constexpr int64_t kActivationBytesInCache = 384 << 10;
#endif

// So few rows take less time than their weights take to arrive: the processor's own fetching keeps up best when nothing
// else asks for memory. More rows would let it fall behind. That of Intel's cores does for one row: it ends with a page.
constexpr int kRowsNearlyFree = 4;
const int kRowsWithoutPrefetch = vendor() == Vendor::kIntel ? 0 : kRowsNearlyFree;
constexpr int kTilesThatFetchWeights = 2;  // where there are so many: a half of the next block each

struct BlockRange {
  int64_t begin;
  int64_t end;
};

// Rows of activations as the inner loop reads them.
struct Rows {
  const Activation* data;
  int64_t stride;
};

inline const uint8_t* block_weights(const OctavoLinear& linear, int64_t block) {
  return linear.weight + block * block_bytes(linear.format, linear.in_features);
}

inline bool is_gated(Epilogue epilogue) { return epilogue >= Epilogue::kSilu; }

// Where the sums of one row and one block go: activations or float32.
inline char* output_of(const Gemm& gemm, int64_t row, int64_t block) {
  if (is_gated(gemm.epilogue)) {
    Activation* output = static_cast<Activation*>(gemm.output) + row * gemm.output_stride + block * kGatedColumns;
    return reinterpret_cast<char*>(output);
  }
  if (gemm.epilogue == Epilogue::kStoreActivations)
    return reinterpret_cast<char*>(static_cast<Activation*>(gemm.output) + row * gemm.output_stride + block * kBlockColumns);
  const int64_t output_row = gemm.epilogue == Epilogue::kAddWeighted ? gemm.output_rows[row] : row;
  float* output = static_cast<float*>(gemm.output) + output_row * gemm.output_stride + block * kBlockColumns;
  return reinterpret_cast<char*>(output);
}

// Hand over the sums of some rows and one block, [num_rows, kBlockColumns], which are changed.
void finish_rows(const Gemm& gemm, int64_t row, int num_rows, int64_t block, float* sums);

// Rows [begin, end) of some blocks of bf16 weights. In gemm_amx.cpp or gemm_vectors.cpp.
void run_bf16_part(const Gemm& gemm, int64_t begin, int64_t end, const BlockRange& blocks, ReadAhead* ahead);

}  // namespace octavo
