#include "gemm.h"

#include <algorithm>
#include <vector>

#include "activation.h"
#include "compressed.h"
#include "gemm_part.h"

namespace octavo {
namespace {

constexpr int kMostItemsPerThread = 64;   // of a row of items; more would only cost time
constexpr int kFewestRowsOfThread = 256;  // where threads share out rows: each of them reads all weights then
constexpr int64_t kMostAheadPerGroup = 256;  // bytes; of quantised weights

BlockRange blocks_of_item(const GemmItems& items, int item) {
  const int64_t block_item = item % items.num_block_items;
  return {items.num_blocks * block_item / items.num_block_items,
          items.num_blocks * (block_item + 1) / items.num_block_items};
}

QuantizedRows quantized_rows_of(const Gemm& gemm, int64_t begin, int64_t end) {
  if (gemm.quantized_input.data != nullptr)
    return {gemm.quantized_input.data + begin * gemm.quantized_input.stride, gemm.quantized_input.stride};
  thread_local std::vector<char> quantized;
  const int64_t in_features = gemm.linear->in_features, stride = quantized_row_bytes(in_features);
  quantized.resize((end - begin) * stride);
  for (int64_t row = 0; row < end - begin; ++row)
    quantize_row(gemm.input + (begin + row) * gemm.input_stride, in_features, quantized.data() + row * stride);
  return {quantized.data(), stride};
}

// What a tile of `groups` groups fetches of the memory ahead; maybe some lines more than there are in the piece.
GroupPrefetch take_piece(ReadAhead& ahead, int64_t groups) {
  const int64_t left = ahead.end - ahead.next_line;
  const GroupPrefetch piece{ahead.next_line, std::min(kMostAheadPerGroup, round_up(divide_up(left, groups), 64))};
  ahead.next_line += std::min(left, groups * piece.bytes_per_group);
  if (ahead.is_done()) ahead.advance();
  return piece;
}

// The same over quantised weights.
void run_quantized_part(const Gemm& gemm, int64_t begin, int64_t end, const BlockRange& blocks, ReadAhead* ahead) {
  const OctavoLinear& linear = *gemm.linear;
  const int64_t num_tiles = divide_up(end - begin, kMaxQuantizedRows);
  const int64_t bytes_per_group = group_bytes(linear.format);
  const QuantizedRows rows = quantized_rows_of(gemm, begin, end);
  alignas(64) float sums[kMaxQuantizedRows * kBlockColumns];
  for (int64_t block = blocks.begin; block < blocks.end; ++block) {
    GroupPrefetch soon{reinterpret_cast<const char*>(block_weights(linear, block + 1)), 0};
    for (int64_t tile = 0; tile < num_tiles; ++tile) {
      if (end - begin > kRowsWithoutPrefetch)
        soon.bytes_per_group = num_tiles == 1 ? bytes_per_group : tile < kTilesThatFetchWeights ? bytes_per_group / 2 : 0;
      const int64_t first = (end - begin) * tile / num_tiles;
      const int64_t count = (end - begin) * (tile + 1) / num_tiles - first;
      GroupPrefetch later{};
      if (tile >= kTilesThatFetchWeights && ahead != nullptr && !ahead->is_done())
        later = take_piece(*ahead, divide_up(linear.in_features, kGroup));
      multiply_quantized({rows.data + first * rows.stride, rows.stride}, static_cast<int>(count),
                         block_weights(linear, block), linear.format, linear.in_features,
                         later.bytes_per_group > 0 ? later : soon, sums);
      finish_rows(gemm, begin + first, static_cast<int>(count), block, sums);
      if (gemm.adapters != nullptr) fetch_stripes(*gemm.adapters, begin + first, begin + first + count, block + 1);
    }
  }
}

void run_part(const Gemm& gemm, int64_t begin, int64_t end, const BlockRange& blocks, ReadAhead* ahead) {
  if (is_quantized(*gemm.linear)) return run_quantized_part(gemm, begin, end, blocks, ahead);
  run_bf16_part(gemm, begin, end, blocks, ahead);
}

// How many rows stay in cache while the blocks pass.
int64_t rows_in_cache(const OctavoLinear& linear) {
  const int64_t row_bytes = is_quantized(linear) ? quantized_row_bytes(linear.in_features)
                                                 : round_up(linear.in_features, 2) * int64_t{sizeof(Activation)};
  const int64_t num_rows = kActivationBytesInCache / row_bytes / kRowsPerTile * kRowsPerTile;
  return std::clamp<int64_t>(num_rows, kRowsPerTile, kMostTilesPerItem * kRowsPerTile);
}

// Threads take equal shares of the items, which are in the order of their rows. Where rows are many, they are cut so that no piece
// is of two shares: what a thread wrote in one layer it finds in its own cache in the next.
int64_t rows_of_item(const OctavoLinear& linear, int rows, int num_threads) {
  const int64_t most = rows_in_cache(linear);
  if (rows < kFewestRowsOfThread * num_threads) return most;
  const int64_t num_pieces = round_up(divide_up(rows, most), num_threads);
  return round_up(divide_up(rows, num_pieces), kRowsPerTile);
}

void add_bias(float* sums, int num_rows, const float* bias) {
  for (float* row = sums; row < sums + num_rows * kBlockColumns; row += kBlockColumns)
    for (int i = 0; i < kBlockColumns; i += kLanes) store(row + i, load(row + i) + load(bias + i));
}

// A block's first `num_columns` sums of logits.
void store_logits(const Gemm& gemm, int64_t row, int num_rows, int64_t block, int64_t num_columns, const float* sums) {
  const int32_t token = static_cast<int32_t>(block * kBlockColumns);
  for (int r = 0; r < num_rows; ++r, sums += kBlockColumns) {
    float* const output = static_cast<float*>(gemm.output) + (row + r) * gemm.output_stride + token;
    if (num_columns < kBlockColumns) {
      std::copy_n(sums, num_columns, output);
      gemm.best[row + r].take(sums, static_cast<int>(num_columns), token);
      continue;
    }
    for (int i = 0; i < kBlockColumns; i += kLanes) {
      if (gemm.skips_caches) {
        store_past_caches(output + i, load(sums + i));
      } else {
        store(output + i, load(sums + i));
      }
    }
    gemm.best[row + r].take(sums, kBlockColumns, token);
  }
}

// Call `finish(output, sums)` for every row.
template <class Output, class Finish>
void for_each_row(Output* output, int64_t stride, const float* sums, int num_rows, const Finish& finish) {
  for (int row = 0; row < num_rows; ++row) finish(output + row * stride, sums + row * kBlockColumns);
}

template <Vec (*kGated)(Vec, Vec)>
void store_gated(Activation* output, const float* sums) {
  for (int i = 0; i < kGatedColumns; i += kLanes)
    store_activation(output + i, kGated(load(sums + i), load(sums + kGatedColumns + i)));
}

}  // namespace

void finish_rows(const Gemm& gemm, int64_t row, int num_rows, int64_t block, float* sums) {
  if (gemm.linear->bias != nullptr) add_bias(sums, num_rows, gemm.linear->bias + block * kBlockColumns);
  if (gemm.adapters != nullptr) add_adapters(*gemm.adapters, row, num_rows, block, sums, kBlockColumns);
  char* const place = output_of(gemm, row, block);
  float* const output = reinterpret_cast<float*>(place);
  Activation* const activations = reinterpret_cast<Activation*>(place);
  const int64_t stride = gemm.output_stride, num_columns = gemm.num_columns - block * kBlockColumns;
  switch (gemm.epilogue) {
    case Epilogue::kLogits:
      if (gemm.soft_cap > 0.0f)
        for (int i = 0; i < num_rows * kBlockColumns; i += kLanes)
          store(sums + i, soft_capped(load(sums + i), 1.0f, gemm.soft_cap));
      return store_logits(gemm, row, num_rows, block, std::min<int64_t>(num_columns, kBlockColumns), sums);
    case Epilogue::kStore:
      if (num_columns >= kBlockColumns)
        return for_each_row(output, stride, sums, num_rows, [](float* to, const float* sum) {
          for (int i = 0; i < kBlockColumns; i += kLanes) store(to + i, load(sum + i));
        });
      return for_each_row(output, stride, sums, num_rows,
                          [&](float* to, const float* sum) { std::copy_n(sum, num_columns, to); });
    case Epilogue::kStoreActivations:
      return for_each_row(activations, stride, sums, num_rows, [&](Activation* to, const float* sum) {
        const int64_t count = std::min<int64_t>(num_columns, kBlockColumns);
        for (int i = 0; i < count; i += kLanes) store_activation(to + i, load(sum + i));
      });
    case Epilogue::kAddResidual:
      return for_each_row(output, stride, sums, num_rows, [](float* to, const float* sum) {
        for (int i = 0; i < kBlockColumns; i += kLanes) store(to + i, load(to + i) + load(sum + i));
      });
    case Epilogue::kAddWeighted:
      for (int r = 0; r < num_rows; ++r) {
        float* const to = reinterpret_cast<float*>(output_of(gemm, row + r, block));
        const float* const sum = sums + r * kBlockColumns;
        const Vec weight = broadcast(gemm.row_weights[row + r]);
        for (int i = 0; i < kBlockColumns; i += kLanes) store(to + i, load(to + i) + weight * load(sum + i));
      }
      return;
    case Epilogue::kSilu:
      return for_each_row(activations, stride, sums, num_rows, store_gated<gated_silu>);
    case Epilogue::kGeluTanh:
      return for_each_row(activations, stride, sums, num_rows, store_gated<gated_gelu_tanh>);
    case Epilogue::kSwigluOai:
      return for_each_row(activations, stride, sums, num_rows, store_gated<swigluoai>);
  }
}

GemmItems::GemmItems(int rows, const OctavoLinear& linear, bool gated, int num_threads) : num_rows(rows) {
  num_blocks = static_cast<int>(divide_up(linear.out_features, gated ? kGatedColumns : kBlockColumns));
  rows_per_item = static_cast<int>(rows_of_item(linear, rows, num_threads));
  num_row_items = static_cast<int>(divide_up(rows, rows_per_item));
  const int blocks_per_item = static_cast<int>(divide_up(num_blocks, kMostItemsPerThread * num_threads));
  num_block_items = static_cast<int>(divide_up(num_blocks, blocks_per_item));
}

bool is_quantized(int32_t format) { return format != OCTAVO_WEIGHT_BF16 && format != OCTAVO_WEIGHT_COMPRESSED; }
bool is_quantized(const OctavoLinear& linear) { return is_quantized(linear.format); }

int64_t block_bytes(int32_t format, int64_t in_features) {
  if (format == OCTAVO_WEIGHT_BF16) return divide_up(in_features, 2) * kBlockColumns * 2 * sizeof(bf16);
  if (format == OCTAVO_WEIGHT_COMPRESSED) return compressed_block_bytes(in_features);
  return divide_up(in_features, kGroup) * group_bytes(format);
}

void unpack_column(const OctavoLinear& linear, int64_t column, float* output) {
  const uint8_t* block = block_weights(linear, column / kBlockColumns);
  if (is_quantized(linear))
    return unpack_quantized(block, column % kBlockColumns, linear.format, linear.in_features, output);
  if (linear.format == OCTAVO_WEIGHT_COMPRESSED)
    return unpack_compressed_column(block, column % kBlockColumns, linear.in_features, output);
  const bf16* pairs = reinterpret_cast<const bf16*>(block) + column % kBlockColumns * 2;
  for (int64_t i = 0; i < linear.in_features; ++i)
    output[i] = bf16_to_float(pairs[i / 2 * kBlockColumns * 2 + i % 2]);
}

MemoryRange weights_of_gemm_item(const Gemm& gemm, const GemmItems& items, int item) {
  const BlockRange blocks = blocks_of_item(items, item);
  const uint8_t* begin = block_weights(*gemm.linear, blocks.begin);
  return {reinterpret_cast<const char*>(begin), static_cast<size_t>(block_weights(*gemm.linear, blocks.end) - begin)};
}

void run_gemm_items(const Gemm& gemm, const GemmItems& items, int begin, int end, ReadAhead* ahead) {
  while (begin < end) {
    const int row_item = begin / items.num_block_items;
    const int last = std::min(end, (row_item + 1) * items.num_block_items) - 1;  // of the same rows
    const BlockRange blocks{blocks_of_item(items, begin).begin, blocks_of_item(items, last).end};
    const int64_t row = static_cast<int64_t>(row_item) * items.rows_per_item;
    run_part(gemm, row, std::min<int64_t>(row + items.rows_per_item, items.num_rows), blocks, ahead);
    begin = last + 1;
  }
}

void run_gemm_blocks(const Gemm& gemm, int64_t begin, int64_t end, ReadAhead* ahead) {
  const int64_t step = rows_in_cache(*gemm.linear);
  for (int64_t row = 0; row < gemm.num_rows; row += step)
    run_part(gemm, row, std::min<int64_t>(row + step, gemm.num_rows), {begin, end}, ahead);
}

}  // namespace octavo
