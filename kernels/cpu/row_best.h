// The token of a row's highest logit.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "simd.h"

namespace octavo {

// The highest of the logits that were taken so far, in whatever order, and the lowest token that has it.
class RowBest {
 public:
  // Take logits of tokens from `first_token` on.
  void take(const float* logits, int count, int32_t first_token) {
    int i = 0;
    for (; i + kAtOnce <= count; i += kAtOnce) {
      Vec largest = load(logits + i);
      IntVec is_nan = largest != largest;
      for (int j = kLanes; j < kAtOnce; j += kLanes) {
        const Vec some = load(logits + i + j);
        is_nan |= some != some;
        largest = maximum(some, largest);
      }
      if (any_lane(is_nan | (largest >= broadcast(logit_)))) offer_each(logits + i, kAtOnce, first_token + i);
    }
    offer_each(logits + i, count - i, first_token + i);
  }

  void merge(const RowBest& other) {
    offer(other.logit_, other.token_);
    has_nan_ |= other.has_nan_;
  }

  // -1 where a logit is no number or the highest is infinite.
  int32_t token() const { return has_nan_ || !std::isfinite(logit_) ? -1 : token_; }

 private:
  static constexpr int kAtOnce = 32;

  void offer_each(const float* logits, int count, int32_t first_token) {
    for (int i = 0; i < count; ++i) offer(logits[i], first_token + i);
  }

  void offer(float logit, int32_t token) {
    has_nan_ |= logit != logit;
    if (logit > logit_ || (logit == logit_ && token < token_)) {
      logit_ = logit;
      token_ = token;
    }
  }

  float logit_ = -std::numeric_limits<float>::infinity();
  int32_t token_ = std::numeric_limits<int32_t>::max();
  bool has_nan_ = false;
};

}  // namespace octavo
