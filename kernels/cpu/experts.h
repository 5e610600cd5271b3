// Mixtures of experts: how the rows of a step choose theirs, and the products over those chosen.
#pragma once

#include <cstdint>
#include <vector>

#include "abi.h"
#include "aligned.h"
#include "gemm.h"
#include "simd.h"

namespace octavo {

// Memory of an OCTAVO_EXPERTS operation, and its work after the router's product, in five phases:
// `choose` for some rows each, `sort`, `gather`, the items of `gated`, the items of `down`. One object serves all layers.
//
// Rows are sorted by expert, so that an expert's weights are read once for all rows that chose it,
// and those of an expert that nobody chose are not read. A pair of a row and an expert it takes is
// an assignment; they lie expert after expert, an expert's rows ascending.
//
// A row's bits do not depend on the other rows: each product is that of gemm.h, and a row's terms
// are added one by one in the order of the experts.
class ExpertsWork {
 public:
  // Make room for an operation with at most `max_rows` rows.
  void reserve(const OctavoOp& op, int max_rows);

  // The router's logits, to be written before `choose`, which overwrites them.
  float* logits() { return logits_.data(); }
  static int64_t logits_stride(const OctavoOp& op);

  void choose(const OctavoOp& op, int begin, int end);
  void sort(const OctavoOp& op, int num_rows);

  // Copy the rows [num_rows, stride] of some assignments next to each other; items of kPerGather.
  static int num_gather_items(const OctavoOp& op, int num_rows);
  void gather(const Activation* rows, int64_t stride, int item);

  static int num_gated_items(const OctavoOp& op, int num_rows, int num_threads);
  void run_gated(const OctavoOp& op, const Activation* rows, int64_t stride, int item, int num_items);

  // Adds to `output` [num_rows, stride].
  static int num_down_items(const OctavoOp& op, int num_threads);
  void run_down(const OctavoOp& op, float* output, int64_t stride, int item, int num_items) const;

 private:
  // An expert that some row takes: assignments [begin, end).
  struct Group {
    int expert;
    int begin;
    int end;
    int64_t cost;  // of all its blocks of the gated product, and those of the groups before it
  };
  // A place in the list of all blocks of all groups.
  struct Place {
    int group;
    int64_t block;
  };

  void choose_for_row(const OctavoOp& op, int row);
  Place place_of_cost(int64_t cost, int64_t num_blocks) const;
  int64_t cost_before(int group) const { return group == 0 ? 0 : groups_[group - 1].cost; }

  std::vector<float> logits_;
  std::vector<float> choices_;          // [num_rows, twice as wide as logits]: what experts are chosen by, then groups
  std::vector<int> chosen_;             // [num_rows, experts a row takes]
  std::vector<float> chosen_weights_;   // the same
  std::vector<Group> groups_;
  std::vector<int> next_;               // of each expert: where its next assignment goes
  std::vector<int> expert_of_;          // of each assignment
  std::vector<int32_t> row_of_;
  std::vector<float> weight_of_;
  LineVector<Activation> gathered_;    // [assignments, gathered_stride]
  LineVector<Activation> gated_;       // [assignments, gated_stride]
  int64_t gathered_stride_ = 0;
};

}  // namespace octavo
