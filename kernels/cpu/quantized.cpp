#include "quantized.h"

#include <algorithm>

#include "dispatch.h"
#include "gemm.h"

namespace octavo {
namespace {

constexpr int kVectorsPerBlock = kBlockColumns / kLanes;
constexpr float kLargestCode = 127.0f;

int64_t num_groups(int64_t in_features) { return divide_up(in_features, kGroup); }

// What a row holds beside its codes.
struct RowFactors {
  const float* scales;
  const float* sums;
  const int32_t* offsets;
  const float* half_sums;

  RowFactors(const char* row, int64_t groups)
      : scales(reinterpret_cast<const float*>(row + groups * kGroup * sizeof(ByteActivation))),
        sums(scales + groups),
        offsets(reinterpret_cast<const int32_t*>(sums + groups)),
        half_sums(reinterpret_cast<const float*>(offsets + groups)) {}
};

// The vectors of a block that so many rows leave registers for: two sums each.
constexpr int vectors_at_once(int num_rows) {
  int vectors = kVectorsPerBlock;
  while (vectors > 1 && 2 * num_rows * vectors > kAccumulators) vectors /= 2;
  return vectors;
}

// A value of a later row, `stride` bytes each.
template <class T>
T of_row(const T* first, int64_t stride, int row) {
  return *reinterpret_cast<const T*>(reinterpret_cast<const char*>(first) + row * stride);
}

// What the codes of a table stand for, as the kernels multiply them.
struct alignas(kTableBytes) Table {
  uint8_t bytes[kTableBytes] = {};

