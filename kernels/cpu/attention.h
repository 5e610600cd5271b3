// Causal attention over the paged KV cache.
#pragma once

#include <cstdint>

#include "abi.h"
#include "aligned.h"
#include "amx.h"
#include "elementwise.h"
#include "simd.h"

namespace octavo {

constexpr int kTilePages = 8;  // read together

// Rows that attend together.
#if defined(OCTAVO_AMX)
constexpr int kMaxAttentionRows = kAmxRows;
#else
constexpr int kMaxAttentionRows = kMaxTileRows;
#endif

// Where one layer and kv head of a sequence's keys and values lie.
struct KvHead {
  const bf16* pages;            // K page of block 0; its V page follows
  int64_t block_stride;         // from a block to the next
  const int32_t* block_table;
  const bf16* read_next[kTilePages];  // the pages that this thread will likely read afterwards
  bool is_in_cache = false;           // whether the same pages were read just before

  const bf16* page(int64_t index) const { return pages + block_table[index] * block_stride; }
};

// Neighbouring tokens of one sequence that attend together.
struct AttentionItem {
  int32_t sequence;
  int32_t first_token;  // index into the step's tokens
  int32_t num_tokens;
  int32_t first_position;
};

constexpr int kTokensPerAttentionItem = 16;

// Keys are summed up in pieces at fixed positions, and the pieces put together in their order,
// whether one thread computes them all or each another one.
constexpr int kKeysPerPiece = 256;

// Numbers of pieces.
struct PieceRange {
  int begin;
  int end;
  int count() const { return end - begin; }
  bool contains(int piece) const { return begin <= piece && piece < end; }
};

// The softmax of some rows over a part of their keys: weights are 2^(score - reference). They are as long as values are.
struct PartialRows {
  static constexpr int64_t stride_of(int value_dim) { return value_dim + kLineBytes / sizeof(float); }

  float* data;  // begins with a cache line
  int64_t stride;

  float* output(int64_t row) const { return data + row * stride; }  // sum of weight * value; anything where the total is zero
  float& reference(int64_t row) const { return data[(row + 1) * stride - 2]; }  // at most the largest score
  float& total(int64_t row) const { return data[(row + 1) * stride - 1]; }  // of the weights; zero where it sees no key
  PartialRows from(int64_t row) const { return {data + row * stride, stride}; }
};

// Room for those of any model.
template <int kRows>
struct alignas(kLineBytes) PartialRowsMemory {
  float values[kRows * PartialRows::stride_of(kMaxValueDim)];

  PartialRows rows(int value_dim) { return {values, PartialRows::stride_of(value_dim)}; }
};

// One query head of one token.
struct Row {
  const Activation* query;
  Activation* output;
  int begin;  // it sees keys [begin, end)
  int end;
  const float* sink;  // its head's, null for none
};

// Where the queries and outputs of some tokens lie: of all heads, or from one head on.
struct AttentionRows {
  const Activation* queries;
  int64_t query_stride;
  Activation* output;
  int64_t output_stride;
  const float* sinks;  // of each head, null for none

  AttentionRows from(const OctavoOp& op, int64_t token, int64_t head) const {
    return {queries + token * query_stride + head * op.head_dim, query_stride,
            output + token * output_stride + head * value_dim(op), output_stride,
            sinks == nullptr ? nullptr : sinks + head};
  }
};

inline int num_rows_of(const OctavoOp& op, const AttentionItem& item) {
  return item.num_tokens * (op.num_heads / op.num_kv_heads);
}

// The first key that a token at `position` sees.
int first_key(const OctavoOp& op, int position);

// The pieces that an item sees.
PieceRange pieces_of(const OctavoOp& op, const AttentionItem& item);

// Attend with all query heads of one kv head.
//
// queries, output   first token's first such head; tokens are their stride apart
//
// Keys are read in tiles of 128 at fixed positions from 0. What a query must not see gets weight
// zero, and a zero changes no bit of a sum, so a query's result depends on its own position and
// cache only: not on the queries that it shares a tile with, nor on which block ids hold its cache.
void attend(const OctavoOp& op, KvHead kv, const AttentionItem& item, const AttentionRows& data);

// Row number `index` of an item: token after token, each with all heads of the group.
Row row_of(const OctavoOp& op, const AttentionItem& item, const AttentionRows& data, int index);

// The same in pieces: first each piece, or the first few of the rows together, into its own `sums` [rows], for at most
// kMaxAttentionRows rows at once, which may be of several items if these have the pieces in the same blocks; then all
// pieces of an item into its output. The sums of piece number i begin at `sums` + first_sums[i], and are changed in place;
// with kWithPieceBefore they are in those of the piece before.
constexpr int64_t kWithPieceBefore = -1;
void attend_pieces(const OctavoOp& op, const KvHead& kv, const Row* rows, int num_rows, const PieceRange& pieces,
                   PartialRows sums);
void merge_pieces(const OctavoOp& op, const AttentionItem& item, PartialRows sums, const int64_t* first_sums,
                  int num_pieces, const AttentionRows& data);

}  // namespace octavo
