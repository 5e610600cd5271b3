// The weights of linear layers as tile registers take them: step by step, from blocks that are compressed or not.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>

#include "aligned.h"
#include "amx.h"
#include "compressed.h"
#include "gemm_part.h"

#if defined(OCTAVO_AMX)
namespace octavo {

// A step holds the weights of kAmxInputs inputs and a block: [kAmxPairs][kBlockColumns][2].
constexpr int kStepWeights = kAmxInputs * kBlockColumns;
constexpr int64_t kStepBytes = kStepWeights * sizeof(bf16);
constexpr int64_t kMostInputsPerPiece = 20 * kAmxInputs;  // 40 KiB of weights

// What goes through steps from block to block has
//
//   kKeepsInput, kKeepsWeight  whether that operand of a product is read again soon; else it leaves the other one its place in the
//                              first cache
//   now()                      the present step; behind the last input of a block there are zeros
//   work<quarter>()            what is to be done for later ones, in four parts, between the products of this one
//   advance()                  go on to the next step

// Who reads a step: one tile of rows, or several in turn.
enum class Reader { kTile, kTiles };

// Steps of weights as they lie in memory.
template <Reader kReader>
class PlainSteps {
 public:
  static constexpr bool kKeepsInput = kReader == Reader::kTile, kKeepsWeight = !kKeepsInput;

  // Of blocks, or of a piece of one, that have so many inputs.
  PlainSteps(const uint8_t* weights, int64_t num_inputs)
      : now_(reinterpret_cast<const bf16*>(weights)), num_inputs_(num_inputs), left_(num_inputs) {}

  const bf16* now() {
    if (left_ >= kAmxInputs) return now_;
    std::fill(std::copy_n(now_, inputs_of_step() * kBlockColumns, rest_), std::end(rest_), bf16{0});
    return rest_;
  }

  template <int kQuarter>
  void work() const {
    if constexpr (kReader == Reader::kTile) {  // a tile alone waits for the next weights if these are not in the first cache
      constexpr int64_t kBytes = kStepBytes / 4;
      const char* const next = reinterpret_cast<const char*>(now_ + kStepWeights) + kQuarter * kBytes;
      for (int64_t line = 0; line < kBytes; line += kLineBytes) prefetch(next + line);
    }
  }

  void advance() {
    now_ += inputs_of_step() * kBlockColumns;
    left_ = left_ > kAmxInputs ? left_ - kAmxInputs : num_inputs_;
  }

 private:
  int64_t inputs_of_step() const { return std::min<int64_t>(round_up(left_, 2), kAmxInputs); }

  const bf16* now_;
  const int64_t num_inputs_;
  int64_t left_;  // of the block
  alignas(64) bf16 rest_[kStepWeights];
};

// Decompresses the steps of blocks one after the other. Behind the last one it stays with that.
class Decompressor {
 public:
  Decompressor(const uint8_t* blocks, int64_t num_blocks, int64_t in_features)
      : block_(blocks), blocks_left_(num_blocks), in_features_(in_features) {
    enter_block();
  }

  // A quarter of the present step; all four, then `finish`.
  template <int kQuarter>
  void write(bf16* step) const {
    constexpr int kGroups = kGroupsPerStep / 4;
    const __m512i code_bits = _mm512_set1_epi8(15), lower_bits = _mm512_set1_epi16(255);
    for (int i = kQuarter * kGroups; i < (kQuarter + 1) * kGroups; ++i) {
      const CompressedGroup& group = groups_[i];
      const __m512i codes = _mm512_load_si512(group.codes);
      for (int half = 0; half < 2; ++half) {
        const __m512i code = _mm512_and_si512(half == 0 ? codes : _mm512_srli_epi16(codes, 4), code_bits);
        const __m512i upper = _mm512_shuffle_epi8(frequent_, code);
        const __m512i lower = _mm512_load_si512(group.lower[half]);
        bf16* const weights = step + i * CompressedGroup::kWeights + half * 64;
        _mm512_store_si512(weights, blend(lower_bits, lower, _mm512_slli_epi16(upper, 8)));
        _mm512_store_si512(weights + 32, blend(lower_bits, _mm512_srli_epi16(lower, 8), upper));
      }
    }
  }

  // Put the step's exceptions in their places, and go on.
  void finish(bf16* step) {
    for (; place_of(*exception_) < end_of_step_; ++exception_) {
      bf16& weight = step[place_of(*exception_) % kStepWeights];
      weight = static_cast<bf16>((*exception_ & 255) << 8 | (weight & 255));
    }
    groups_ += kGroupsPerStep;
    end_of_step_ += kStepWeights;
    if (end_of_step_ <= end_of_block_) return;
    if (--blocks_left_ > 0) {
      block_ += compressed_block_bytes(in_features_);
      enter_block();
    } else {
      groups_ -= kGroupsPerStep;
    }
  }

