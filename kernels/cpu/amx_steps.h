// The weights of linear layers as tile registers take them: step by step, from blocks that are compressed or not.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>

#include "aligned.h"
#include "amx.h"
#include "decompressor.h"
#include "gemm_part.h"

#if defined(OCTAVO_AMX)
namespace octavo {

constexpr int64_t kStepBytes = kStepWeights * sizeof(bf16);
static_assert(kStepWeights == kAmxInputs * kBlockColumns);
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
    source_.finish_step(now_);
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
    source_.write_next<kGroupsPerStep>(buffer_);
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
