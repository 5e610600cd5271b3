// Products of quantised weights and quantised activations.
#pragma once

#include <cstdint>

#include "abi.h"
#include "simd.h"

namespace octavo {

// Inputs that share a scale, in weights as in activations.
constexpr int kGroup = 32;

// What codes of a format mean: weight = scale * (code - offset) + minimum, or scale * table[code].
struct CodeFormat {
  int bits;          // of a code, in [0, 2^bits)
  int group;         // inputs that share a scale of half precision: kGroup, or a half of it
  int offset;        // 128 of all that are kept as 8 bits
  bool has_minimum;  // of half precision, for each group
  const int8_t* table;

  constexpr int num_scales() const { return kGroup / group; }
  // A byte for each code, flipped where it is multiplied as it is: see simd.h. Else the lowest four bits, and the rest.
  constexpr bool are_bytes() const { return bits == 8; }
};

constexpr int8_t kIq4Values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
constexpr int8_t kMxfp4Values[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

// As CODE_FORMATS of library.py has it.
constexpr CodeFormat code_format(int32_t format) {
  switch (format) {
    case OCTAVO_WEIGHT_INT4:
      return {4, kGroup, 0, true, nullptr};
    case OCTAVO_WEIGHT_INT5:
      return {5, kGroup, 16, false, nullptr};
    case OCTAVO_WEIGHT_INT5_MINIMUM:
      return {5, kGroup, 0, true, nullptr};
    case OCTAVO_WEIGHT_INT6:
      return {6, kGroup / 2, 32, false, nullptr};
    case OCTAVO_WEIGHT_INT4_MINIMUM_16:
      return {4, kGroup / 2, 0, true, nullptr};
    case OCTAVO_WEIGHT_INT8_MINIMUM_16:
      return {8, kGroup / 2, 128, true, nullptr};
    case OCTAVO_WEIGHT_IQ4:
      return {4, kGroup, 0, false, kIq4Values};
    case OCTAVO_WEIGHT_MXFP4:
      return {4, kGroup, 0, false, kMxfp4Values};
    default:
      return {8, kGroup, 128, false, nullptr};
  }
}

// Weights are packed like those of gemm.h, in blocks of 32 outputs, whose inputs are cut into groups of 32:
// [out / 32][in / 32] pieces of
//
//   half scales[1 or 2][32], then minimums likewise where there are any
//   of 8 bits   uint8_t codes[8 quads][32 outputs][4]    (code ^ 128 ^ kByteFlip)
//   of fewer    uint8_t codes[4][32 outputs][4]          low halves: the lowest four bits of the first four quads, high
//                                                        halves: of the other four
//   of 5 bits   uint8_t fifth[32 outputs][4]             bit i: that of quad i
//   of 6 bits   uint8_t upper[2][32 outputs][4]          bits 4 * (i % 2) and the next of number i / 2: those of quad i, and
//                                                        the two after them: of quad i + 4
//
// So a block is read from its first to its last byte. Outputs and inputs are padded to whole blocks
// and groups, with zeros.
constexpr int64_t kScaleBytes = 32 * 2;

constexpr int64_t header_bytes(const CodeFormat& format) {
  return kScaleBytes * format.num_scales() * (format.has_minimum ? 2 : 1);
}
constexpr int64_t group_bytes(int32_t format) {
  const CodeFormat codes = code_format(format);
  return header_bytes(codes) + 4 * 32 * codes.bits;
}

// Activations, quantised group by group: x = scale * code, code in [-127, 127]. The scale is not a
// number where one of the group is not. A row holds, one after the other,
//
//   ByteActivation codes[in_features, padded to whole groups]   in the order of store_quads
//   float scales[groups]
//   float sums[groups]       the sum of the codes, times the scale
//   int32_t offsets[groups]  the sum of the codes, times -kByteFlip
//   float half_sums[groups][2]  as sums, of either half of a group
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
