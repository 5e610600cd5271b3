#include "quantize.h"

#include <algorithm>
#include <cmath>

namespace octavo {
namespace {

constexpr uint16_t kNoNumber = 0x7e00;  // of half precision
constexpr int kLargestInt8 = 127;
constexpr int kLargestInt4 = 15;
// Ranges that are tried for a group of 4-bit codes, as shares of the range of its weights: leaving out
// the outermost weight can bring the others nearer.
constexpr float kShares[] = {1.0f, 0.96f, 0.92f, 0.88f, 0.84f, 0.8f};

struct Weights {
  float values[kGroup];
  int count;

  bool are_finite() const {
    return std::all_of(values, values + count, [](float value) { return std::isfinite(value); });
  }
};

// ---------------------------------------------------------------- groups of a GGUF file

uint16_t half_at(const uint8_t* bytes) {
  uint16_t half;
  std::memcpy(&half, bytes, sizeof half);
  return half;
}

// Sixteen bytes: in their low halves the first codes, in their high ones the others.
void split_nibbles(const uint8_t* bytes, GroupCodes& group) {
  for (int i = 0; i < kGroup / 2; ++i) {
    group.codes[i] = static_cast<int8_t>(bytes[i] & 15);
    group.codes[i + kGroup / 2] = static_cast<int8_t>(bytes[i] >> 4);
  }
}

// A group of the eight of a block: scale and minimum have six bits each, and the block a factor for either.
GroupCodes read_q4_k(const uint8_t* block, int group_of_block) {
  const uint8_t* packed = block + 4;
  int scale, minimum;
  if (group_of_block < 4) {
    scale = packed[group_of_block] & 63;
    minimum = packed[group_of_block + 4] & 63;
  } else {
    scale = (packed[group_of_block + 4] & 15) | packed[group_of_block - 4] >> 6 << 4;
    minimum = packed[group_of_block + 4] >> 4 | packed[group_of_block] >> 6 << 4;
  }
  GroupCodes group{};
  group.scale = float_to_half(half_to_float(half_at(block)) * static_cast<float>(scale));
  group.minimum = float_to_half(-half_to_float(half_at(block + 2)) * static_cast<float>(minimum));
  const uint8_t* bytes = block + 16 + group_of_block / 2 * kGroup;  // of this group and the one beside it
  for (int i = 0; i < kGroup; ++i)
    group.codes[i] = static_cast<int8_t>(group_of_block % 2 == 0 ? bytes[i] & 15 : bytes[i] >> 4);
  return group;
}

// The codes of a matrix that has some.
GroupCodes read_group(const OctavoMatrix& matrix, int64_t row, int64_t index) {
  const int64_t number = row * (matrix.columns / kGroup) + index;
  const auto* data = static_cast<const uint8_t*>(matrix.data);
  GroupCodes group{};
  switch (matrix.type) {
    case OCTAVO_Q8_0: {
      const uint8_t* bytes = data + number * 34;
      group.scale = half_at(bytes);
      std::memcpy(group.codes, bytes + 2, kGroup);
      break;
    }
    case OCTAVO_Q4_0: {
      const uint8_t* bytes = data + number * 18;
      group.scale = half_at(bytes);
      group.minimum = float_to_half(-8.0f * half_to_float(group.scale));
      split_nibbles(bytes + 2, group);
      break;
    }
    case OCTAVO_Q4_1: {
      const uint8_t* bytes = data + number * 20;
      group.scale = half_at(bytes);
      group.minimum = half_at(bytes + 2);
      split_nibbles(bytes + 4, group);
      break;
    }
    default:
      return read_q4_k(data + number / 8 * 144, static_cast<int>(number % 8));
  }
  return group;
}

bool has_codes(const OctavoMatrix& matrix) { return matrix.type >= OCTAVO_Q8_0; }

// ---------------------------------------------------------------- groups of numbers

Weights weights_of(const OctavoMatrix& matrix, int64_t row, int64_t group) {
  Weights weights{};
  if (has_codes(matrix)) {
    const GroupCodes codes = read_group(matrix, row, group);
    weights.count = kGroup;
    for (int i = 0; i < kGroup; ++i)
      weights.values[i] = half_to_float(codes.scale) * codes.codes[i] + half_to_float(codes.minimum);
    return weights;
  }
  weights.count = static_cast<int>(std::min<int64_t>(kGroup, matrix.columns - group * kGroup));
  for (int i = 0; i < weights.count; ++i) weights.values[i] = matrix_element(matrix, row, group * kGroup + i);
  return weights;
}

// A half number that a code can be multiplied with: never infinite.
uint16_t finite_half(float value) { return float_to_half(std::clamp(value, -65504.0f, 65504.0f)); }

// The codes nearest to the weights, for a scale and a minimum; return the sum of squared distances.
float round_to_int4(const Weights& weights, GroupCodes& group) {
  const float scale = half_to_float(group.scale), minimum = half_to_float(group.minimum);
  const float inverse = scale == 0.0f ? 0.0f : 1.0f / scale;
  float error = 0.0f;
  for (int i = 0; i < weights.count; ++i) {
    const float code = std::clamp(std::nearbyint((weights.values[i] - minimum) * inverse), 0.0f, 15.0f);
    group.codes[i] = static_cast<int8_t>(code);
    const float distance = scale * code + minimum - weights.values[i];
    error += distance * distance;
  }
  return error;
}

// The scale and the minimum that bring given codes nearest to the weights (least squares).
void fit_to_codes(const Weights& weights, GroupCodes& group) {
  float codes = 0.0f, squares = 0.0f, values = 0.0f, products = 0.0f;
  for (int i = 0; i < weights.count; ++i) {
    const float code = group.codes[i], value = weights.values[i];
    codes += code;
    squares += code * code;
    values += value;
    products += code * value;
  }
  const float count = static_cast<float>(weights.count);
  const float spread = count * squares - codes * codes;
  if (spread <= 0.0f) return;
  const float scale = (count * products - codes * values) / spread;
  if (scale <= 0.0f) return;
  group.scale = finite_half(scale);
  group.minimum = finite_half((values - scale * codes) / count);
}

}  // namespace

float matrix_element(const OctavoMatrix& matrix, int64_t row, int64_t column) {
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

GroupCodes int8_group(const OctavoMatrix& matrix, int64_t row, int64_t index) {
  if (matrix.type == OCTAVO_Q8_0) return read_group(matrix, row, index);
  const Weights weights = weights_of(matrix, row, index);
  float largest = 0.0f;
  for (float value : weights.values) largest = std::max(largest, std::abs(value));
  GroupCodes group{};
  if (!weights.are_finite()) return {kNoNumber, 0, {}};
  group.scale = finite_half(largest / kLargestInt8);
  const float scale = half_to_float(group.scale);
  const float inverse = scale == 0.0f ? 0.0f : 1.0f / scale;
  for (int i = 0; i < weights.count; ++i)
    group.codes[i] = static_cast<int8_t>(std::clamp(std::nearbyint(weights.values[i] * inverse), -127.0f, 127.0f));
  return group;
}

GroupCodes int4_group(const OctavoMatrix& matrix, int64_t row, int64_t index) {
  if (has_codes(matrix) && matrix.type != OCTAVO_Q8_0) return read_group(matrix, row, index);
  const Weights weights = weights_of(matrix, row, index);
  if (!weights.are_finite()) return {kNoNumber, 0, {}};
  const auto [lowest, highest] = std::minmax_element(weights.values, weights.values + weights.count);
  GroupCodes best{};
  float least_error = -1.0f;
  for (const float share : kShares) {
    const float cut = 0.5f * (1.0f - share) * (*highest - *lowest);
    GroupCodes group{};
    group.scale = finite_half((*highest - *lowest - 2.0f * cut) / kLargestInt4);
    group.minimum = finite_half(*lowest + cut);
    round_to_int4(weights, group);
    fit_to_codes(weights, group);
    const float error = round_to_int4(weights, group);
    if (least_error < 0.0f || error < least_error) {
      best = group;
      least_error = error;
    }
  }
  return best;
}

}  // namespace octavo
