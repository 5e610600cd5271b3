#include "needed_rows.h"

#include <algorithm>

namespace octavo {

NeededRows::NeededRows(const OctavoStep& step) : step_(step) {
  if (step.num_logits_rows >= step.num_tokens) return;  // as in a step that only decodes
  const int num_sequences = step.num_sequences;
  const int32_t* starts = step.query_start_loc;
  const auto sequence_of = [&](int32_t row) { return std::upper_bound(starts, starts + num_sequences, row) - starts - 1; };
  std::vector<int32_t> first_rows(starts + 1, starts + 1 + num_sequences);  // of each sequence; at first none is needed
  for (int i = 0; i < step.num_logits_rows; ++i) {
    int32_t& first = first_rows[sequence_of(step.logits_rows[i])];
    first = std::min(first, step.logits_rows[i]);
  }
  query_start_loc_.push_back(0);
  for (int s = 0; s < num_sequences; ++s) {
    const int32_t to = query_start_loc_.back(), count = starts[s + 1] - first_rows[s];
    if (count > 0) stretches_.push_back({first_rows[s], to, count});
    query_start_loc_.push_back(to + count);
  }
  are_fewer_ = query_start_loc_.back() < step.num_tokens;
  if (!are_fewer_) return;
  for (int i = 0; i < step.num_logits_rows; ++i) {
    const int32_t row = step.logits_rows[i];
    const auto s = sequence_of(row);
    logits_rows_.push_back(query_start_loc_[s] + row - first_rows[s]);
  }
  if (step.adapter_ids != nullptr) {
    for (const Stretch& stretch : stretches_)
      adapter_ids_.insert(adapter_ids_.end(), step.adapter_ids + stretch.from, step.adapter_ids + stretch.from + stretch.count);
    step_.adapter_ids = adapter_ids_.data();
  }
  step_.num_tokens = query_start_loc_.back();
  step_.query_start_loc = query_start_loc_.data();
  step_.logits_rows = logits_rows_.data();
  step_.token_ids = step_.positions = step_.slot_mapping = nullptr;  // nothing reads these any more
}

}  // namespace octavo
