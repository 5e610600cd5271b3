// How the attention of a step is dealt out to threads.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <vector>

#include "abi.h"
#include "attention.h"
#include "gemm.h"

namespace octavo {

// What an operation of attention reads and writes: pages of its layer, and rows of all tokens.
struct AttentionData {
  const bf16* pages;  // K page of block 0 and kv head 0
  int64_t block_stride;
  const bf16* queries;  // [num_tokens, stride]
  bf16* output;         // [num_tokens, stride]
  int64_t stride;
};

// The unit of work is an item (neighbouring tokens of a sequence) and kv head. Where a step has
// few of them and a long context, the unit is a piece of one, and whoever ends the last piece
// puts them together.
class AttentionPlan {
 public:
  AttentionPlan(const OctavoStep& step, int num_threads);

  const std::vector<AttentionItem>& items() const { return items_; }
  const OctavoStep& step() const { return step_; }

  // Prepare to run `op`; returns the number of units.
  int prepare(const OctavoOp& op);

  // Whether a unit of `op` reads no key of this step but those of its own tokens and head.
  bool is_self_contained(const OctavoOp& op) const { return one_item_a_sequence_ && !should_cut(op); }

  void run_unit(const OctavoOp& op, int unit, int num_units, const AttentionData& data);

 private:
  struct CutItem {
    int item;
    int first_unit;  // of kv head 0; the heads' units follow each other
    PieceRange pieces;
    int64_t first_sum;  // into Cut::sums, in the order of units
  };
  // All items for one width of the window.
  struct Cut {
    std::vector<CutItem> items;
    std::vector<int> item_of_unit;
    std::vector<PartialRow> sums;
    std::vector<std::atomic<int>> num_ended;  // pieces, by item and kv head
  };

  struct Unit {
    int item;
    int kv_head;
    int piece;  // counted from the item's first; -1 where items are not cut
  };

  bool should_cut(const OctavoOp& op) const;
  void cut(const OctavoOp& op, Cut& result) const;
  Unit unit_of(const OctavoOp& op, int unit) const;
  void find_next_pages(const OctavoOp& op, int unit, const AttentionData& data, KvHead& kv) const;
  KvHead kv_head_of(const OctavoOp& op, const AttentionItem& item, int kv_head, const AttentionData& data) const;

  const OctavoStep& step_;
  const int num_threads_;
  std::vector<AttentionItem> items_;
  bool one_item_a_sequence_ = true;
  std::map<int32_t, Cut> cuts_;  // by window
};

// The pages that one thread's share of `op` reads first.
class PagesAhead : public ReadAhead {
 public:
  PagesAhead() = default;
  PagesAhead(const AttentionPlan& plan, const OctavoOp& op, const AttentionData& data, int thread, int num_threads);
  void advance() override;

 private:
  void begin_item();

  const AttentionPlan* plan_ = nullptr;
  const OctavoOp* op_ = nullptr;
  const bf16* pages_ = nullptr;
  int64_t block_stride_ = 0;
  int item_ = 0;
  int end_item_ = 0;
  int page_ = 0;
  int end_page_ = 0;
};

}  // namespace octavo
