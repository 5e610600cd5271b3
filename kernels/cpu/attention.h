// Causal attention over the paged KV cache.
#pragma once

#include <cstdint>

#include "abi.h"
#include "simd.h"

namespace octavo {

// Where one layer and kv head of a sequence's keys and values lie.
struct KvHead {
  const bf16* pages;            // K page of block 0; its V page follows
  int64_t block_stride;         // from a block to the next
  const int32_t* block_table;
};

// Neighbouring tokens of one sequence that attend together.
struct AttentionItem {
  int32_t sequence;
  int32_t first_token;  // index into the step's tokens
  int32_t num_tokens;
  int32_t first_position;
};

constexpr int kTokensPerAttentionItem = 16;

// Attend with all query heads of one kv head.
//
// queries, output   first token's first such head; tokens are `stride` elements apart
//
// Keys are read in tiles of 128 at fixed positions from 0. What a query must not see gets weight
// zero, and a zero changes no bit of a sum, so a query's result depends on its own position and
// cache only: not on the queries that it shares a tile with, nor on which block ids hold its cache.
void attend(const OctavoOp& op, const KvHead& kv, const AttentionItem& item, const bf16* queries, bf16* output,
            int64_t stride);

}  // namespace octavo
