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

  RowFactors(const char* row, int64_t groups)
      : scales(reinterpret_cast<const float*>(row + groups * kGroup * sizeof(ByteActivation))),
        sums(scales + groups),
        offsets(reinterpret_cast<const int32_t*>(sums + groups)) {}
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

// The integer sums of a group, from where they start.
template <bool kIsInt4, int kRows, int kVectors>
void multiply_group(const ByteActivation* x, int64_t stride, const uint8_t* codes, IntVec (&sum)[kRows][kVectors]) {
  constexpr int kPieces = kIsInt4 ? kGroup / 8 : kGroup / 4;
  for (int i = 0; i < kPieces; ++i) {
    Quads low[kVectors], high[kVectors];
    for (int vector = 0; vector < kVectors; ++vector) {
      const uint8_t* piece = codes + (i * kBlockColumns + vector * kLanes) * 4;
      if constexpr (kIsInt4) {
        load_nibbles(piece, low[vector], high[vector]);
      } else {
        low[vector] = load_quads(piece);
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
      if constexpr (kIsInt4) {
        const QuadActivations second = broadcast_quad(x_of_row + kGroup / 2);
        for (int vector = 0; vector < kVectors; ++vector)
          sum[row][vector] = dot_quads(sum[row][vector], high[vector], second);
      }
    }
  }
}

// sums[row][column] of a part of a block.
template <bool kIsInt4, int kRows>
void multiply_rows(const QuantizedRows& rows, const uint8_t* weights, int column, int64_t groups, GroupPrefetch& soon,
                   float* sums) {
  constexpr int kVectors = vectors_at_once(kRows);
  constexpr int64_t kHeaderBytes = kIsInt4 ? 2 * kScaleBytes : kScaleBytes;
  const int64_t stride = rows.stride;
  const auto* x = reinterpret_cast<const ByteActivation*>(rows.data);
  const RowFactors factors(rows.data, groups);
  Vec total[kRows][kVectors];
  clear(total);
  assume(groups > 0);
  for (int64_t group = 0; group < groups; ++group) {
    const uint8_t* piece = weights + group * group_bytes(kIsInt4 ? OCTAVO_WEIGHT_INT4 : OCTAVO_WEIGHT_INT8);
    for (int64_t i = 0; i < soon.bytes_per_group; i += 64) prefetch_l2(soon.next + i);
    soon.next += soon.bytes_per_group;

    // Scales come first, as in memory: the processor's own fetching follows reads in order.
    const auto* halves = reinterpret_cast<const uint16_t*>(piece) + column;
    Vec scale[kVectors], minimum[kVectors];
    for (int vector = 0; vector < kVectors; ++vector) {
      scale[vector] = load_half(halves + vector * kLanes);
      if constexpr (kIsInt4) minimum[vector] = load_half(halves + kBlockColumns + vector * kLanes);
    }
    IntVec sum[kRows][kVectors];
    for (int row = 0; row < kRows; ++row) {
      const int32_t start = kIsInt4 || kByteFlip == 0 ? 0 : of_row(factors.offsets + group, stride, row);
      for (int vector = 0; vector < kVectors; ++vector) sum[row][vector] = broadcast(start);
    }
    multiply_group<kIsInt4>(x + group * kGroup, stride, piece + kHeaderBytes + column * 4, sum);
    for (int row = 0; row < kRows; ++row) {
      const Vec row_scale = broadcast(of_row(factors.scales + group, stride, row));
      for (int vector = 0; vector < kVectors; ++vector) {
        Vec& value = total[row][vector];
        value = multiply_add(to_float(sum[row][vector]), scale[vector] * row_scale, value);
        if constexpr (kIsInt4)
          value = multiply_add(minimum[vector], broadcast(of_row(factors.sums + group, stride, row)), value);
      }
    }
  }
  for (int row = 0; row < kRows; ++row)
    for (int vector = 0; vector < kVectors; ++vector)
      store(sums + row * kBlockColumns + column + vector * kLanes, total[row][vector]);
}

template <bool kIsInt4, int kRows>
void multiply_block(const QuantizedRows& rows, const uint8_t* block, int64_t groups, GroupPrefetch& soon, float* sums) {
  constexpr int kColumns = vectors_at_once(kRows) * kLanes;
  GroupPrefetch nothing{nullptr, 0};
  for (int column = 0; column < kBlockColumns; column += kColumns)
    multiply_rows<kIsInt4, kRows>(rows, block, column, groups, column == 0 ? soon : nothing, sums);
}

}  // namespace

int64_t quantized_row_bytes(int64_t in_features) {
  const int64_t groups = num_groups(in_features);
  return round_up(groups * (kGroup * static_cast<int64_t>(sizeof(ByteActivation)) + 3 * 4), 64);
}

void quantize_row(const Activation* input, int64_t in_features, char* output) {
  constexpr int kVectors = kGroup / kLanes;
  const Vec magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const int64_t groups = num_groups(in_features);
  auto* codes = reinterpret_cast<ByteActivation*>(output);
  auto* scales = reinterpret_cast<float*>(codes + groups * kGroup);
  float* sums = scales + groups;
  auto* offsets = reinterpret_cast<int32_t*>(sums + groups);
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
    IntVec total = {};
    for (int i = 0; i < kVectors; ++i) {
      const IntVec code = bits(x[i] * inverse + magic) - bits(magic);
      total += code;
      const ByteVec bytes = __builtin_convertvector(code, ByteVec);
      std::memcpy(rounded + i * kLanes, &bytes, sizeof bytes);
    }
    store_quads(codes + group * kGroup, rounded, kGroup);
    const int32_t sum = sum_lanes(total);
    scales[group] = scale;
    sums[group] = scale * static_cast<float>(sum);
    offsets[group] = -kByteFlip * sum;
  }
}

void multiply_quantized(const QuantizedRows& rows, int num_rows, const uint8_t* block, int32_t format,
                        int64_t in_features, GroupPrefetch& soon, float* sums) {
  const int64_t groups = num_groups(in_features);
  dispatch_rows<kMaxQuantizedRows>(num_rows, [&](auto constant) {
    if (format == OCTAVO_WEIGHT_INT4) {
      multiply_block<true, constant()>(rows, block, groups, soon, sums);
    } else {
      multiply_block<false, constant()>(rows, block, groups, soon, sums);
    }
  });
}

void unpack_quantized(const uint8_t* block, int column, int32_t format, int64_t in_features, float* output) {
  const bool is_int4 = format == OCTAVO_WEIGHT_INT4;
  for (int64_t i = 0; i < in_features; ++i) {
    const uint8_t* piece = block + i / kGroup * group_bytes(format);
    const auto* scales = reinterpret_cast<const uint16_t*>(piece);
    const int quad = static_cast<int>(i % kGroup / 4), place = static_cast<int>(i % 4);
    const float scale = half_to_float(scales[column]);
    if (is_int4) {
      const int byte = piece[2 * kScaleBytes + (quad % 4 * kBlockColumns + column) * 4 + place];
      const int code = quad < 4 ? byte & 15 : byte >> 4;
      output[i] = scale * static_cast<float>(code) + half_to_float(scales[kBlockColumns + column]);
    } else {
      const int byte = piece[kScaleBytes + (quad * kBlockColumns + column) * 4 + place];
      output[i] = scale * static_cast<float>(static_cast<int8_t>(byte ^ kByteFlip));
    }
  }
}

}  // namespace octavo
