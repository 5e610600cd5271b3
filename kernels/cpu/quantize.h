// Reads matrices of a checkpoint, and quantises them group by group.
#pragma once

#include <cstdint>

#include "abi.h"
#include "quantized.h"

namespace octavo {

// The codes of 32 inputs of one output, with the scales and minima of half precision that their format has: see quantized.h.
struct GroupCodes {
  uint16_t scales[2];
  uint16_t minima[2];
  uint8_t codes[kGroup];
};

// An element of a matrix of numbers.
float matrix_element(const OctavoMatrix& matrix, int64_t row, int64_t column);

// Columns [32 * index, 32 * index + 32) of a row in a format; those beyond the end are zeros. Of numbers the scale is not a number
// if one of them is not finite.
GroupCodes group_of(const OctavoMatrix& matrix, int32_t format, int64_t row, int64_t index);

}  // namespace octavo
