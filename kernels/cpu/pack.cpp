// From checkpoint tensors to the layouts that the kernels read.
#include <algorithm>

#include "abi.h"
#include "gemm.h"
#include "guard.h"
#include "handles.h"
#include "quantize.h"

namespace octavo {
namespace {

// Write rows [begin, begin + count) as columns [offset, offset + count) of a packed block.
void pack_bf16_columns(const OctavoMatrix& weight, int64_t begin, int64_t count, int64_t offset, uint8_t* block) {
  bf16* pairs = reinterpret_cast<bf16*>(block);
  for (int64_t column = 0; column < count && begin + column < weight.rows; ++column)
    for (int64_t k = 0; k < weight.columns; ++k)
      pairs[(k / 2 * kBlockColumns + offset + column) * 2 + k % 2] =
          float_to_bf16(matrix_element(weight, begin + column, k));
}

// Write the codes of 32 inputs and their scales.
void write_group(const CodeFormat& format, const GroupCodes& group, int64_t column, uint8_t* piece) {
  uint16_t* scales = reinterpret_cast<uint16_t*>(piece) + column;
  for (int i = 0; i < format.num_scales(); ++i) {
    scales[i * kBlockColumns] = group.scales[i];
    if (format.has_minimum) scales[(format.num_scales() + i) * kBlockColumns] = group.minima[i];
  }
  piece += header_bytes(format) + column * 4;
  constexpr int kRow = kBlockColumns * 4;
  for (int i = 0; i < kGroup; ++i) {
    const int code = group.codes[i], quad = i / 4, byte = i % 4;
    if (format.are_bytes()) {
      piece[quad * kRow + byte] = static_cast<uint8_t>(code ^ 128 ^ kByteFlip);
      continue;
    }
    piece[quad % 4 * kRow + byte] |= static_cast<uint8_t>((code & 15) << (quad / 4 * 4));
    uint8_t* upper = piece + 4 * kRow + byte;
    if (format.bits == 5) upper[0] |= static_cast<uint8_t>((code >> 4) << quad);
    if (format.bits == 6) upper[quad % 4 / 2 * kRow] |= static_cast<uint8_t>((code >> 4) << (quad % 2 * 4 + quad / 4 * 2));
  }
}

void pack_columns(int32_t format, const OctavoMatrix& weight, int64_t begin, int64_t count, int64_t offset,
                  uint8_t* block) {
  if (format == OCTAVO_WEIGHT_BF16) return pack_bf16_columns(weight, begin, count, offset, block);
  const CodeFormat codes = code_format(format);
  for (int64_t column = 0; column < count && begin + column < weight.rows; ++column)
    for (int64_t group = 0; group < divide_up(weight.columns, kGroup); ++group)
      write_group(codes, group_of(weight, format, begin + column, group), offset + column, block + group * group_bytes(format));
}

}  // namespace
}  // namespace octavo

using namespace octavo;

size_t octavo_packed_weight_size(int32_t format, int32_t out_features, int32_t in_features) {
  return static_cast<size_t>(divide_up(out_features, kBlockColumns) * block_bytes(format, in_features));
}

int32_t octavo_pack_linear(OctavoPool* pool, int32_t format, const OctavoMatrix* matrix, int64_t first_row,
                           uint8_t* packed) {
  return guarded([&] {
    const int64_t end = first_row + matrix->rows, first_block = first_row / kBlockColumns;
    const int num_blocks = static_cast<int>(divide_up(end, kBlockColumns) - first_block);
    pool->threads.for_each(num_blocks, [&](int64_t item, int) {
      const int64_t block = first_block + item;
      const int64_t begin = std::max(first_row, block * kBlockColumns);
      const int64_t count = std::min(end, (block + 1) * kBlockColumns) - begin;
      pack_columns(format, *matrix, begin - first_row, count, begin % kBlockColumns,
                   packed + block * block_bytes(format, matrix->columns));
    });
  });
}

int32_t octavo_pack_gated(OctavoPool* pool, int32_t format, const OctavoMatrix* gate, const OctavoMatrix* up,
                          int64_t first_row, uint8_t* packed) {
  return guarded([&] {
    const int num_blocks = static_cast<int>(divide_up(gate->rows, kGatedColumns));
    packed += first_row / kGatedColumns * block_bytes(format, gate->columns);
    pool->threads.for_each(num_blocks, [&](int64_t block, int) {
      uint8_t* target = packed + block * block_bytes(format, gate->columns);
      pack_columns(format, *gate, block * kGatedColumns, kGatedColumns, 0, target);
      pack_columns(format, *up, block * kGatedColumns, kGatedColumns, kGatedColumns, target);
    });
  });
}

int32_t octavo_to_bf16(OctavoPool* pool, const OctavoMatrix* matrix, uint16_t* rows, int32_t stride) {
  return guarded([&] {
    pool->threads.for_each(matrix->rows, [&](int64_t row, int) {
      for (int64_t column = 0; column < matrix->columns; ++column)
        rows[row * stride + column] = float_to_bf16(matrix_element(*matrix, row, column));
    });
  });
}
