// From checkpoint tensors to the layouts that the kernels read.
#include <algorithm>

#include "abi.h"
#include "gemm.h"
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

void write_int8_group(const GroupCodes& group, int64_t column, uint8_t* piece) {
  reinterpret_cast<uint16_t*>(piece)[column] = group.scale;
  for (int i = 0; i < kGroup; ++i)
    piece[kScaleBytes + (i / 4 * kBlockColumns + column) * 4 + i % 4] =
        static_cast<uint8_t>(group.codes[i]) ^ kByteFlip;
}

void write_int4_group(const GroupCodes& group, int64_t column, uint8_t* piece) {
  uint16_t* scales = reinterpret_cast<uint16_t*>(piece);
  scales[column] = group.scale;
  scales[kBlockColumns + column] = group.minimum;
  for (int i = 0; i < kGroup / 2; ++i)
    piece[2 * kScaleBytes + (i / 4 * kBlockColumns + column) * 4 + i % 4] =
        static_cast<uint8_t>(group.codes[i] | group.codes[i + kGroup / 2] << 4);
}

void pack_columns(int32_t format, const OctavoMatrix& weight, int64_t begin, int64_t count, int64_t offset,
                  uint8_t* block) {
  if (format == OCTAVO_WEIGHT_BF16) return pack_bf16_columns(weight, begin, count, offset, block);
  for (int64_t column = 0; column < count && begin + column < weight.rows; ++column) {
    for (int64_t group = 0; group < divide_up(weight.columns, kGroup); ++group) {
      uint8_t* piece = block + group * group_bytes(format);
      if (format == OCTAVO_WEIGHT_INT8) {
        write_int8_group(int8_group(weight, begin + column, group), offset + column, piece);
      } else {
        write_int4_group(int4_group(weight, begin + column, group), offset + column, piece);
      }
    }
  }
}

}  // namespace
}  // namespace octavo

using namespace octavo;

size_t octavo_packed_weight_size(int32_t format, int32_t out_features, int32_t in_features) {
  return static_cast<size_t>(divide_up(out_features, kBlockColumns) * block_bytes(format, in_features));
}

void octavo_pack_linear(OctavoPool* pool, int32_t format, const OctavoMatrix* parts, int32_t num_parts,
                        uint8_t* packed) {
  int64_t first_row = 0;
  for (const OctavoMatrix* part = parts; part != parts + num_parts; ++part) {
    const int64_t end = first_row + part->rows, first_block = first_row / kBlockColumns;
    const int num_blocks = static_cast<int>(divide_up(end, kBlockColumns) - first_block);
    pool->threads.for_each(num_blocks, [&](int64_t item, int) {
      const int64_t block = first_block + item;
      const int64_t begin = std::max(first_row, block * kBlockColumns);
      const int64_t count = std::min(end, (block + 1) * kBlockColumns) - begin;
      pack_columns(format, *part, begin - first_row, count, begin % kBlockColumns,
                   packed + block * block_bytes(format, part->columns));
    });
    first_row = end;
  }
}

void octavo_pack_gated(OctavoPool* pool, int32_t format, const OctavoMatrix* gate, const OctavoMatrix* up,
                       uint8_t* packed) {
  const int num_blocks = static_cast<int>(divide_up(gate->rows, kGatedColumns));
  pool->threads.for_each(num_blocks, [&](int64_t block, int) {
    uint8_t* target = packed + block * block_bytes(format, gate->columns);
    pack_columns(format, *gate, block * kGatedColumns, kGatedColumns, 0, target);
    pack_columns(format, *up, block * kGatedColumns, kGatedColumns, kGatedColumns, target);
  });
}

void octavo_to_bf16(OctavoPool* pool, const OctavoMatrix* matrix, uint16_t* rows, int32_t stride) {
  pool->threads.for_each(matrix->rows, [&](int64_t row, int) {
    for (int64_t column = 0; column < matrix->columns; ++column)
      rows[row * stride + column] = float_to_bf16(matrix_element(*matrix, row, column));
  });
}
