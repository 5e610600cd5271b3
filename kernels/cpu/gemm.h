// Linear layers over packed weights.
#pragma once

#include <cstdint>

#include "abi.h"
#include "adapters.h"
#include "quantized.h"
#include "read_ahead.h"
#include "row_best.h"
#include "simd.h"
#include "thread_pool.h"

namespace octavo {

// Weights [out, in] are packed into blocks of 32 outputs. Those of bf16: [out / 32][in / 2][32][2], so
// that a vector load gives one pair of inputs for `kLanes` outputs. Outputs are padded to whole blocks,
// inputs to whole pairs, with zeros. A gated pair of layers is packed as one, 16 columns of the
// gate and then the same 16 of up in each block. Those of 8 and 4 bits: see quantized.h. Compressed ones
// hold the same in fewer bytes: see compressed.h.
constexpr int kBlockColumns = 32;
constexpr int kGatedColumns = kBlockColumns / 2;

// What happens to the sums of a row, 32 at a time.
enum class Epilogue {
  kStore,        // float32 output = sum
  kStoreActivations,  // activations output = sum; up to `num_columns`, a multiple of 16
  kLogits,       // the same, and `best` takes them
  kAddResidual,  // float32 output += sum
  kAddWeighted,  // float32 output of output_rows[row] += row_weights[row] * sum
  kSilu,         // activations output = silu(gate) * up
  kGeluTanh,     // activations output = gelu_tanh(gate) * up
  kSwigluOai,    // activations output = swigluoai(gate, up)
};

inline Epilogue gated_epilogue(int32_t activation) {
  if (activation == OCTAVO_SWIGLUOAI) return Epilogue::kSwigluOai;
  return activation == OCTAVO_SILU ? Epilogue::kSilu : Epilogue::kGeluTanh;
}

struct Gemm {
  const Activation* input;  // [num_rows, input_stride]
  int64_t input_stride;
  QuantizedRows quantized_input;  // the same where the weights are quantised; without it, items quantise for themselves
  int num_rows;
  const OctavoLinear* linear;
  Epilogue epilogue;
  void* output;  // [num_rows, output_stride]
  int64_t output_stride;
  int num_columns;  // columns that may be written; below the stride only where the caller owns the rows
  const int32_t* output_rows;  // for kAddWeighted
  const float* row_weights;
  RowBest* best;      // for kLogits, [num_rows]
  float soft_cap;     // for kLogits; 0: none
  bool skips_caches;  // for kLogits: they are not read soon, and rows begin with a cache line
  const AdapterRows* adapters;  // what is added to the sums of each row; null if nothing is
};

// A Gemm is cut into items that threads take one by one: a range of rows times a range of blocks.
//
// Every output is one chain of sums over the inputs in ascending order, whatever the number of
// rows and however the work is cut. So a row's bits do not depend on the rows beside it.
struct GemmItems {
  int num_rows = 0;
  int num_blocks = 0;
  int rows_per_item = 0;
  int num_row_items = 0;
  int num_block_items = 0;

  GemmItems() = default;
  GemmItems(int num_rows, const OctavoLinear& linear, bool gated, int num_threads);
  int count() const { return num_row_items * num_block_items; }
};

// Compute all rows of blocks [begin, end); `ahead` may be null.
void run_gemm_blocks(const Gemm& gemm, int64_t begin, int64_t end, ReadAhead* ahead = nullptr);

bool is_quantized(int32_t format);
bool is_quantized(const OctavoLinear& linear);

// Bytes of a block of a layer's weights.
int64_t block_bytes(int32_t format, int64_t in_features);

// The weights of one output of a layer that is no gated pair, as float32 [in_features].
void unpack_column(const OctavoLinear& linear, int64_t column, float* output);

// The weights that an item reads.
MemoryRange weights_of_gemm_item(const Gemm& gemm, const GemmItems& items, int item);

// Run items [begin, end); `ahead` may be null.
void run_gemm_items(const Gemm& gemm, const GemmItems& items, int begin, int end, ReadAhead* ahead = nullptr);

}  // namespace octavo
