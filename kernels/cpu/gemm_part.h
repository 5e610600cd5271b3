// What linear layers over bf16 weights and over quantised ones have in common, and the two forms of the first.
#pragma once

#include <algorithm>
#include <cstdint>

#include "activation.h"
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

inline void add_bias(float* sums, const float* bias) {
  for (int i = 0; i < kBlockColumns; i += kLanes) store(sums + i, load(sums + i) + load(bias + i));
}

template <Vec (*kActivation)(Vec)>
inline void store_gated(Activation* output, const float* sums) {
  for (int i = 0; i < kGatedColumns; i += kLanes)
    store_activation(output + i, kActivation(load(sums + i)) * load(sums + kGatedColumns + i));
}

inline bool is_gated(Epilogue epilogue) { return epilogue == Epilogue::kSilu || epilogue == Epilogue::kGeluTanh; }

// Where the sums of one row and one block go: activations or float32.
inline char* output_of(const Gemm& gemm, int64_t row, int64_t block) {
  if (is_gated(gemm.epilogue)) {
    Activation* output = static_cast<Activation*>(gemm.output) + row * gemm.output_stride + block * kGatedColumns;
    return reinterpret_cast<char*>(output);
  }
  const int64_t output_row = gemm.epilogue == Epilogue::kAddWeighted ? gemm.output_rows[row] : row;
  float* output = static_cast<float*>(gemm.output) + output_row * gemm.output_stride + block * kBlockColumns;
  return reinterpret_cast<char*>(output);
}

// Hand over the sums of one row and one block.
inline void finish_block(const Gemm& gemm, int64_t row, int64_t block, float* sums) {
  if (gemm.linear->bias != nullptr) add_bias(sums, gemm.linear->bias + block * kBlockColumns);
  char* const place = output_of(gemm, row, block);
  float* const output = reinterpret_cast<float*>(place);
  switch (gemm.epilogue) {
    case Epilogue::kStore: {
      const int64_t num_columns = gemm.num_columns - block * kBlockColumns;
      if (num_columns >= kBlockColumns) {
        for (int i = 0; i < kBlockColumns; i += kLanes) store(output + i, load(sums + i));
      } else {
        std::copy(sums, sums + num_columns, output);
      }
      break;
    }
    case Epilogue::kAddResidual:
      for (int i = 0; i < kBlockColumns; i += kLanes) store(output + i, load(output + i) + load(sums + i));
      break;
    case Epilogue::kAddWeighted: {
      const Vec weight = broadcast(gemm.row_weights[row]);
      for (int i = 0; i < kBlockColumns; i += kLanes) store(output + i, load(output + i) + weight * load(sums + i));
      break;
    }
    case Epilogue::kSilu:
      store_gated<silu>(reinterpret_cast<Activation*>(place), sums);
      break;
    case Epilogue::kGeluTanh:
      store_gated<gelu_tanh>(reinterpret_cast<Activation*>(place), sums);
      break;
  }
}

// Rows [begin, end) of some blocks of bf16 weights. In gemm_amx.cpp or gemm_vectors.cpp.
void run_bf16_part(const Gemm& gemm, int64_t begin, int64_t end, const BlockRange& blocks, ReadAhead* ahead);

}  // namespace octavo
