// How compressed weights become bf16 again: see compressed.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "aligned.h"
#include "compressed.h"
#include "simd.h"

namespace octavo {

constexpr int kGroupBytes = sizeof(CompressedGroup::codes);

// Decompresses the groups of blocks one after the other. Behind the last step it stays with that.
class Decompressor {
 public:
  Decompressor(const uint8_t* blocks, int64_t num_blocks, int64_t in_features)
      : block_(blocks), blocks_left_(num_blocks), in_features_(in_features) {
    enter_block();
  }

  // The next groups.
  template <int kGroups>
  void write_next(bf16* weights) {
    write_groups<0, kGroups>(weights);
    finish<kGroups>(weights);
  }

  // A quarter of the next step; all four, then `finish_step`.
  template <int kQuarter>
  void write(bf16* step) const {
    constexpr int kGroups = kGroupsPerStep / 4;
    write_groups<kQuarter * kGroups, kGroups>(step + kQuarter * kGroups * CompressedGroup::kWeights);
  }
  void finish_step(bf16* step) { finish<kGroupsPerStep>(step); }

  // Fetch into the first cache a quarter of the step that comes so many steps later.
  template <int kQuarter>
  void fetch(int num_steps) const {
    constexpr int64_t kBytes = kGroupsPerStep / 4 * sizeof(CompressedGroup);
    const char* const later = reinterpret_cast<const char*>(groups_ + num_steps * kGroupsPerStep) + kQuarter * kBytes;
    for (int64_t line = 0; line < kBytes; line += kLineBytes) prefetch(later + line);
  }

 private:
  static uint32_t place_of(uint32_t exception) { return exception >> 8; }

  template <int kFirst, int kGroups>
  void write_groups(bf16* weights) const {
    const Bytes frequent = frequent_;
    const CompressedGroup* const groups = groups_ + kFirst;
    for (int i = 0; i < kGroups; ++i)
      for (int byte = 0; byte < kGroupBytes; byte += sizeof(Bytes))
        write_vectors(frequent, groups[i], byte, weights + i * CompressedGroup::kWeights);
  }

  // The weights of a group whose codes are in a vector of bytes.
  static void write_vectors(Bytes frequent, const CompressedGroup& group, int byte, bf16* weights) {
    const Bytes codes = load_bytes(group.codes + byte);
    for (int half = 0; half < 2; ++half) {
      const Bytes upper = look_up(frequent, half == 0 ? codes & 15 : codes >> 4);
      const Bytes lower = load_bytes(group.lower[half] + byte);
      bf16* const target = weights + half * kGroupBytes + byte / 2;
      const BytePairs pairs = interleave(lower, upper);
      store_bytes(target, pairs.first);
      store_bytes(target + kGroupBytes / 2, pairs.last);
    }
  }

  // Put the exceptions of groups in their places, and go on.
  template <int kGroups>
  void finish(bf16* weights) {
    constexpr int kWeights = kGroups * CompressedGroup::kWeights;
    end_ += kWeights;
    for (; place_of(*exception_) < end_; ++exception_) {
      bf16& weight = weights[place_of(*exception_) % kWeights];
      weight = static_cast<bf16>((*exception_ & 255) << 8 | (weight & 255));
    }
    groups_ += kGroups;
    if (end_ < end_of_block_) return;
    if (--blocks_left_ > 0) {
      block_ += compressed_block_bytes(in_features_);
      enter_block();
    } else {
      groups_ -= kGroupsPerStep;
    }
  }

  static Bytes load_bytes(const uint8_t* source) {
    Bytes bytes;
    std::memcpy(&bytes, source, sizeof bytes);
    return bytes;
  }
  static void store_bytes(bf16* target, Bytes bytes) { std::memcpy(target, &bytes, sizeof bytes); }

  void enter_block() {
    frequent_ = load_table(block_);
    exception_ = exceptions_of(block_);
    groups_ = groups_of(block_, in_features_);
    end_ = 0;
    end_of_block_ = static_cast<uint32_t>(divide_up(in_features_, kCompressedInputs)) * kStepWeights;
  }

  const uint8_t* block_;
  int64_t blocks_left_;
  int64_t in_features_;
  Bytes frequent_;
  const uint32_t* exception_;
  const CompressedGroup* groups_;
  uint32_t end_;  // the place of the next group
  uint32_t end_of_block_;
};

}  // namespace octavo
