#include "gemm_f32.h"

#include <algorithm>
#include <cmath>

#include "dispatch.h"
#include "encoder_activation.h"
#include "simd.h"

namespace octavo {
namespace {

constexpr int kVectorsPerBlock = kF32BlockColumns / kLanes;
constexpr int64_t kInputBytesInCache = 384 << 10;  // of the rows that an item reads again for every block
constexpr int kItemsPerThread = 8;                 // about; more would only cost time

// The vectors of a block that so many rows leave registers for.
constexpr int vectors_at_once(int num_rows) {
  int vectors = kVectorsPerBlock;
  while (vectors > 1 && num_rows * vectors > kAccumulators) vectors /= 2;
  return vectors;
}

// What happens to the sums of a row and `kVectors` vectors of a block.
template <int kVectors>
void finish(const OctavoEncoderOp& op, const Vec (&sums)[kVectors], int64_t column, float* output) {
  for (int vector = 0; vector < kVectors; ++vector) {
    const int64_t at = column + vector * kLanes;
    Vec value = sums[vector];
    if (op.bias != nullptr) value = value + load(op.bias + at);
    if (op.kind == OCTAVO_ENCODER_LINEAR_RESIDUAL) {
      value = value + load(output + at);
    } else {
      value = activate(op.activation, value);
    }
    store(output + at, value);
  }
}

// `kRows` rows of a part of a block, whose weights stay in registers while the rows pass.
template <int kRows>
void multiply_rows(const GemmF32& gemm, int64_t row, const float* weight, int64_t column) {
  constexpr int kVectors = vectors_at_once(kRows);
  Vec sums[kRows][kVectors];
  clear(sums);
  const int64_t stride = gemm.input_stride;
  const int64_t stride_of_3 = 3 * stride;
  const float* input = gemm.input + row * stride;
  const int64_t in_features = gemm.op->in_features;
  assume(in_features > 0);
  for (int64_t k = 0; k < in_features; ++k) {
    Vec w[kVectors];
    for (int vector = 0; vector < kVectors; ++vector) w[vector] = load(weight + k * kF32BlockColumns + vector * kLanes);
    const float* three_rows = input + k;
    for (int r = 0; r < kRows; ++r) {
      // As in gemm.cpp: an address for every third row, or the compiler runs out of registers.
      if (r > 0 && r % 3 == 0) three_rows += stride_of_3;
      if (r % 3 == 0) keep_in_register(three_rows);
      const Vec x = broadcast(three_rows[r % 3 * stride]);
      for (int vector = 0; vector < kVectors; ++vector) sums[r][vector] = multiply_add(x, w[vector], sums[r][vector]);
    }
  }
  for (int r = 0; r < kRows; ++r) finish<kVectors>(*gemm.op, sums[r], column, gemm.output + (row + r) * gemm.output_stride);
}

template <int kRows>
void run_tile(const GemmF32& gemm, int64_t row, int64_t block) {
  const float* weight = gemm.op->weight + block * gemm.op->in_features * kF32BlockColumns;
  for (int column = 0; column < kF32BlockColumns; column += vectors_at_once(kRows) * kLanes)
    multiply_rows<kRows>(gemm, row, weight + column, block * kF32BlockColumns + column);
}

int64_t num_blocks_of(const OctavoEncoderOp& op) { return divide_up(op.columns, kF32BlockColumns); }

}  // namespace

GemmF32 make_gemm_f32(const OctavoEncoderOp& op, const float* input, int64_t input_stride, float* output,
                      int64_t output_stride, int num_rows, int num_threads) {
  const int64_t row_bytes = int64_t{op.in_features} * static_cast<int64_t>(sizeof(float));
  const int64_t rows_in_cache = kInputBytesInCache / row_bytes / kMaxTileRows * kMaxTileRows;
  const int rows_per_item = static_cast<int>(std::clamp<int64_t>(rows_in_cache, kMaxTileRows, 16 * kMaxTileRows));
  const int num_row_items = static_cast<int>(divide_up(num_rows, rows_per_item));
  const int64_t wanted = divide_up(int64_t{num_threads} * kItemsPerThread, num_row_items);
  const int num_block_items = static_cast<int>(std::min(num_blocks_of(op), wanted));
  return {&op,           input,    input_stride,  output,        output_stride,
          num_rows,      rows_per_item, num_row_items, num_block_items};
}

void run_gemm_f32_item(const GemmF32& gemm, int item) {
  const int64_t block_item = item % gemm.num_block_items;
  const int64_t num_blocks = num_blocks_of(*gemm.op);
  const int64_t first = item / gemm.num_block_items * int64_t{gemm.rows_per_item};
  const int64_t rows = std::min<int64_t>(gemm.rows_per_item, gemm.num_rows - first);
  const int64_t num_tiles = divide_up(rows, kMaxTileRows);
  const int64_t end = num_blocks * (block_item + 1) / gemm.num_block_items;
  for (int64_t block = num_blocks * block_item / gemm.num_block_items; block < end; ++block) {
    for (int64_t tile = 0; tile < num_tiles; ++tile) {
      const int64_t row = first + rows * tile / num_tiles;
      const int count = static_cast<int>(first + rows * (tile + 1) / num_tiles - row);
      dispatch_rows(count, [&](auto constant) { run_tile<constant()>(gemm, row, block); });
    }
  }
}

}  // namespace octavo
