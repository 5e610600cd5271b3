// bf16 weights in twelve bits, without loss.
#pragma once

#include <cstdint>

#include "abi.h"
#include "simd.h"

namespace octavo {

// The upper byte of a bf16 number, its sign and seven bits of its exponent, has one of sixteen values in all but one of ten
// thousand weights of a trained layer: four bits say which. The lower byte is kept as it is. (That the exponents of weights
// hold little information is the observation of DFloat11, arXiv:2504.11651. Its codes are shorter and of several lengths;
// these can be decompressed as fast as memory delivers them.)
//
// A layer's blocks, see gemm.h, are compressed one by one. Each begins with a whole cache line and holds
//
//   uint8_t upper[16]        the most frequent upper bytes
//   uint32_t exceptions[]    weights with another one: their place in the block << 8 | their upper byte, ascending; the last
//                            is kNoException. There is room for one weight in kWeightsPerException.
//   groups of 128 weights, in the order of the packed block, its inputs padded to whole steps with zeros:
//     uint8_t codes[64]      of weight 32 v + 8 j + i the half v / 2 (0: the lower one) of byte 16 j + 8 (v % 2) + i
//     uint8_t lower[2][64]   of weight 32 v + 8 j + i byte 16 j + 8 (v % 2) + i of row v / 2
struct CompressedGroup {
  static constexpr int kWeights = 128;
  uint8_t codes[64];
  uint8_t lower[2][64];
};
static_assert(sizeof(CompressedGroup) == 192);

// A step holds the weights of so many inputs and a block, as they are packed: [kCompressedInputs / 2][kBlockColumns][2].
constexpr int kCompressedInputs = 32;
constexpr int kGroupsPerStep = 8;
constexpr int kStepWeights = kGroupsPerStep * CompressedGroup::kWeights;
constexpr int kWeightsPerException = 256;
constexpr uint32_t kNoException = ~uint32_t{0};

int64_t compressed_block_bytes(int64_t in_features);
const uint32_t* exceptions_of(const uint8_t* compressed);
const CompressedGroup* groups_of(const uint8_t* compressed, int64_t in_features);

// Compress a packed block; false if there is no room for its exceptions.
bool compress_block(const bf16* block, int64_t in_features, uint8_t* compressed);

// One output of a block, as float32 [in_features].
void unpack_compressed_column(const uint8_t* compressed, int64_t column, int64_t in_features, float* output);

}  // namespace octavo