  // Fetch into the first cache a quarter of the step that comes so many steps later.
  template <int kQuarter>
  void fetch(int num_steps) const {
    constexpr int64_t kBytes = kGroupsPerStep / 4 * sizeof(CompressedGroup);
    const char* const later = reinterpret_cast<const char*>(groups_ + num_steps * kGroupsPerStep) + kQuarter * kBytes;
    for (int64_t line = 0; line < kBytes; line += kLineBytes) prefetch(later + line);
  }

 private:
  static uint32_t place_of(uint32_t exception) { return exception >> 8; }

  // For each bit: of `first` where `bits` has a one, else of `second`.
  static __m512i blend(__m512i bits, __m512i first, __m512i second) {
    return _mm512_ternarylogic_epi32(bits, first, second, 0xca);
  }

  void enter_block() {
    frequent_ = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(block_)));
    exception_ = exceptions_of(block_);
    groups_ = groups_of(block_, in_features_);
    end_of_step_ = kStepWeights;
    end_of_block_ = static_cast<uint32_t>(divide_up(in_features_, kAmxInputs)) * kStepWeights;
  }

  const uint8_t* block_;
  int64_t blocks_left_;
  const int64_t in_features_;
  __m512i frequent_;
  const uint32_t* exception_;
  const CompressedGroup* groups_;
  uint32_t end_of_step_;  // the place behind its last weight
  uint32_t end_of_block_;
};

// Steps that are decompressed while the one before is multiplied: into the places of a buffer, round and round.
class CompressedSteps {
 public:
  static constexpr bool kKeepsInput = true, kKeepsWeight = true;

  // The present step is the first one in the buffer.
  CompressedSteps(Decompressor& source, bf16* buffer, int num_places)
      : source_(source), buffer_(buffer), end_(buffer + num_places * kStepWeights), now_(buffer) {}

  const bf16* now() const { return now_; }

  template <int kQuarter>
  void work() const {
    source_.fetch<kQuarter>(kStepsAhead);
    source_.write<kQuarter>(next());
  }

  void advance() {
    now_ = next();
    source_.finish(now_);
  }

 private:
  static constexpr int kStepsAhead = 2;

  bf16* next() const { return now_ + kStepWeights < end_ ? now_ + kStepWeights : buffer_; }

  Decompressor& source_;
  bf16* const buffer_;
  bf16* const end_;
  bf16* now_;
};

// The two kinds of weights, plain and compressed, that a tile of rows reads alone (`steps`) or that several read in turn: then
// in pieces of a block. The first tile reads a piece by `first_steps`, and the others read what they left in `piece`.

class PlainWeights {
 public:
  using Steps = PlainSteps<Reader::kTile>;
  using FirstSteps = PlainSteps<Reader::kTiles>;

  PlainWeights(const OctavoLinear& linear, const BlockRange& blocks)
      : next_(block_weights(linear, blocks.begin)), in_features_(linear.in_features) {}

  Steps steps() const { return Steps(next_, in_features_); }

  FirstSteps first_steps(int64_t num_inputs) {
    piece_ = next_;
    next_ += round_up(num_inputs, 2) * kBlockColumns * sizeof(bf16);
    return FirstSteps(piece_, num_inputs);
  }
  const uint8_t* piece() const { return piece_; }

 private:
  const uint8_t* next_;
  const uint8_t* piece_ = nullptr;
  const int64_t in_features_;
};

class CompressedWeights {
 public:
  using Steps = CompressedSteps;
  using FirstSteps = CompressedSteps;

  CompressedWeights(const OctavoLinear& linear, const BlockRange& blocks)
      : source_(block_weights(linear, blocks.begin), blocks.end - blocks.begin, linear.in_features) {
    source_.write<0>(buffer_);
    source_.write<1>(buffer_);
    source_.write<2>(buffer_);
    source_.write<3>(buffer_);
    source_.finish(buffer_);
  }

  Steps steps() { return Steps(source_, buffer_, 2); }

  FirstSteps first_steps(int64_t num_inputs) {
    if (ahead_ != nullptr) std::copy_n(ahead_, kStepWeights, buffer_);
    const int num_steps = static_cast<int>(divide_up(num_inputs, kAmxInputs));
    ahead_ = buffer_ + num_steps * kStepWeights;
    return FirstSteps(source_, buffer_, num_steps + 1);
  }
  const uint8_t* piece() const { return reinterpret_cast<const uint8_t*>(buffer_); }

 private:
  Decompressor source_;
  const bf16* ahead_ = nullptr;  // the first step of the next piece
  alignas(64) bf16 buffer_[kMostInputsPerPiece * kBlockColumns + kStepWeights];
};

}  // namespace octavo
#endif
