// Products of quantised weights and quantised activations.
#pragma once

#include <cstdint>

#include "abi.h"
#include "simd.h"

namespace octavo {

// Inputs that share a scale, in weights as in activations.
constexpr int kGroup = 32;

// Weights are packed like those of gemm.h, in blocks of 32 outputs, whose inputs are cut into groups:
// [out / 32][in / 32] pieces of
//
//   INT8   half scales[32]                        weight = scale * code, code in [-128, 127]
//          uint8_t codes[8 quads][32 outputs][4]  (code ^ kByteFlip)
//   INT4   half scales[32], minimums[32]          weight = scale * code + minimum, code in [0, 15]
//          uint8_t codes[4][32 outputs][4]        low halves: the first four quads, high halves: the other four
//
// So a block is read from its first to its last byte. Outputs and inputs are padded to whole blocks
// and groups, with zeros.
constexpr int64_t kScaleBytes = 32 * 2;
constexpr int64_t kInt8GroupBytes = kScaleBytes + 8 * 32 * 4;
constexpr int64_t kInt4GroupBytes = 2 * kScaleBytes + 4 * 32 * 4;

constexpr int64_t group_bytes(int32_t format) {
  return format == OCTAVO_WEIGHT_INT8 ? kInt8GroupBytes : kInt4GroupBytes;
}

// Activations, quantised group by group: x = scale * code, code in [-127, 127]. The scale is not a
// number where one of the group is not. A row holds, one after the other,
//
//   ByteActivation codes[in_features, padded to whole groups]   in the order of store_quads
//   float scales[groups]
//   float sums[groups]       the sum of the codes, times the scale
//   int32_t offsets[groups]  the sum of the codes, times -kByteFlip
struct QuantizedRows {
  const char* data = nullptr;
  int64_t stride = 0;  // in bytes
};

int64_t quantized_row_bytes(int64_t in_features);

// Quantise a row of activations, zero-padded to whole groups.
void quantize_row(const Activation* input, int64_t in_features, char* output);

// Rows that a kernel multiplies at once: their sums, of integers and of floats, stay in registers.
constexpr int kMaxQuantizedRows = kMaxTileRows < 6 ? kMaxTileRows : 6;

// The weights of a later block, fetched a group at a time while this one is computed.
struct GroupPrefetch {
  const char* next;
  int64_t bytes_per_group;  // 0: nothing is fetched
};

// sums [num_rows, 32] of a block: num_rows is from 1 to kMaxQuantizedRows. Each is one chain over the
// groups in ascending order, and exact within a group.
void multiply_quantized(const QuantizedRows& rows, int num_rows, const uint8_t* block, int32_t format,
                        int64_t in_features, GroupPrefetch& soon, float* sums);

// The weights of one output of a packed block, as float32 [in_features].
void unpack_quantized(const uint8_t* block, int column, int32_t format, int64_t in_features, float* output);

}  // namespace octavo
