// The token of the highest logit, found while logits are computed.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "simd.h"

namespace octavo {

// The highest of the logits of a row that one thread has computed, in whatever order, and its lowest token.
class RowBest {
 public:
  // Take `kCount` logits, of tokens from `first_token` on.
  template <int kCount>
  void take(const float* logits, int32_t first_token) {
    static_assert(kCount % kLanes == 0);
    Vec largest = load(logits);
    IntVec is_nan = largest != largest;
    for (int i = kLanes; i < kCount; i += kLanes) {
      const Vec some = load(logits + i);
      is_nan |= some != some;
      largest = maximum(some, largest);
    }
    if (any_lane(is_nan | (largest >= broadcast(logit_)))) take_each(logits, kCount, first_token);
  }

  // The same of any number of logits.
  void take_each(const float* logits, int count, int32_t first_token) {
    for (int i = 0; i < count; ++i) offer(logits[i], first_token + i);
  }

  void merge(const RowBest& other) {
    offer(other.logit_, other.token_);
    has_nan_ |= other.has_nan_;
  }

  // -1 where a logit is no number or the highest is infinite.
  int32_t token() const { return has_nan_ || !std::isfinite(logit_) ? -1 : token_; }

 private:
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
