#include "attention_plan.h"

#include <algorithm>

namespace octavo {
namespace {

// From an item's first token and the heads of one kv head on.
AttentionRows rows_of(const OctavoOp& op, const AttentionItem& item, int kv_head, const AttentionData& data) {
  return data.rows.from(op, item.first_token, int64_t{op.num_heads / op.num_kv_heads} * kv_head);
}

// Whether a sequence reads a block that another one fills in this step.
bool reads_blocks_of_others(const OctavoStep& step) {
  struct Filled {
    int32_t block;
    int sequence;
  };
  std::vector<Filled> filled;
  for (int s = 0; s < step.num_sequences; ++s)
    for (int t = step.query_start_loc[s]; t < step.query_start_loc[s + 1]; ++t)
      if (step.slot_mapping[t] % kBlockTokens == kBlockTokens - 1) filled.push_back({step.slot_mapping[t] / kBlockTokens, s});
  for (const auto& [block, sequence] : filled) {
    for (int s = 0; s < step.num_sequences; ++s) {
      const int num_new = step.query_start_loc[s + 1] - step.query_start_loc[s];
      const int32_t* const blocks = step.block_tables + int64_t{s} * step.max_blocks;
      const int32_t* const end = blocks + (step.seq_lens[s] - num_new) / kBlockTokens;
      if (s != sequence && std::find(blocks, end, block) != end) return true;
    }
  }
  return false;
}

}  // namespace

void PieceSums::reserve(int64_t num_rows, const OctavoOp& op) {
  const int64_t size = num_rows * PartialRows::stride_of(value_dim(op)) * int64_t{sizeof(float)} / int64_t{sizeof(Line)};
  if (size <= size_) return;
  lines_.reset();
  size_ = 0;
  lines_.reset(new Line[size]);  // without values
  size_ = size;
}

AttentionPlan::AttentionPlan(const OctavoStep& step, int num_threads, PieceSums& sums)
    : step_(step), num_threads_(num_threads), sums_(sums) {
  for (int s = 0; s < step.num_sequences; ++s) {
    const int begin = step.query_start_loc[s], end = step.query_start_loc[s + 1];
    one_item_a_sequence_ = one_item_a_sequence_ && end - begin <= kTokensPerAttentionItem;
    // The last tokens of a prompt see most and take longest: they go first.
    for (int last = end; last > begin; last -= kTokensPerAttentionItem) {
      const int first = std::max(begin, last - kTokensPerAttentionItem);
      items_.push_back({s, first, last - first, step.seq_lens[s] - (end - first)});
    }
  }
}

bool AttentionPlan::is_self_contained(const OctavoOp& op) {
  if (!one_item_a_sequence_ || cut_of(op).is_cut()) return false;
  if (!reads_blocks_of_others_) reads_blocks_of_others_ = reads_blocks_of_others(step_);
  return !*reads_blocks_of_others_;
}

int AttentionPlan::prepare(const OctavoOp& op) {
  const Cut& cut = cut_of(op);
  return static_cast<int>(cut.is_cut() ? cut.parts.size() : items_.size()) * op.num_kv_heads;
}

AttentionPlan::Cut& AttentionPlan::cut_of(const OctavoOp& op) {
  const auto [found, is_new] = cuts_.try_emplace(op.window);
  Cut& cut = found->second;
  if (is_new) {
    static_cast<AttentionCut&>(cut) = cut_attention(op, step_, items_, num_threads_);
    sums_.reserve(cut.num_sums * op.num_kv_heads, op);
    if (cut.is_cut()) cut.num_ended = std::vector<std::atomic<int>>(items_.size() * op.num_kv_heads);
  }
  return cut;
}

AttentionPlan::Unit AttentionPlan::unit_of(const OctavoOp& op, const Cut& cut, int unit) const {
  if (!cut.is_cut()) return {unit / op.num_kv_heads, unit % op.num_kv_heads, nullptr};
  // Head by head, so that the parts that read the same pages follow each other.
  const int num_parts = static_cast<int>(cut.parts.size());
  const AttentionPart& part = cut.parts[unit % num_parts];
  return {cut.rows[part.first_row].item, unit / num_parts, &part};
}

void AttentionPlan::run_unit(const OctavoOp& op, int index, int num_units, const AttentionData& data) {
  Cut& cut = cuts_.find(op.window)->second;
  const Unit unit = unit_of(op, cut, index);
  const AttentionItem& item = items_[unit.item];
  KvHead kv = kv_head_of(op, item, unit.kv_head, data);
  find_next_pages(op, unit_of(op, cut, std::min(index + 1, num_units - 1)), data, kv);
  if (unit.is_of_pieces()) return run_part(op, cut, unit, kv, data);
  attend(op, kv, item, rows_of(op, item, unit.kv_head, data));
}

void AttentionPlan::run_part(const OctavoOp& op, Cut& cut, const Unit& unit, const KvHead& kv,
                             const AttentionData& data) {
  const AttentionPart& part = *unit.part;
  const AttentionCut::RowOfItem* row = cut.rows.data() + part.first_row;
  Row rows[kMaxAttentionRows];
  for (int i = 0; i < part.num_rows; ++i) {
    const AttentionItem& item = items_[row[i].item];
    rows[i] = row_of(op, item, rows_of(op, item, unit.kv_head, data), row[i].row);
  }
  attend_pieces(op, kv, rows, part.num_rows, part.pieces,
                sums_.rows(op).from(unit.kv_head * cut.num_sums + part.first_sum));
  for (int i = 0; i < part.num_rows; ++i)
    if (i == 0 || row[i].item != row[i - 1].item) end_part(op, cut, row[i].item, unit.kv_head, data);
}

// Count a part of an item; after the last one put its pieces together.
void AttentionPlan::end_part(const OctavoOp& op, Cut& cut, int item, int kv_head, const AttentionData& data) {
  const AttentionCut::Item& cut_item = cut.items[item];
  std::atomic<int>& num_ended = cut.num_ended[kv_head * items_.size() + item];
  if (num_ended.fetch_add(1, std::memory_order_acq_rel) + 1 < cut_item.num_parts) return;
  num_ended.store(0, std::memory_order_relaxed);  // for the next layer
  merge_pieces(op, items_[item], sums_.rows(op).from(kv_head * cut.num_sums), cut.first_sums.data() + cut_item.first_piece,
               cut_item.pieces.count(), rows_of(op, items_[item], kv_head, data));
}

KvHead AttentionPlan::kv_head_of(const OctavoOp& op, const AttentionItem& item, int kv_head,
                                 const AttentionData& data) const {
  KvHead kv{};
  kv.pages = data.pages + kv_head * pages_size(op);
  kv.block_stride = data.block_stride;
  kv.block_table = step_.block_tables + int64_t{item.sequence} * step_.max_blocks;
  return kv;
}

// The pages that `unit` reads first, into `kv` of the unit before it.
void AttentionPlan::find_next_pages(const OctavoOp& op, const Unit& unit, const AttentionData& data, KvHead& kv) const {
  const AttentionItem& item = items_[unit.item];
  const KvHead next = kv_head_of(op, item, unit.kv_head, data);
  const int first_piece = (unit.is_of_pieces() ? unit.part->pieces : pieces_of(op, item)).begin;
  const int first_page = first_piece * (kKeysPerPiece / kBlockTokens);
  const int last_page = (item.first_position + item.num_tokens - 1) / kBlockTokens;
  for (int i = 0; i < kTilePages; ++i) kv.read_next[i] = next.page(std::min(first_page + i, last_page));
}

int AttentionPlan::num_reads(const OctavoOp& op) const {
  const Cut& cut = cuts_.find(op.window)->second;
  return static_cast<int>(cut.is_cut() ? cut.parts.size() * op.num_kv_heads : items_.size());
}

// Empty where the pages are those of the read before, unless this is the first.
AttentionPlan::Read AttentionPlan::read_of(const OctavoOp& op, int index, bool is_first) const {
  const Cut& cut = cuts_.find(op.window)->second;
  const Unit unit = cut.is_cut() ? unit_of(op, cut, index) : Unit{index, 0, nullptr};
  const AttentionItem& item = items_[unit.item];
  int begin = first_key(op, item.first_position), end = item.first_position + item.num_tokens;
  if (unit.is_of_pieces()) {
    begin = std::max(begin, unit.part->pieces.begin * kKeysPerPiece);
    end = std::min(end, unit.part->pieces.end * kKeysPerPiece);
    if (unit.part->reads_same_pages && !is_first) end = begin;
  }
  return {step_.block_tables + int64_t{item.sequence} * step_.max_blocks, begin / kBlockTokens,
          static_cast<int>(divide_up(end, kBlockTokens)), unit.kv_head, cut.is_cut() ? 1 : op.num_kv_heads};
}

PagesAhead::PagesAhead(const AttentionPlan& plan, const OctavoOp& op, const AttentionData& data, int thread,
                       int num_threads)
    : plan_(&plan), op_(&op), pages_(data.pages), block_stride_(data.block_stride) {
  const int64_t num_reads = plan.num_reads(op);
  next_read_ = static_cast<int>(num_reads * thread / num_threads);
  end_read_ = static_cast<int>(num_reads * (thread + 1) / num_threads);
  if (next_read_ < end_read_) read_ = plan.read_of(op, next_read_++, true);
  advance();
}

void PagesAhead::advance() {
  while (read_.page >= read_.end_page) {
    if (next_read_ >= end_read_) {
      next_line = end = nullptr;
      return;
    }
    read_ = plan_->read_of(*op_, next_read_++, false);
  }
  const int64_t head_size = pages_size(*op_);
  const int32_t block = read_.block_table[read_.page++];
  next_line = reinterpret_cast<const char*>(pages_ + block * block_stride_ + read_.kv_head * head_size);
  end = next_line + read_.num_kv_heads * head_size * sizeof(bf16);
}

}  // namespace octavo
