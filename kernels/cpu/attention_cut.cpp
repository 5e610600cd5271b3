#include "attention_cut.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <utility>

namespace octavo {
namespace {

// With more units than that for each thread there is nothing to win by cutting for their number.
constexpr int kUnitsPerThread = 8;

// But a unit is cut that takes more than this part of the time that each thread takes for all of them.
constexpr int kPartOfThread = 2;

// Pieces are joined only where so many tiles of rows are left for each thread: each takes long then, and all wait for the last.
constexpr int kJoinedTilesPerThread = 4;

// Pieces are shared if at least one in so many keys is not read for that.
constexpr int kLeastShareSaved = 4;

constexpr int kPieceBlocks = kKeysPerPiece / kBlockTokens;

// Whether an item's rows leave room in a tile for those of others, or are of one token.
bool is_short(const OctavoOp& op, const AttentionItem& item) {
  return item.num_tokens == 1 || num_rows_of(op, item) <= kMaxAttentionRows;
}

int64_t num_keys_of(const OctavoOp& op, const AttentionItem& item) {
  return item.first_position + item.num_tokens - first_key(op, item.first_position);
}

// Those that all rows of an item see all keys of.
PieceRange whole_pieces_of(const OctavoOp& op, const AttentionItem& item) {
  const int begin = first_key(op, item.first_position + item.num_tokens - 1);
  return {static_cast<int>(divide_up(begin, kKeysPerPiece)), (item.first_position + 1) / kKeysPerPiece};
}

// How many tiles the rows of some items fill.
int num_tiles_of(const OctavoOp& op, const std::vector<AttentionItem>& items, const std::vector<int>& some) {
  int num_rows = 0;
  for (const int item : some) num_rows += num_rows_of(op, items[item]);
  return static_cast<int>(divide_up(num_rows, kMaxAttentionRows));
}

// Whether enough is saved to pay for what sharing takes: keys of all sequences must be written before any is
// read, and sums of pieces kept. Measured: with an eighth of the keys saved, nothing is won.
bool is_worth_sharing(const OctavoOp& op, const std::vector<AttentionItem>& items,
                      const std::vector<SharedPieces>& shared, int num_threads) {
  int64_t num_keys = 0, num_saved = 0, num_parts = 0;
  for (const AttentionItem& item : items)
    if (is_short(op, item)) num_keys += num_keys_of(op, item);
  for (const SharedPieces& piece : shared) {
    num_saved += (static_cast<int64_t>(piece.items.size()) - 1) * kKeysPerPiece;
    num_parts += num_tiles_of(op, items, piece.items);
  }
  return num_saved * kLeastShareSaved >= num_keys && num_parts * op.num_kv_heads >= num_threads;
}

// Whether pieces of few long items are dealt out, so that each thread has some.
bool has_few_units(const OctavoOp& op, const std::vector<AttentionItem>& items, int num_threads) {
  const int64_t num_units = static_cast<int64_t>(items.size()) * op.num_kv_heads;
  if (num_threads == 1 || num_units >= kUnitsPerThread * num_threads) return false;
  const auto is_one_tile = [&](const AttentionItem& item) { return num_rows_of(op, item) <= kMaxAttentionRows; };
  const auto is_long = [&](const AttentionItem& item) { return pieces_of(op, item).count() > 1; };
  return std::all_of(items.begin(), items.end(), is_one_tile) && std::any_of(items.begin(), items.end(), is_long);
}

// Which items of one tile are so long beside the others that all threads would wait for one that has such a unit.
std::vector<bool> find_longest(const OctavoOp& op, const std::vector<AttentionItem>& items, int num_threads) {
  const auto num_tiles = [&](const AttentionItem& item) { return divide_up(num_rows_of(op, item), kMaxAttentionRows); };
  int64_t num_keys = 0;  // that all units of a head read
  for (const AttentionItem& item : items) num_keys += num_keys_of(op, item) * num_tiles(item);
  std::vector<bool> are_longest(items.size());
  for (size_t i = 0; i < items.size(); ++i)
    are_longest[i] = num_threads > 1 && pieces_of(op, items[i]).count() > 1 && num_tiles(items[i]) == 1 &&
                     num_keys_of(op, items[i]) * num_threads * kPartOfThread > num_keys * op.num_kv_heads;
  return are_longest;
}

class Cutter {
 public:
  Cutter(const OctavoOp& op, const std::vector<AttentionItem>& items) : op_(op), items_(items) {
    int num_pieces = 0;
    for (const AttentionItem& item : items) {
      const PieceRange pieces = pieces_of(op, item);
      cut_.items.push_back({pieces, num_pieces});
      num_pieces += pieces.count();
    }
    cut_.first_sums.assign(num_pieces, kNoSum);
  }

  // Let the rows of all items attend to some pieces in full tiles.
  void add_pieces(const PieceRange& pieces, const std::vector<int>& items) {
    const int first_row = static_cast<int>(cut_.rows.size());
    for (const int index : items) {
      AttentionCut::Item& item = cut_.items[index];
      int64_t* const first_sums = cut_.first_sums.data() + item.first_piece + pieces.begin - item.pieces.begin;
      std::fill_n(first_sums, pieces.count(), kWithPieceBefore);
      first_sums[0] = cut_.num_sums + num_rows() - first_row;
      for (int row = 0; row < num_rows_of(op_, items_[index]); ++row) cut_.rows.push_back({index, row});
    }
    const int count = num_rows() - first_row;
    const int num_tiles = static_cast<int>(divide_up(count, kMaxAttentionRows));
    for (int tile = 0; tile < num_tiles; ++tile) {
      const int begin = count * tile / num_tiles, end = count * (tile + 1) / num_tiles;
      cut_.parts.push_back({pieces, first_row + begin, end - begin, cut_.num_sums + begin, tile > 0});
      for (int i = first_row + begin; i < first_row + end; ++i) {
        const int item = cut_.rows[i].item;
        if (i == first_row + begin || item != cut_.rows[i - 1].item) ++cut_.items[item].num_parts;
      }
    }
    cut_.num_sums += count;
  }

