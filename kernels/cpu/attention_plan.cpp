#include "attention_plan.h"

#include <algorithm>

namespace octavo {
namespace {

// With more units than that for each thread there is nothing to win by cutting.
constexpr int kUnitsPerThread = 8;

}  // namespace

AttentionPlan::AttentionPlan(const OctavoStep& step, int num_threads) : step_(step), num_threads_(num_threads) {
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

int AttentionPlan::prepare(const OctavoOp& op) {
  if (!should_cut(op)) return static_cast<int>(items_.size()) * op.num_kv_heads;
  const auto [found, is_new] = cuts_.try_emplace(op.window);
  if (is_new) cut(op, found->second);
  return static_cast<int>(found->second.item_of_unit.size());
}

bool AttentionPlan::should_cut(const OctavoOp& op) const {
  const int64_t num_units = static_cast<int64_t>(items_.size()) * op.num_kv_heads;
  if (num_threads_ == 1 || num_units >= kUnitsPerThread * num_threads_) return false;
  const auto is_one_tile = [&](const AttentionItem& item) { return num_rows_of(op, item) <= kMaxTileRows; };
  const auto is_long = [&](const AttentionItem& item) { return pieces_of(op, item).count() > 1; };
  return std::all_of(items_.begin(), items_.end(), is_one_tile) && std::any_of(items_.begin(), items_.end(), is_long);
}

void AttentionPlan::cut(const OctavoOp& op, Cut& result) const {
  int64_t num_sums = 0;
  for (size_t i = 0; i < items_.size(); ++i) {
    const PieceRange pieces = pieces_of(op, items_[i]);
    const int num_units = pieces.count() * op.num_kv_heads;
    result.items.push_back({static_cast<int>(i), static_cast<int>(result.item_of_unit.size()), pieces, num_sums});
    result.item_of_unit.insert(result.item_of_unit.end(), num_units, static_cast<int>(i));
    num_sums += int64_t{num_units} * num_rows_of(op, items_[i]);
  }
  result.sums.resize(num_sums);
  result.num_ended = std::vector<std::atomic<int>>(items_.size() * op.num_kv_heads);
}

AttentionPlan::Unit AttentionPlan::unit_of(const OctavoOp& op, int unit) const {
  const auto found = cuts_.find(op.window);
  if (found == cuts_.end()) return {unit / op.num_kv_heads, unit % op.num_kv_heads, -1};
  const CutItem& cut_item = found->second.items[found->second.item_of_unit[unit]];
  const int index = unit - cut_item.first_unit;
  return {cut_item.item, index / cut_item.pieces.count(), index % cut_item.pieces.count()};
}

void AttentionPlan::run_unit(const OctavoOp& op, int unit, int num_units, const AttentionData& data) {
  const auto [index, kv_head, piece] = unit_of(op, unit);
  const AttentionItem& item = items_[index];
  KvHead kv = kv_head_of(op, item, kv_head, data);
  find_next_pages(op, std::min(unit + 1, num_units - 1), data, kv);
  const int64_t offset = item.first_token * data.stride + op.num_heads / op.num_kv_heads * kv_head * op.head_dim;
  const bf16* queries = data.queries + offset;
  if (piece < 0) return attend(op, kv, item, queries, data.output + offset, data.stride);

  Cut& cut = cuts_.find(op.window)->second;
  const PieceRange pieces = cut.items[index].pieces;
  const int num_rows = num_rows_of(op, item);
  PartialRow* sums = cut.sums.data() + cut.items[index].first_sum + int64_t{kv_head} * pieces.count() * num_rows;
  attend_piece(op, kv, item, queries, data.stride, pieces.begin + piece, sums + piece * num_rows);
  std::atomic<int>& num_ended = cut.num_ended[index * op.num_kv_heads + kv_head];
  if (num_ended.fetch_add(1, std::memory_order_acq_rel) + 1 < pieces.count()) return;
  num_ended.store(0, std::memory_order_relaxed);  // for the next layer
  merge_pieces(op, item, sums, pieces.count(), data.output + offset, data.stride);
}

KvHead AttentionPlan::kv_head_of(const OctavoOp& op, const AttentionItem& item, int kv_head,
                                 const AttentionData& data) const {
  const int64_t page_size = int64_t{op.head_dim} * kBlockTokens;
  KvHead kv{};
  kv.pages = data.pages + kv_head * 2 * page_size;
  kv.block_stride = data.block_stride;
  kv.block_table = step_.block_tables + int64_t{item.sequence} * step_.max_blocks;
  return kv;
}

// The pages that `unit` reads first, into `kv` of the unit before it.
void AttentionPlan::find_next_pages(const OctavoOp& op, int unit, const AttentionData& data, KvHead& kv) const {
  const auto [index, kv_head, piece] = unit_of(op, unit);
  const AttentionItem& item = items_[index];
  const KvHead next = kv_head_of(op, item, kv_head, data);
  const int first_piece = pieces_of(op, item).begin + std::max(piece, 0);
  const int first_page = first_piece * (kKeysPerPiece / kBlockTokens);
  const int last_page = (item.first_position + item.num_tokens - 1) / kBlockTokens;
  for (int i = 0; i < kTilePages; ++i) kv.read_next[i] = next.page(std::min(first_page + i, last_page));
}

PagesAhead::PagesAhead(const AttentionPlan& plan, const OctavoOp& op, const AttentionData& data, int thread,
                       int num_threads)
    : plan_(&plan), op_(&op), pages_(data.pages), block_stride_(data.block_stride) {
  const int64_t num_items = plan.items().size();
  item_ = static_cast<int>(num_items * thread / num_threads);
  end_item_ = static_cast<int>(num_items * (thread + 1) / num_threads);
  begin_item();
  advance();
}

void PagesAhead::begin_item() {
  if (item_ == end_item_) return;
  const AttentionItem& item = plan_->items()[item_];
  page_ = first_key(*op_, item.first_position) / kBlockTokens;
  end_page_ = static_cast<int>(divide_up(item.first_position + item.num_tokens, kBlockTokens));
}

void PagesAhead::advance() {
  if (item_ == end_item_) {
    next_line = end = nullptr;
    return;
  }
  const OctavoStep& step = plan_->step();
  const int32_t block = step.block_tables[int64_t{plan_->items()[item_].sequence} * step.max_blocks + page_];
  next_line = reinterpret_cast<const char*>(pages_ + block * block_stride_);
  end = next_line + int64_t{2} * op_->num_kv_heads * op_->head_dim * kBlockTokens * sizeof(bf16);
  if (++page_ < end_page_) return;
  ++item_;
  begin_item();
}

}  // namespace octavo
