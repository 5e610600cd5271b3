// From checkpoint tensors to the layouts that the kernels read.
#include <cstring>

#include "abi.h"
#include "gemm.h"
#include "handles.h"

namespace octavo {
namespace {

float half_to_float(uint16_t value) {
  const uint32_t sign = static_cast<uint32_t>(value & 0x8000) << 16;
  const uint32_t magnitude = value & 0x7fff;
  if (magnitude < 0x0400) {  // zero and subnormal numbers
    const float result = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
    return sign != 0 ? -result : result;
  }
  const uint32_t exponent_shift = magnitude >= 0x7c00 ? (255u - 31u) << 23 : (127u - 15u) << 23;
  const uint32_t word = sign | ((magnitude << 13) + exponent_shift);
  float result;
  std::memcpy(&result, &word, sizeof result);
  return result;
}

float element(const OctavoMatrix& matrix, int64_t row, int64_t column) {
  const int64_t index = row * matrix.columns + column;
  switch (matrix.type) {
    case OCTAVO_BF16:
      return bf16_to_float(static_cast<const uint16_t*>(matrix.data)[index]);
    case OCTAVO_F16:
      return half_to_float(static_cast<const uint16_t*>(matrix.data)[index]);
    default:
      return static_cast<const float*>(matrix.data)[index];
  }
}

// Write rows [begin, begin + count) as columns [offset, offset + count) of a packed block.
void pack_columns(const OctavoMatrix& weight, int64_t begin, int64_t count, int64_t offset, bf16* block) {
  for (int64_t column = 0; column < count && begin + column < weight.rows; ++column)
    for (int64_t k = 0; k < weight.columns; ++k)
      block[(k / 2 * kBlockColumns + offset + column) * 2 + k % 2] =
          float_to_bf16(element(weight, begin + column, k));
}

int64_t block_size(int64_t in_features) { return divide_up(in_features, 2) * kBlockColumns * 2; }

}  // namespace
}  // namespace octavo

using namespace octavo;

size_t octavo_packed_weight_size(int32_t out_features, int32_t in_features) {
  return static_cast<size_t>(divide_up(out_features, kBlockColumns) * block_size(in_features));
}

void octavo_pack_linear(OctavoPool* pool, const OctavoMatrix* weight, uint16_t* packed) {
  const int num_blocks = static_cast<int>(divide_up(weight->rows, kBlockColumns));
  pool->threads.for_each(num_blocks, [&](int64_t block, int) {
    pack_columns(*weight, block * kBlockColumns, kBlockColumns, 0, packed + block * block_size(weight->columns));
  });
}

void octavo_pack_gated(OctavoPool* pool, const OctavoMatrix* gate, const OctavoMatrix* up, uint16_t* packed) {
  const int num_blocks = static_cast<int>(divide_up(gate->rows, kGatedColumns));
  pool->threads.for_each(num_blocks, [&](int64_t block, int) {
    bf16* target = packed + block * block_size(gate->columns);
    pack_columns(*gate, block * kGatedColumns, kGatedColumns, 0, target);
    pack_columns(*up, block * kGatedColumns, kGatedColumns, kGatedColumns, target);
  });
}

void octavo_to_bf16(OctavoPool* pool, const OctavoMatrix* matrix, uint16_t* rows, int32_t stride) {
  pool->threads.for_each(matrix->rows, [&](int64_t row, int) {
    for (int64_t column = 0; column < matrix->columns; ++column)
      rows[row * stride + column] = float_to_bf16(element(*matrix, row, column));
  });
}