  // Add what is left of an item: all pieces that it shares with none, or, if it shares none, all its keys at once.
  void add_rest(int index, bool is_cut) {
    const AttentionCut::Item& item = cut_.items[index];
    if (!is_cut && item.num_parts == 0) {
      cut_.parts.push_back({PieceRange{}, num_rows(), 1, 0, false});
      cut_.rows.push_back({index, 0});
      return;
    }
    for (int piece = item.pieces.begin; piece < item.pieces.end; ++piece)
      if (cut_.first_sums[item.first_piece + piece - item.pieces.begin] == kNoSum) add_pieces({piece, piece + 1}, {index});
  }

  AttentionCut& cut() { return cut_; }

 private:
  static constexpr int64_t kNoSum = -2;

  int num_rows() const { return static_cast<int>(cut_.rows.size()); }

  const OctavoOp& op_;
  const std::vector<AttentionItem>& items_;
  AttentionCut cut_;
};

// Let pieces that the same items begin with be one part, if that leaves each thread enough of them: it takes less time to
// attend to all of them at once, and there is less to put together.
std::vector<SharedPieces> joined(const OctavoOp& op, const std::vector<AttentionItem>& items,
                                 const std::vector<SharedPieces>& shared, int num_threads) {
  std::vector<SharedPieces> runs;
  std::map<std::vector<int>, size_t> last_run;  // of the same items
  const auto is_followed_by = [&](const SharedPieces& run, const SharedPieces& piece) {
    const auto begins_there = [&](int item) { return pieces_of(op, items[item]).begin == run.pieces.begin; };
    return run.pieces.end == piece.pieces.begin && std::all_of(run.items.begin(), run.items.end(), begins_there) &&
           num_tiles_of(op, items, run.items) * op.num_kv_heads >= kJoinedTilesPerThread * num_threads;
  };
  for (const SharedPieces& piece : shared) {
    const auto [last, is_first] = last_run.try_emplace(piece.items, runs.size());
    if (!is_first && is_followed_by(runs[last->second], piece)) {
      runs[last->second].pieces.end = piece.pieces.end;
    } else {
      last->second = runs.size();
      runs.push_back(piece);
    }
  }
  return runs;
}

}  // namespace

std::vector<SharedPieces> find_shared_pieces(const OctavoOp& op, const OctavoStep& step,
                                             const std::vector<AttentionItem>& items) {
  std::vector<int> candidates;
  int num_pieces = 0;
  for (size_t i = 0; i < items.size(); ++i) {
    if (!is_short(op, items[i]) || whole_pieces_of(op, items[i]).count() <= 0) continue;
    candidates.push_back(static_cast<int>(i));
    num_pieces = std::max(num_pieces, whole_pieces_of(op, items[i]).end);
  }
  std::vector<SharedPieces> shared;
  if (candidates.size() < 2) return shared;
  std::vector<int> present;
  for (int piece = 0; piece < num_pieces; ++piece) {
    const auto blocks = [&](int item) {
      return step.block_tables + int64_t{items[item].sequence} * step.max_blocks + piece * kPieceBlocks;
    };
    const auto compare = [&](int a, int b) {
      return std::memcmp(blocks(a), blocks(b), kPieceBlocks * sizeof(int32_t));
    };
    present.clear();
    for (const int item : candidates) {
      const PieceRange whole = whole_pieces_of(op, items[item]);
      if (whole.contains(piece)) present.push_back(item);
    }
    std::sort(present.begin(), present.end(), [&](int a, int b) {
      const int order = compare(a, b);
      return order != 0 ? order < 0 : a < b;
    });
    for (size_t begin = 0, end; begin < present.size(); begin = end) {
      for (end = begin + 1; end < present.size() && compare(present[begin], present[end]) == 0;) ++end;
      if (end - begin > 1) shared.push_back({{piece, piece + 1}, {present.begin() + begin, present.begin() + end}});
    }
  }
  return shared;
}

AttentionCut cut_attention(const OctavoOp& op, const OctavoStep& step, const std::vector<AttentionItem>& items,
                           int num_threads) {
  const bool cuts_all = has_few_units(op, items, num_threads);
  std::vector<SharedPieces> shared = find_shared_pieces(op, step, items);
  if (!is_worth_sharing(op, items, shared, num_threads)) shared.clear();
  const std::vector<bool> are_longest = find_longest(op, items, num_threads);
  const bool cuts_some = std::find(are_longest.begin(), are_longest.end(), true) != are_longest.end();
  if (!cuts_all && !cuts_some && shared.empty()) return {};
  Cutter cutter(op, items);
  cutter.cut().is_shared = !shared.empty();
  for (const SharedPieces& some : joined(op, items, shared, num_threads)) cutter.add_pieces(some.pieces, some.items);
  for (size_t i = 0; i < items.size(); ++i) cutter.add_rest(static_cast<int>(i), cuts_all || are_longest[i]);
  return std::move(cutter.cut());
}

}  // namespace octavo
