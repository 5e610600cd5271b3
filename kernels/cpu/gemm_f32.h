// Linear layers in float32, for models whose results must be exact.
#pragma once

#include <cstdint>

#include "encoder_abi.h"

namespace octavo {

// Weights [out, in] are packed into blocks of 32 outputs, [out / 32][in][32], padded with zeros.
constexpr int kF32BlockColumns = 32;

// A layer over all rows of a step, cut into items that threads take one by one: a range of rows times
// a range of blocks.
//
// Every output is one chain of sums over the inputs in ascending order, whatever the number of rows
// and however the work is cut. So a row's bits do not depend on the rows beside it.
struct GemmF32 {
  const OctavoEncoderOp* op;
  const float* input;  // [num_rows, input_stride]
  int64_t input_stride;
  float* output;  // [num_rows, output_stride], all columns of whole blocks
  int64_t output_stride;
  int num_rows;
  int rows_per_item;
  int num_row_items;
  int num_block_items;

  int count() const { return num_row_items * num_block_items; }
};

GemmF32 make_gemm_f32(const OctavoEncoderOp& op, const float* input, int64_t input_stride, float* output,
                      int64_t output_stride, int num_rows, int num_threads);

void run_gemm_f32_item(const GemmF32& gemm, int item);

}  // namespace octavo
