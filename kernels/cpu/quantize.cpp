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
constexpr int kNumRanges = sizeof kShares / sizeof *kShares;
using Lanes = float __attribute__((vector_size(32)));
static_assert(kNumRanges <= static_cast<int>(sizeof(Lanes) / sizeof(float)));

struct Weights {
  float values[kGroup];
  int count;

  bool are_finite() const {
    return std::all_of(values, values + count, [](float value) { return std::isfinite(value); });
  }
};

// Codes of the format as they are.
GroupCodes read_group(const OctavoMatrix& matrix, const CodeFormat& format, int64_t row, int64_t index) {
  GroupCodes group{};
  const int64_t first = index * kGroup, end = std::min<int64_t>(first + kGroup, matrix.columns);
  const int64_t groups = divide_up(matrix.columns, matrix.group);
  for (int i = 0; i < format.num_scales(); ++i) {
    const int64_t column = std::min<int64_t>(first + i * format.group, matrix.columns - 1);
    const int64_t place = row * groups + column / matrix.group;
    group.scales[i] = float_to_half(matrix.scales[place]);
    if (format.has_minimum) group.minima[i] = float_to_half(matrix.minima[place]);
  }
  const int zero = format.has_minimum ? 0 : format.offset;
  std::fill(group.codes, group.codes + kGroup, static_cast<uint8_t>(zero));
  const auto* codes = static_cast<const uint8_t*>(matrix.data) + row * matrix.columns;
  std::copy(codes + first, codes + end, group.codes);
  return group;
}

// ---------------------------------------------------------------- groups of numbers

Weights weights_of(const OctavoMatrix& matrix, int64_t row, int64_t group) {
  Weights weights{};
  weights.count = static_cast<int>(std::min<int64_t>(kGroup, matrix.columns - group * kGroup));
  for (int i = 0; i < weights.count; ++i) weights.values[i] = matrix_element(matrix, row, group * kGroup + i);
  return weights;
}

// A half number that a code can be multiplied with: never infinite.
uint16_t finite_half(float value) { return float_to_half(std::clamp(value, -65504.0f, 65504.0f)); }

// All ranges that are tried, side by side: one of each lane. Each is one chain of sums.
struct Ranges {
  Lanes scale, minimum, error;
  Lanes codes[kGroup];

  void set(int range, float new_scale, float new_minimum) {
    scale[range] = half_to_float(finite_half(new_scale));
    minimum[range] = half_to_float(finite_half(new_minimum));
  }
  void round(const Weights& weights);
  void fit(const Weights& weights);
};

// The codes nearest to the weights, and the sums of squared distances.
void Ranges::round(const Weights& weights) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Lanes lowest = {}, highest = lowest + float{kLargestInt4};
  const Lanes inverse = scale == lowest ? lowest : 1.0f / scale;
  error = lowest;
  for (int i = 0; i < weights.count; ++i) {
    Lanes code = (weights.values[i] - minimum) * inverse;
    code = code < lowest ? lowest : code;
    code = code > highest ? highest : code;
    code = (code + kMagic) - kMagic;
    const Lanes distance = scale * code + minimum - weights.values[i];
    error += distance * distance;
    codes[i] = code;
  }
}

// The scales and the minima that bring the codes nearest to the weights (least squares).
void Ranges::fit(const Weights& weights) {
  Lanes sums = {}, squares = {}, products = {};
  float values = 0.0f;
  for (int i = 0; i < weights.count; ++i) {
    values += weights.values[i];
    sums += codes[i];
    squares += codes[i] * codes[i];
    products += codes[i] * weights.values[i];
  }
  const float count = static_cast<float>(weights.count);
  const Lanes spread = count * squares - sums * sums;
  const Lanes new_scale = (count * products - sums * values) / spread;
  const Lanes new_minimum = (values - new_scale * sums) / count;
  for (int range = 0; range < kNumRanges; ++range)
    if (!(spread[range] <= 0.0f) && !(new_scale[range] <= 0.0f)) set(range, new_scale[range], new_minimum[range]);
}

GroupCodes int8_group(const OctavoMatrix& matrix, int64_t row, int64_t index) {
  const Weights weights = weights_of(matrix, row, index);
  float largest = 0.0f;
  for (float value : weights.values) largest = std::max(largest, std::abs(value));
  GroupCodes group{};
  if (!weights.are_finite()) return {{kNoNumber}, {}, {}};
  group.scales[0] = finite_half(largest / kLargestInt8);
  const float scale = half_to_float(group.scales[0]);
  const float inverse = scale == 0.0f ? 0.0f : 1.0f / scale;
  for (int i = 0; i < kGroup; ++i)
    group.codes[i] = static_cast<uint8_t>(128 + std::clamp(std::nearbyint(weights.values[i] * inverse), -127.0f, 127.0f));
  return group;
}

GroupCodes int4_group(const OctavoMatrix& matrix, int64_t row, int64_t index) {
  const Weights weights = weights_of(matrix, row, index);
  if (!weights.are_finite()) return {{kNoNumber}, {}, {}};
  const auto [lowest, highest] = std::minmax_element(weights.values, weights.values + weights.count);
  Ranges ranges{};
  for (int r = 0; r < kNumRanges; ++r) {
    const float cut = 0.5f * (1.0f - kShares[r]) * (*highest - *lowest);
    ranges.set(r, (*highest - *lowest - 2.0f * cut) / kLargestInt4, *lowest + cut);
  }
  ranges.round(weights);
  ranges.fit(weights);
  ranges.round(weights);
  int nearest = 0;
  for (int r = 1; r < kNumRanges; ++r)
    if (ranges.error[r] < ranges.error[nearest]) nearest = r;
  GroupCodes best{{finite_half(ranges.scale[nearest])}, {finite_half(ranges.minimum[nearest])}, {}};
  for (int i = 0; i < weights.count; ++i) best.codes[i] = static_cast<uint8_t>(ranges.codes[i][nearest]);
  return best;
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

GroupCodes group_of(const OctavoMatrix& matrix, int32_t format, int64_t row, int64_t index) {
  if (matrix.type == OCTAVO_CODES) return read_group(matrix, code_format(format), row, index);
  return format == OCTAVO_WEIGHT_INT8 ? int8_group(matrix, row, index) : int4_group(matrix, row, index);
}

}  // namespace octavo
