// Reads matrices of a checkpoint, and quantises them group by group.
#pragma once

#include <cstdint>

#include "abi.h"
#include "quantized.h"

namespace octavo {

// A group of one output: weight = scale * code + minimum, of half precision. For 8 bits there is no
// minimum and codes are in [-128, 127], for 4 bits in [0, 15].
struct GroupCodes {
  uint16_t scale;
  uint16_t minimum;
  int8_t codes[kGroup];
};

// An element of a matrix of numbers.
float matrix_element(const OctavoMatrix& matrix, int64_t row, int64_t column);

// The codes of columns [32 * group, 32 * group + 32) of a row; those beyond the end are zeros.
// The scale is not a number if one of the weights is not finite.
GroupCodes int8_group(const OctavoMatrix& matrix, int64_t row, int64_t group);
GroupCodes int4_group(const OctavoMatrix& matrix, int64_t row, int64_t group);

}  // namespace octavo
