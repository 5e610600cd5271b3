// Which rows of a step its results need after the last layer has written its keys and values.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "abi.h"

namespace octavo {

// Of each sequence the rows from the first one on whose logits are wanted. What comes of the others nobody
// reads: later rows read keys and values, and no layer writes any after the last one. So a prompt's last layer
// is computed for its last row alone.
class NeededRows {
 public:
  explicit NeededRows(const OctavoStep& step);
  NeededRows(const NeededRows&) = delete;
  NeededRows& operator=(const NeededRows&) = delete;

  // Whether there are rows that are not needed.
  bool are_fewer() const { return are_fewer_; }

  // The step of the needed rows alone, one behind the other. Where all are needed, the whole step.
  const OctavoStep& step() const { return step_; }

  // Move rows of the whole step to where `step` has them.
  template <class T>
  void move(T* rows, int64_t stride) const {
    for (const Stretch& stretch : stretches_)
      std::memmove(rows + stretch.to * stride, rows + stretch.from * stride, stretch.count * stride * sizeof(T));
  }

 private:
  // Neighbouring rows. Stretches ascend and none moves up, so each can be moved after those before it.
  struct Stretch {
    int64_t from;
    int64_t to;
    int64_t count;
  };

  OctavoStep step_;
  bool are_fewer_ = false;
  std::vector<int32_t> query_start_loc_;
  std::vector<int32_t> logits_rows_;
  std::vector<int32_t> adapter_ids_;
  std::vector<Stretch> stretches_;
};

}  // namespace octavo
