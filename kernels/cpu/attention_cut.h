// Where the attention of a step is cut so that threads share a long context, or sequences the reading of a prefix.
#pragma once

#include <cstdint>
#include <vector>

#include "abi.h"
#include "attention.h"

namespace octavo {

// What all kv heads do alike: some rows attend to some pieces of their keys, or an item to all of its keys.
struct AttentionPart {
  PieceRange pieces;  // more than one only from the first one on that the rows see; empty: all
  int first_row;      // into AttentionCut::rows; of all pieces the item's first one
  int num_rows;       // at most kMaxAttentionRows; of all pieces 1
  int64_t first_sum;
  bool reads_same_pages;  // as the part before
};

struct AttentionCut {
  struct RowOfItem {
    int item;
    int row;
  };
  struct Item {
    PieceRange pieces;
    int first_piece;    // into first_sums
    int num_parts = 0;  // that its rows are in
  };

  bool is_cut() const { return !parts.empty(); }

  bool is_shared = false;  // whether there are parts of several items
  std::vector<AttentionPart> parts;
  std::vector<RowOfItem> rows;
  std::vector<Item> items;          // as those of the step
  std::vector<int64_t> first_sums;  // of each item's pieces; see merge_pieces
  int64_t num_sums = 0;             // of one kv head
};

// Items that have some pieces of their keys in the same blocks.
struct SharedPieces {
  PieceRange pieces;
  std::vector<int> items;
};

// The pieces that two items or more share, one by one and in their order; each of those sees all keys of the piece.
std::vector<SharedPieces> find_shared_pieces(const OctavoOp& op, const OctavoStep& step,
                                             const std::vector<AttentionItem>& items);

// Not cut where nothing is won by it.
AttentionCut cut_attention(const OctavoOp& op, const OctavoStep& step, const std::vector<AttentionItem>& items,
                           int num_threads);

}  // namespace octavo
