#include "check_step.h"

#include <algorithm>

#include "elementwise.h"
#include "simd.h"

namespace octavo {
namespace {

bool check_tokens(const OctavoStep& step, const OctavoCache& cache, const OctavoProgramInfo& info, int32_t max_positions,
                  const IndexError& error) {
  for (int t = 0; t < step.num_tokens; ++t) {
    if (step.token_ids[t] < 0 || step.token_ids[t] >= info.vocab_size)
      return error("token_ids[%d] is %d, vocab_size %d", t, step.token_ids[t], info.vocab_size);
    if (step.positions[t] < 0 || step.positions[t] >= max_positions)
      return error("positions[%d] is %d of %d positions", t, step.positions[t], max_positions);
    if (step.slot_mapping[t] < 0 || step.slot_mapping[t] / kBlockTokens >= cache.num_blocks)
      return error("slot_mapping[%d] is %d, with %d blocks", t, step.slot_mapping[t], cache.num_blocks);
    const int32_t adapter = step.adapter_ids == nullptr ? 0 : step.adapter_ids[t];
    if (adapter != 0 && (adapter < 0 || adapter >= step.num_adapters || step.adapters[adapter] == nullptr))
      return error("adapter_ids[%d] is %d, which is none of the %d adapters", t, adapter, step.num_adapters);
  }
  return true;
}

bool check_sequence(const OctavoStep& step, const OctavoCache& cache, const OctavoProgramInfo& info, int s,
                    const IndexError& error) {
  const int begin = step.query_start_loc[s], end = step.query_start_loc[s + 1];
  if (end < begin || end > step.num_tokens)
    return error("query_start_loc[%d] is %d after %d, with %d tokens", s + 1, end, begin, step.num_tokens);
  const int64_t seq_len = step.seq_lens[s];
  const int64_t num_blocks = divide_up(seq_len, kBlockTokens);
  if (seq_len < end - begin || num_blocks > step.max_blocks || num_blocks > info.max_blocks_per_sequence)
    return error("seq_lens[%d] is %d, with %d new tokens and room for %d blocks", s, step.seq_lens[s], end - begin,
                 std::min(step.max_blocks, info.max_blocks_per_sequence));
  for (int t = begin; t < end; ++t) {
    const int64_t expected = seq_len - (end - t);
    if (step.positions[t] != expected)
      return error("positions[%d] is %d, but seq_lens[%d] makes it %d", t, step.positions[t], s,
                   static_cast<int>(expected));
  }
  const int32_t* block_table = step.block_tables + static_cast<int64_t>(s) * step.max_blocks;
  for (int b = 0; b < num_blocks; ++b) {
    if (block_table[b] < 0 || block_table[b] >= cache.num_blocks)
      return error("block_tables[%d][%d] is %d of %d blocks", s, b, block_table[b], cache.num_blocks);
  }
  return true;
}

}  // namespace

bool check_step(const OctavoStep& step, const OctavoCache& cache, const OctavoProgramInfo& info, int32_t max_positions,
                const IndexError& error) {
  if (step.num_tokens > info.max_batch_tokens)
    return error("%d tokens in a step, more than max_batch_tokens %d", step.num_tokens, info.max_batch_tokens);
  if (step.num_logits_rows > info.max_batch_tokens)
    return error("%d logits_rows in a step, more than max_batch_tokens %d", step.num_logits_rows, info.max_batch_tokens);
  if (step.num_sequences > info.max_running)
    return error("%d sequences in a step, more than max_running %d", step.num_sequences, info.max_running);
  if (!check_tokens(step, cache, info, max_positions, error)) return false;
  if (step.query_start_loc[0] != 0) return error("query_start_loc starts at %d, not 0", step.query_start_loc[0]);
  for (int s = 0; s < step.num_sequences; ++s) {
    if (!check_sequence(step, cache, info, s, error)) return false;
  }
  const int end = step.query_start_loc[step.num_sequences];
  if (end != step.num_tokens) return error("query_start_loc ends at %d, not at %d tokens", end, step.num_tokens);
  for (int i = 0; i < step.num_logits_rows; ++i) {
    const int32_t row = step.logits_rows[i];
    if (row < 0 || row >= step.num_tokens) return error("logits_rows[%d] is %d of %d tokens", i, row, step.num_tokens);
  }
  return true;
}

}  // namespace octavo