  constexpr explicit Table(const int8_t* values) {
    for (int i = 0; values != nullptr && i < kTableBytes; ++i) bytes[i] = static_cast<uint8_t>(values[i]) ^ kByteFlip;
  }
};

// The codes of quads i and i + 4 of a group, below four of fewer than 8 bits.
template <int32_t kFormat>
inline void load_pair(const uint8_t* codes, int i, int vector, Bytes table, Quads& low, Quads& high) {
  constexpr CodeFormat kCodes = code_format(kFormat);
  const uint8_t* piece = codes + (i * kBlockColumns + vector * kLanes) * 4;
  if constexpr (kFormat == OCTAVO_WEIGHT_INT4 || kFormat == OCTAVO_WEIGHT_INT4_MINIMUM_16)
    return load_nibbles(piece, low, high);
  const Bytes bytes = load_bytes(piece);
  Bytes first = bytes & 15, second = bytes >> 4;
  const uint8_t* upper = codes + 4 * kBlockColumns * 4 + vector * kLanes * 4;
  if constexpr (kCodes.table != nullptr) {
    first = look_up(table, first);
    second = look_up(table, second);
  } else if constexpr (kCodes.bits == 5) {
    const Bytes fifth = load_bytes(upper);
    first |= shift_left(fifth, 4 - i) & 16;
    second |= shift_right(fifth, i) & 16;
  } else if constexpr (kCodes.bits == 6) {
    const Bytes two = load_bytes(upper + i / 2 * kBlockColumns * 4);
    first |= (i % 2 == 0 ? shift_left(two, 4) : two) & 48;
    second |= (i % 2 == 0 ? shift_left(two, 2) : shift_right(two, 2)) & 48;
  }
  low = quads_of(first);
  high = quads_of(second);
}

// The integer sums of a group, or of the half of it that shares a scale, from where they start.
template <int32_t kFormat, int kHalf, int kRows, int kVectors>
inline void multiply_group(const ByteActivation* x, int64_t stride, const uint8_t* codes, Bytes table,
                           IntVec (&sum)[kRows][kVectors]) {
  constexpr CodeFormat kCodes = code_format(kFormat);
  constexpr bool kHasHalves = kCodes.num_scales() == 2;
  constexpr bool kHasSecond = !kCodes.are_bytes() && !kHasHalves;
  constexpr int kPieces = kCodes.are_bytes() && !kHasHalves ? kGroup / 4 : kGroup / 8;
  x += kHalf * kGroup / 2;
#pragma GCC unroll 8
  for (int i = 0; i < kPieces; ++i) {
    Quads low[kVectors], high[kVectors];
    for (int vector = 0; vector < kVectors; ++vector) {
      if constexpr (kCodes.are_bytes()) {
        low[vector] = load_quads(codes + ((i + kHalf * kPieces) * kBlockColumns + vector * kLanes) * 4);
      } else if constexpr (kHalf == 0) {
        load_pair<kFormat>(codes, i, vector, table, low[vector], high[vector]);
      } else {
        load_pair<kFormat>(codes, i, vector, table, high[vector], low[vector]);
      }
    }
    const char* three_rows = reinterpret_cast<const char*>(x + i * 4);
    for (int row = 0; row < kRows; ++row) {
      // An address for every third row: see gemm.cpp.
      if (row > 0 && row % 3 == 0) three_rows += 3 * stride;
      if (row % 3 == 0) keep_in_register(three_rows);
      const auto* x_of_row = reinterpret_cast<const ByteActivation*>(three_rows + row % 3 * stride);
      const QuadActivations first = broadcast_quad(x_of_row);
      for (int vector = 0; vector < kVectors; ++vector)
        sum[row][vector] = dot_quads(sum[row][vector], low[vector], first);
      if constexpr (kHasSecond) {
        const QuadActivations second = broadcast_quad(x_of_row + kGroup / 2);
        for (int vector = 0; vector < kVectors; ++vector)
          sum[row][vector] = dot_quads(sum[row][vector], high[vector], second);
      }
    }
  }
}

// What a group, or a half of it, adds to the sums.
template <int32_t kFormat, int kHalf, int kRows, int kVectors>
inline void add_group(const RowFactors& factors, int64_t group, const ByteActivation* x, int64_t stride,
                      const uint8_t* piece, int column, Bytes table, Vec (&total)[kRows][kVectors]) {
  constexpr CodeFormat kCodes = code_format(kFormat);
  constexpr bool kHasHalves = kCodes.num_scales() == 2;
  // What codes count from is taken away from integers where a whole group shares a scale and codes are bytes, else with the minimum.
  constexpr bool kFlips = kByteFlip != 0 && (kCodes.are_bytes() || kCodes.table != nullptr);
  constexpr int kOffset = kCodes.are_bytes() ? (kHasHalves ? kByteFlip : 0) : kCodes.offset;
  constexpr bool kAddsMinimum = kCodes.has_minimum || kOffset != 0;

  // Scales come first, as in memory: the processor's own fetching follows reads in order.
  const auto* halves = reinterpret_cast<const uint16_t*>(piece) + kHalf * kBlockColumns + column;
  Vec scale[kVectors], minimum[kVectors];
  for (int vector = 0; vector < kVectors; ++vector) {
    scale[vector] = load_half(halves + vector * kLanes);
    if constexpr (kCodes.has_minimum)
      minimum[vector] = load_half(halves + kCodes.num_scales() * kBlockColumns + vector * kLanes);
    if constexpr (kOffset != 0 && kCodes.has_minimum) minimum[vector] -= scale[vector] * broadcast(float{kOffset});
    if constexpr (kOffset != 0 && !kCodes.has_minimum) minimum[vector] = scale[vector] * broadcast(-float{kOffset});
  }
  IntVec sum[kRows][kVectors];
  for (int row = 0; row < kRows; ++row) {
    const int32_t start = kFlips && !kHasHalves ? of_row(factors.offsets + group, stride, row) : 0;
    for (int vector = 0; vector < kVectors; ++vector) sum[row][vector] = broadcast(start);
  }
  multiply_group<kFormat, kHalf>(x, stride, piece + header_bytes(kCodes) + column * 4, table, sum);
  const float* sums = kHasHalves ? factors.half_sums + 2 * group + kHalf : factors.sums + group;
  for (int row = 0; row < kRows; ++row) {
    const Vec row_scale = broadcast(of_row(factors.scales + group, stride, row));
    for (int vector = 0; vector < kVectors; ++vector) {
      Vec& value = total[row][vector];
      value = multiply_add(to_float(sum[row][vector]), scale[vector] * row_scale, value);
      if constexpr (kAddsMinimum) value = multiply_add(minimum[vector], broadcast(of_row(sums, stride, row)), value);
    }
  }
}

// sums[row][column] of a part of a block.
template <int32_t kFormat, int kRows>
void multiply_rows(const QuantizedRows& rows, const uint8_t* weights, int column, int64_t groups, GroupPrefetch& soon,
                   float* sums) {
  constexpr int kVectors = vectors_at_once(kRows);
  static constexpr Table kTable(code_format(kFormat).table);
  const int64_t stride = rows.stride;
  const auto* x = reinterpret_cast<const ByteActivation*>(rows.data);
  const RowFactors factors(rows.data, groups);
  const Bytes table = load_table(kTable.bytes);
  Vec total[kRows][kVectors];
  clear(total);
  assume(groups > 0);
  for (int64_t group = 0; group < groups; ++group) {
    const uint8_t* piece = weights + group * group_bytes(kFormat);
    for (int64_t i = 0; i < soon.bytes_per_group; i += 64) prefetch_l2(soon.next + i);
    soon.next += soon.bytes_per_group;
    add_group<kFormat, 0>(factors, group, x + group * kGroup, stride, piece, column, table, total);
    if constexpr (code_format(kFormat).num_scales() == 2)
      add_group<kFormat, 1>(factors, group, x + group * kGroup, stride, piece, column, table, total);
  }
  for (int row = 0; row < kRows; ++row)
    for (int vector = 0; vector < kVectors; ++vector)
      store(sums + row * kBlockColumns + column + vector * kLanes, total[row][vector]);
}

template <int32_t kFormat, int kRows>
void multiply_block(const QuantizedRows& rows, const uint8_t* block, int64_t groups, GroupPrefetch& soon, float* sums) {
  constexpr int kColumns = vectors_at_once(kRows) * kLanes;
  GroupPrefetch nothing{nullptr, 0};
  for (int column = 0; column < kBlockColumns; column += kColumns)
    multiply_rows<kFormat, kRows>(rows, block, column, groups, column == 0 ? soon : nothing, sums);
}

template <int32_t kFormat>
void multiply(const QuantizedRows& rows, int num_rows, const uint8_t* block, int64_t groups, GroupPrefetch& soon,
              float* sums) {
  dispatch_rows<kMaxQuantizedRows>(
      num_rows, [&](auto constant) { multiply_block<kFormat, constant()>(rows, block, groups, soon, sums); });
}

// The bits of quad `quad` above the lowest four, where they are, of a byte of it.
int upper_bits(const CodeFormat& codes, const uint8_t* upper, int quad, int byte) {
  if (codes.bits == 5) return (upper[byte] >> quad & 1) << 4;
  if (codes.bits == 6) return (upper[quad % 4 / 2 * kBlockColumns * 4 + byte] >> (quad % 2 * 4 + quad / 4 * 2) & 3) << 4;
  return 0;
}

}  // namespace

int64_t quantized_row_bytes(int64_t in_features) {
  const int64_t groups = num_groups(in_features);
  return round_up(groups * (kGroup * static_cast<int64_t>(sizeof(ByteActivation)) + 5 * 4), 64);
}

void quantize_row(const Activation* input, int64_t in_features, char* output) {
  constexpr int kVectors = kGroup / kLanes;
  const Vec magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const int64_t groups = num_groups(in_features);
  auto* codes = reinterpret_cast<ByteActivation*>(output);
  auto* scales = reinterpret_cast<float*>(codes + groups * kGroup);
  float* sums = scales + groups;
  auto* offsets = reinterpret_cast<int32_t*>(sums + groups);
  float* half_sums = reinterpret_cast<float*>(offsets + groups);
  for (int64_t group = 0; group < groups; ++group) {
    Vec x[kVectors];
    IntVec largest = {};  // as bits: what is not a number is larger than any number
    for (int i = 0; i < kVectors; ++i) {
      x[i] = load_activation(input + group * kGroup + i * kLanes);
      const IntVec magnitude = bits(x[i]) & 0x7fffffff;
      largest = magnitude > largest ? magnitude : largest;
    }
    const int32_t largest_bits = max_lanes(largest);
    float largest_value;
    std::memcpy(&largest_value, &largest_bits, sizeof largest_value);
    const float scale = largest_value / kLargestCode;
    const Vec inverse = broadcast(largest_value == 0.0f ? 0.0f : kLargestCode / largest_value);
    alignas(64) int8_t rounded[kGroup];
    IntVec totals[2] = {};  // of either half
    for (int i = 0; i < kVectors; ++i) {
      const IntVec code = bits(x[i] * inverse + magic) - bits(magic);
      totals[i / (kVectors / 2)] += code;
      const ByteVec bytes = __builtin_convertvector(code, ByteVec);
      std::memcpy(rounded + i * kLanes, &bytes, sizeof bytes);
    }
    store_quads(codes + group * kGroup, rounded, kGroup);
    const int32_t first = sum_lanes(totals[0]), second = sum_lanes(totals[1]), sum = first + second;
    scales[group] = scale;
    sums[group] = scale * static_cast<float>(sum);
    offsets[group] = -kByteFlip * sum;
    half_sums[2 * group] = scale * static_cast<float>(first);
    half_sums[2 * group + 1] = scale * static_cast<float>(second);
  }
}

void multiply_quantized(const QuantizedRows& rows, int num_rows, const uint8_t* block, int32_t format,
                        int64_t in_features, GroupPrefetch& soon, float* sums) {
  const int64_t groups = num_groups(in_features);
  switch (format) {
#define OCTAVO_CASE(kFormat) \
  case kFormat:              \
    return multiply<kFormat>(rows, num_rows, block, groups, soon, sums);
    OCTAVO_CASE(OCTAVO_WEIGHT_INT8)
    OCTAVO_CASE(OCTAVO_WEIGHT_INT4)
    OCTAVO_CASE(OCTAVO_WEIGHT_INT5)
    OCTAVO_CASE(OCTAVO_WEIGHT_INT5_MINIMUM)
    OCTAVO_CASE(OCTAVO_WEIGHT_INT6)
    OCTAVO_CASE(OCTAVO_WEIGHT_INT4_MINIMUM_16)
    OCTAVO_CASE(OCTAVO_WEIGHT_INT8_MINIMUM_16)
    OCTAVO_CASE(OCTAVO_WEIGHT_IQ4)
    OCTAVO_CASE(OCTAVO_WEIGHT_MXFP4)
#undef OCTAVO_CASE
  }
}

void unpack_quantized(const uint8_t* block, int column, int32_t format, int64_t in_features, float* output) {
  const CodeFormat codes = code_format(format);
  const int64_t header = header_bytes(codes), bytes = group_bytes(format);
  for (int64_t i = 0; i < in_features; ++i) {
    const uint8_t* piece = block + i / kGroup * bytes;
    const auto* scales = reinterpret_cast<const uint16_t*>(piece) + i % kGroup / codes.group * kBlockColumns + column;
    const int quad = static_cast<int>(i % kGroup / 4), byte = column * 4 + static_cast<int>(i % 4);
    int code;
    if (codes.are_bytes()) {
      code = static_cast<int8_t>(piece[header + quad * kBlockColumns * 4 + byte] ^ kByteFlip);
    } else {
      const int two = piece[header + quad % 4 * kBlockColumns * 4 + byte];
      code = (quad < 4 ? two & 15 : two >> 4) | upper_bits(codes, piece + header + 4 * kBlockColumns * 4, quad, byte);
      code = codes.table != nullptr ? codes.table[code] : code - codes.offset;
    }
    output[i] = half_to_float(*scales) * static_cast<float>(code);
    if (codes.has_minimum) output[i] += half_to_float(scales[codes.num_scales() * kBlockColumns]);
  }
}

}  // namespace octavo
