#include "experts.h"

#include <algorithm>
#include <limits>

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

bool chooses_by_score(const OctavoExperts& experts) { return experts.bias != nullptr || experts.num_groups > 1; }

// The best experts, best first. A later one passes an earlier one only with a higher value.
void choose_best(const float* values, int num_values, int num_chosen, int* chosen) {
  for (int expert = 0; expert < num_values; ++expert) {
    int place = std::min(expert, num_chosen);
    while (place > 0 && values[expert] > values[chosen[place - 1]]) --place;
    if (place == num_chosen) continue;
    std::copy_backward(chosen + place, chosen + std::min(expert, num_chosen - 1),
                       chosen + std::min(expert, num_chosen - 1) + 1);
    chosen[place] = expert;
  }
}

// Set the values of experts outside of the best groups to -inf. `of_groups` is memory for a number for each group.
void drop_groups(const OctavoExperts& experts, float* values, float* of_groups) {
  constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
  const int size = num_routed(experts) / experts.num_groups;
  for (int group = 0; group < experts.num_groups; ++group) {
    const float* const value = values + group * size;
    float first = kMinusInfinity, second = kMinusInfinity;
    for (int i = 0; i < size; ++i) {
      second = std::max(second, std::min(first, value[i]));
      first = std::max(first, value[i]);
    }
    of_groups[group] = experts.num_best > 1 ? first + second : first;
  }
  for (int group = 0; group < experts.num_groups; ++group) {
    int num_better = 0;
    for (int other = 0; other < experts.num_groups; ++other)
      num_better += of_groups[other] > of_groups[group] || (of_groups[other] == of_groups[group] && other < group);
    if (num_better >= experts.num_chosen_groups) std::fill_n(values + group * size, size, kMinusInfinity);
  }
}

// One expert's layer: they lie one behind the other.
OctavoLinear layer_of(const OctavoLinear& first, int64_t num_blocks, int expert) {
  OctavoLinear layer = first;
  layer.weight += expert * num_blocks * block_bytes(first.format, first.in_features);
  if (layer.bias != nullptr) layer.bias += expert * num_blocks * kBlockColumns;
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
  if (chooses_by_score(op.experts)) grow(choices_, 2 * max_rows * logits_stride(op));
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

void ExpertsWork::choose(const OctavoOp& op, int begin, int end) {
  for (int row = begin; row < end; ++row) choose_for_row(op, row);
}

void ExpertsWork::choose_for_row(const OctavoOp& op, int row) {
  const OctavoExperts& experts = op.experts;
  const int routed = num_routed(experts), num_chosen = experts.num_chosen;
  float* logits = logits_.data() + row * logits_stride(op);
  int* chosen = chosen_.data() + int64_t{row} * taken_by_row(experts);
  float* weights = chosen_weights_.data() + int64_t{row} * taken_by_row(experts);

  const bool by_score = chooses_by_score(experts), is_sigmoid = experts.is_sigmoid != 0;
  if (!by_score) choose_best(logits, routed, num_chosen, chosen);

  float shared_weight = 1.0f;
  if (experts.num_shared > 0 && experts.has_shared_gate != 0)
    shared_weight = times_sigmoid(broadcast(1.0f), broadcast(logits[routed]))[0];
  const float best = by_score ? *std::max_element(logits, logits + routed) : logits[chosen[0]];
  const int64_t padded = round_up(routed, kLanes);
  std::fill(logits + routed, logits + padded, best);
  for (int64_t i = 0; i < padded; i += kLanes) {
    const Vec logit = load(logits + i);
    store(logits + i, is_sigmoid ? times_sigmoid(broadcast(1.0f), logit)
                                 : exp2((logit - broadcast(best)) * broadcast(1.44269504f)));
  }
  float sum = is_sigmoid ? 1.0f : 0.0f;  // of what a row's scores are a share of
  if (!is_sigmoid && (by_score || experts.is_normalized == 0))
    for (int expert = 0; expert < routed; ++expert) sum += logits[expert];
  if (by_score) {
    float* const choices = choices_.data() + 2 * row * logits_stride(op);
    for (int expert = 0; expert < routed; ++expert)
      choices[expert] = logits[expert] / sum + (experts.bias == nullptr ? 0.0f : experts.bias[expert]);
    if (experts.num_groups > 1) drop_groups(experts, choices, choices + logits_stride(op));
    choose_best(choices, routed, num_chosen, chosen);
  }
  if (experts.is_normalized != 0) {
    sum = 0.0f;
    for (int i = 0; i < num_chosen; ++i) sum += logits[chosen[i]];
  }
  for (int i = 0; i < num_chosen; ++i) weights[i] = logits[chosen[i]] / sum * experts.scale;
  for (int i = 0; i < experts.num_shared; ++i) {
    chosen[num_chosen + i] = routed + i;
    weights[num_chosen + i] = shared_weight;
  }
}

void ExpertsWork::sort(const OctavoOp& op, int num_rows) {
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
    gemm.epilogue = gated_epilogue(op.activation);
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
