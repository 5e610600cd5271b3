#include "experts.h"

#include <algorithm>

#include "activation.h"
#include "elementwise.h"

namespace octavo {
namespace {

constexpr int kPerGather = 16;
constexpr int kGatedItemsPerThread = 16;
constexpr int kBlocksPerDownItem = 4;
// Reading a block's weights takes about as long as multiplying so many rows with them.
constexpr int64_t kWeightCost = 4;

int taken_by_row(const OctavoExperts& experts) { return experts.num_chosen + experts.num_shared; }

int num_routed(const OctavoExperts& experts) { return experts.num_experts - experts.num_shared; }

int64_t gated_blocks(const OctavoExperts& experts) { return divide_up(experts.gated.out_features, kGatedColumns); }

int64_t down_blocks(const OctavoExperts& experts) { return divide_up(experts.down.out_features, kBlockColumns); }

int64_t gated_stride(const OctavoExperts& experts) {
  return row_stride<Activation>(round_up(experts.gated.out_features, kRowMultiple));
}

// One expert's layer: they lie one behind the other.
OctavoLinear layer_of(const OctavoLinear& first, int64_t num_blocks, int expert) {
  OctavoLinear layer = first;
  layer.weight += expert * num_blocks * block_bytes(first.format, first.in_features);
  return layer;
}

template <class Vector>
void grow(Vector& memory, int64_t size) {
  if (static_cast<int64_t>(memory.size()) < size) memory.resize(size);
}

}  // namespace

int64_t ExpertsWork::logits_stride(const OctavoOp& op) { return round_up(op.linear.out_features, kRowMultiple); }

void ExpertsWork::reserve(const OctavoOp& op, int max_rows) {
  const int64_t num_assignments = int64_t{max_rows} * taken_by_row(op.experts);
  grow(logits_, max_rows * logits_stride(op));
  grow(chosen_, num_assignments);
  grow(chosen_weights_, num_assignments);
  grow(next_, op.experts.num_experts);
  grow(expert_of_, num_assignments);
  grow(row_of_, num_assignments);
  grow(weight_of_, num_assignments);
  gathered_stride_ = std::max(gathered_stride_, row_stride<Activation>(round_up(op.norm.size, kRowMultiple)));
  grow(gathered_, num_assignments * gathered_stride_);
  grow(gated_, num_assignments * gated_stride(op.experts));
  groups_.reserve(op.experts.num_experts);
}

void ExpertsWork::choose(const OctavoOp& op, int num_rows) {
  for (int row = 0; row < num_rows; ++row) choose_for_row(op, row);
  sort_assignments(op, num_rows);
}

void ExpertsWork::choose_for_row(const OctavoOp& op, int row) {
  const OctavoExperts& experts = op.experts;
  const int routed = num_routed(experts), num_chosen = experts.num_chosen;
  float* logits = logits_.data() + row * logits_stride(op);
  int* chosen = chosen_.data() + int64_t{row} * taken_by_row(experts);
  float* weights = chosen_weights_.data() + int64_t{row} * taken_by_row(experts);

  // The best so far, best first. A later expert passes an earlier one only with a higher logit.
  for (int expert = 0; expert < routed; ++expert) {
    int place = std::min(expert, num_chosen);
    while (place > 0 && logits[expert] > logits[chosen[place - 1]]) --place;
    if (place == num_chosen) continue;
    std::copy_backward(chosen + place, chosen + std::min(expert, num_chosen - 1),
                       chosen + std::min(expert, num_chosen - 1) + 1);
    chosen[place] = expert;
  }

  const float shared_weight = experts.num_shared == 0 ? 0.0f : times_sigmoid(broadcast(1.0f), broadcast(logits[routed]))[0];
  const float best = logits[chosen[0]];
  const int64_t padded = round_up(routed, kLanes);
  std::fill(logits + routed, logits + padded, best);
  for (int64_t i = 0; i < padded; i += kLanes)
    store(logits + i, exp2((load(logits + i) - broadcast(best)) * broadcast(1.44269504f)));
  float sum = 0.0f;
  if (experts.is_normalized != 0) {
    for (int i = 0; i < num_chosen; ++i) sum += logits[chosen[i]];
  } else {
    for (int expert = 0; expert < routed; ++expert) sum += logits[expert];
  }
  for (int i = 0; i < num_chosen; ++i) weights[i] = logits[chosen[i]] / sum;
  for (int i = 0; i < experts.num_shared; ++i) {
    chosen[num_chosen + i] = routed + i;
    weights[num_chosen + i] = shared_weight;
  }
}

void ExpertsWork::sort_assignments(const OctavoOp& op, int num_rows) {
  const OctavoExperts& experts = op.experts;
  const int taken = taken_by_row(experts), num_assignments = num_rows * taken;
  std::fill(next_.begin(), next_.end(), 0);
  for (int i = 0; i < num_assignments; ++i) ++next_[chosen_[i]];
  groups_.clear();
  int begin = 0;
  int64_t cost = 0;
  for (int expert = 0; expert < experts.num_experts; ++expert) {
    const int count = next_[expert];
    next_[expert] = begin;
    if (count == 0) continue;
    cost += (count + kWeightCost) * gated_blocks(experts);
    groups_.push_back({expert, begin, begin + count, cost});
    begin += count;
  }
  for (int i = 0; i < num_assignments; ++i) {
    const int place = next_[chosen_[i]]++;
    expert_of_[place] = chosen_[i];
    row_of_[place] = i / taken;
    weight_of_[place] = chosen_weights_[i];
  }
}

int ExpertsWork::num_gather_items(const OctavoOp& op, int num_rows) {
  return static_cast<int>(divide_up(int64_t{num_rows} * taken_by_row(op.experts), kPerGather));
}

void ExpertsWork::gather(const Activation* rows, int64_t stride, int item) {
  const int num_assignments = groups_.back().end;
  const int end = std::min((item + 1) * kPerGather, num_assignments);
  for (int i = item * kPerGather; i < end; ++i) {
    // An expert's only row is read where it is.
    const bool has_neighbour = (i > 0 && expert_of_[i - 1] == expert_of_[i]) ||
                               (i + 1 < num_assignments && expert_of_[i + 1] == expert_of_[i]);
    if (has_neighbour)
      std::copy_n(rows + row_of_[i] * stride, gathered_stride_, gathered_.data() + i * gathered_stride_);
  }
}

int ExpertsWork::num_gated_items(const OctavoOp& op, int num_rows, int num_threads) {
  const int64_t num_groups = std::min<int64_t>(int64_t{num_rows} * taken_by_row(op.experts), op.experts.num_experts);
  return static_cast<int>(std::min<int64_t>(num_groups * gated_blocks(op.experts), kGatedItemsPerThread * num_threads));
}

// Where an item that begins at a share of the whole cost begins: items of like cost, whole blocks.
ExpertsWork::Place ExpertsWork::place_of_cost(int64_t cost, int64_t num_blocks) const {
  const auto group = std::upper_bound(groups_.begin(), groups_.end(), cost,
                                      [](int64_t value, const Group& g) { return value < g.cost; });
  const int index = static_cast<int>(group - groups_.begin());
  if (group == groups_.end()) return {index, 0};
  const int64_t cost_of_block = (group->cost - cost_before(index)) / num_blocks;
  return {index, (cost - cost_before(index)) / cost_of_block};
}

void ExpertsWork::run_gated(const OctavoOp& op, const Activation* rows, int64_t stride, int item, int num_items) {
  const int64_t num_blocks = gated_blocks(op.experts), cost = groups_.back().cost;
  Place place = place_of_cost(cost * item / num_items, num_blocks);
  const Place end = place_of_cost(cost * (item + 1) / num_items, num_blocks);
  for (; place.group < end.group || (place.group == end.group && place.block < end.block); place = {place.group + 1, 0}) {
    const Group& group = groups_[place.group];
    const OctavoLinear layer = layer_of(op.experts.gated, num_blocks, group.expert);
    const bool is_alone = group.end - group.begin == 1;
    Gemm gemm{};
    gemm.input = is_alone ? rows + row_of_[group.begin] * stride : gathered_.data() + group.begin * gathered_stride_;
    gemm.input_stride = gathered_stride_;
    gemm.num_rows = group.end - group.begin;
    gemm.linear = &layer;
    gemm.epilogue = op.activation == OCTAVO_SILU ? Epilogue::kSilu : Epilogue::kGeluTanh;
    gemm.output_stride = gemm.num_columns = static_cast<int>(gated_stride(op.experts));
    gemm.output = gated_.data() + group.begin * gemm.output_stride;
    run_gemm_blocks(gemm, place.block, place.group == end.group ? end.block : num_blocks);
  }
}

int ExpertsWork::num_down_items(const OctavoOp& op, int num_threads) {
  const int64_t num_blocks = down_blocks(op.experts);
  return static_cast<int>(std::min(num_blocks, round_up(divide_up(num_blocks, kBlocksPerDownItem), num_threads)));
}

// Every item adds the terms of all experts to its own columns, so no two write to one place.
void ExpertsWork::run_down(const OctavoOp& op, float* output, int64_t stride, int item, int num_items) const {
  const int64_t num_blocks = down_blocks(op.experts);
  for (const Group& group : groups_) {
    const OctavoLinear layer = layer_of(op.experts.down, num_blocks, group.expert);
    Gemm gemm{};
    gemm.input_stride = gated_stride(op.experts);
    gemm.input = gated_.data() + group.begin * gemm.input_stride;
    gemm.num_rows = group.end - group.begin;
    gemm.linear = &layer;
    gemm.epilogue = Epilogue::kAddWeighted;
    gemm.output = output;
    gemm.output_stride = stride;
    gemm.num_columns = static_cast<int>(stride);
    gemm.output_rows = row_of_.data() + group.begin;
    gemm.row_weights = weight_of_.data() + group.begin;
    run_gemm_blocks(gemm, num_blocks * item / num_items, num_blocks * (item + 1) / num_items);
  }
}

}  // namespace octavo
