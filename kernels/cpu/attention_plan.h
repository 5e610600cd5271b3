// How the attention of a step is dealt out to threads.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <vector>

#include "abi.h"
#include "attention.h"
#include "attention_cut.h"
#include "gemm.h"

namespace octavo {

// What an operation of attention reads and writes: pages of its layer, and rows of all tokens.
struct AttentionData {
  const bf16* pages;  // K page of block 0 and kv head 0
  int64_t block_stride;
  AttentionRows rows;
};

// Memory for the sums of pieces. It is kept from step to step and never cleared: to get new pages from the
// system takes longer than to fill them.
class PieceSums {
 public:
  void reserve(int64_t num_rows, const OctavoOp& op);
  PartialRows rows(const OctavoOp& op) const { return {lines_[0].values, PartialRows::stride_of(value_dim(op))}; }

 private:
  struct alignas(kLineBytes) Line {
    float values[kLineBytes / sizeof(float)];
  };
  std::unique_ptr<Line[]> lines_;
  int64_t size_ = 0;
};

// The unit of work is an item (neighbouring tokens of a sequence) and kv head. Where a step has
// few of them and a long context, the unit is a piece of one, and whoever ends the last piece
// puts them together. So it is where sequences have pieces in the same blocks (a prefix that was
// computed once): then the unit is these pieces of several items.
class AttentionPlan {
 public:
  // `sums` are of this step only while it runs.
  AttentionPlan(const OctavoStep& step, int num_threads, PieceSums& sums);

  const std::vector<AttentionItem>& items() const { return items_; }
  const OctavoStep& step() const { return step_; }

  // Prepare to run `op`; returns the number of units.
  int prepare(const OctavoOp& op);

  // Whether a unit of `op` reads no key of this step but those of its own tokens and head.
  bool is_self_contained(const OctavoOp& op);

  void run_unit(const OctavoOp& op, int unit, int num_units, const AttentionData& data);

  // Whether what `op` reads may be fetched while linear layers compute: not in steps with prompts, nor
  // where few sequences leave the memory no time.
  bool can_read_ahead(const OctavoOp& op) {
    return one_item_a_sequence_ && (cut_of(op).is_shared || !cut_of(op).is_cut());
  }

  // What `op` reads, in the order of its units: `num_reads` stretches of neighbouring pages.
  struct Read {
    const int32_t* block_table;
    int page;
    int end_page;
    int kv_head;
    int num_kv_heads;  // whose pages lie side by side
  };
  int num_reads(const OctavoOp& op) const;
  Read read_of(const OctavoOp& op, int index, bool is_first) const;

 private:
  struct Cut : AttentionCut {
    std::vector<std::atomic<int>> num_ended;  // parts, by kv head and item
  };
  struct Unit {
    int item;  // the first one
    int kv_head;
    const AttentionPart* part;  // null where nothing is cut
    bool is_of_pieces() const { return part != nullptr && part->pieces.count() > 0; }
  };

  Cut& cut_of(const OctavoOp& op);
  Unit unit_of(const OctavoOp& op, const Cut& cut, int unit) const;
  void run_part(const OctavoOp& op, Cut& cut, const Unit& unit, const KvHead& kv, const AttentionData& data);
  void end_part(const OctavoOp& op, Cut& cut, int item, int kv_head, const AttentionData& data);
  void find_next_pages(const OctavoOp& op, const Unit& unit, const AttentionData& data, KvHead& kv) const;
  KvHead kv_head_of(const OctavoOp& op, const AttentionItem& item, int kv_head, const AttentionData& data) const;

  const OctavoStep& step_;
  const int num_threads_;
  PieceSums& sums_;
  std::vector<AttentionItem> items_;
  bool one_item_a_sequence_ = true;
  std::optional<bool> reads_blocks_of_others_;  // that these fill in this step; once it was asked for
  std::map<int32_t, Cut> cuts_;  // by window
};

// The pages that one thread's share of `op` reads first.
class PagesAhead : public ReadAhead {
 public:
  PagesAhead() = default;
  PagesAhead(const AttentionPlan& plan, const OctavoOp& op, const AttentionData& data, int thread, int num_threads);
  void advance() override;

 private:
  const AttentionPlan* plan_ = nullptr;
  const OctavoOp* op_ = nullptr;
  const bf16* pages_ = nullptr;
  int64_t block_stride_ = 0;
  int next_read_ = 0;
  int end_read_ = 0;
  AttentionPlan::Read read_{};
};

}  // namespace octavo
