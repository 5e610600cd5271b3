#include "compressed.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <numeric>
#include <vector>

#include "aligned.h"
#include "gemm.h"
#include "guard.h"
#include "handles.h"

namespace octavo {
namespace {

constexpr int kUppers = 16;
static_assert(kStepWeights == kCompressedInputs * kBlockColumns);
constexpr int64_t kMostInputs = (int64_t{1} << 23) / kBlockColumns;  // places have 24 bits, and kNoException is behind all of them

int64_t steps_of(int64_t in_features) { return divide_up(in_features, kCompressedInputs); }

int64_t exceptions_room(int64_t in_features) { return steps_of(in_features) * kStepWeights / kWeightsPerException; }

int64_t groups_offset(int64_t in_features) {
  return round_up(kUppers + (exceptions_room(in_features) + 1) * int64_t{sizeof(uint32_t)}, kLineBytes);
}

// A packed block, whose inputs are padded to pairs, with zeros behind these up to a whole step.
std::vector<bf16> whole_steps(const bf16* block, int64_t in_features) {
  std::vector<bf16> weights(steps_of(in_features) * kStepWeights);
  std::copy_n(block, round_up(in_features, 2) * kBlockColumns, weights.begin());
  return weights;
}

struct UpperBytes {
  std::array<uint8_t, kUppers> frequent;
  int64_t num_exceptions;
};

UpperBytes upper_bytes_of(const std::vector<bf16>& weights) {
  std::array<int64_t, 256> counts{};
  for (const bf16 weight : weights) ++counts[weight >> 8];
  std::array<uint8_t, 256> bytes;
  std::iota(bytes.begin(), bytes.end(), uint8_t{0});
  std::stable_sort(bytes.begin(), bytes.end(), [&](uint8_t a, uint8_t b) { return counts[a] > counts[b]; });
  UpperBytes result{{}, static_cast<int64_t>(weights.size())};
  for (int i = 0; i < kUppers; ++i) {
    result.frequent[i] = bytes[i];
    result.num_exceptions -= counts[bytes[i]];
  }
  return result;
}

// Where weight `place` of a block is in its groups.
struct Place {
  explicit Place(uint64_t place)
      : group(place / CompressedGroup::kWeights),
        half(static_cast<int>(place % CompressedGroup::kWeights / 64)),
        byte(static_cast<int>(place % 32 / 8 * 16 + place / 32 % 2 * 8 + place % 8)) {}
  int64_t group;
  int half;
  int byte;
};

}  // namespace

int64_t compressed_block_bytes(int64_t in_features) {
  return groups_offset(in_features) + steps_of(in_features) * kGroupsPerStep * int64_t{sizeof(CompressedGroup)};
}

const uint32_t* exceptions_of(const uint8_t* compressed) {
  return reinterpret_cast<const uint32_t*>(compressed + kUppers);
}

const CompressedGroup* groups_of(const uint8_t* compressed, int64_t in_features) {
  return reinterpret_cast<const CompressedGroup*>(compressed + groups_offset(in_features));
}

bool compress_block(const bf16* block, int64_t in_features, uint8_t* compressed) {
  const std::vector<bf16> weights = whole_steps(block, in_features);
  const auto [frequent, num_exceptions] = upper_bytes_of(weights);
  if (in_features > kMostInputs || num_exceptions > exceptions_room(in_features)) return false;
  std::array<int, 256> code_of;
  code_of.fill(-1);
  for (int code = 0; code < kUppers; ++code) code_of[frequent[code]] = code;
  std::copy(frequent.begin(), frequent.end(), compressed);
  uint32_t* exception = reinterpret_cast<uint32_t*>(compressed + kUppers);
  CompressedGroup* const groups = reinterpret_cast<CompressedGroup*>(compressed + groups_offset(in_features));
  std::memset(groups, 0, steps_of(in_features) * kGroupsPerStep * sizeof(CompressedGroup));
  for (int64_t i = 0; i < static_cast<int64_t>(weights.size()); ++i) {
    const Place place(i);
    CompressedGroup& group = groups[place.group];
    const int upper = weights[i] >> 8, code = code_of[upper];
    group.lower[place.half][place.byte] = static_cast<uint8_t>(weights[i]);
    if (code >= 0) {
      group.codes[place.byte] |= static_cast<uint8_t>(code << (4 * place.half));
    } else {
      *exception++ = static_cast<uint32_t>(i << 8 | upper);
    }
  }
  *exception = kNoException;
  return true;
}

void unpack_compressed_column(const uint8_t* compressed, int64_t column, int64_t in_features, float* output) {
  const CompressedGroup* const groups = groups_of(compressed, in_features);
  const auto weight = [&](const Place& place, uint32_t upper) {
    return bf16_to_float(static_cast<bf16>(upper << 8 | groups[place.group].lower[place.half][place.byte]));
  };
  for (int64_t i = 0; i < in_features; ++i) {
    const Place place((i / 2 * kBlockColumns + column) * 2 + i % 2);
    output[i] = weight(place, compressed[groups[place.group].codes[place.byte] >> (4 * place.half) & 15]);
  }
  for (const uint32_t* exception = exceptions_of(compressed); *exception != kNoException; ++exception) {
    const int64_t place = *exception >> 8, pair = place / 2;
    const int64_t input = pair / kBlockColumns * 2 + place % 2;
    if (pair % kBlockColumns == column && input < in_features) output[input] = weight(Place(place), *exception & 255);
  }
}

}  // namespace octavo

using namespace octavo;

int32_t octavo_compress(OctavoPool* pool, const uint8_t* packed, int32_t num_blocks, int32_t in_features,
                        uint8_t* compressed) {
  std::atomic<bool> fits{true};
  const auto compress = [&](int64_t block, int) {
    const uint8_t* weights = packed + block * block_bytes(OCTAVO_WEIGHT_BF16, in_features);
    if (fits && !compress_block(reinterpret_cast<const bf16*>(weights), in_features,
                                compressed + block * compressed_block_bytes(in_features)))
      fits = false;
  };
  return guarded<int32_t>(OCTAVO_FAILED, [&] {
    pool->threads.for_each(num_blocks, compress);
    return static_cast<int32_t>(fits.load());
  });
}
