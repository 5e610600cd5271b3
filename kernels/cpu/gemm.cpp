#include "gemm.h"

#include <algorithm>
#include <vector>

#include "activation.h"
#include "dispatch.h"

namespace octavo {
namespace {

constexpr int kVectorsPerBlock = kBlockColumns / kLanes;
constexpr int64_t kActivationBytesInCache = 384 << 10;  // of the rows that an item reads again for every block
constexpr int kMostItemsPerThread = 64;                 // of a row of items; more would only cost time
// So few rows take less time than their weights take to arrive: the processor's own fetching keeps up best when nothing
// else asks for memory. More rows would let it fall behind. That of Intel's cores does for one row: it ends with a page.
constexpr int kRowsNearlyFree = 4;
const int kRowsWithoutPrefetch = vendor() == Vendor::kIntel ? 0 : kRowsNearlyFree;
// Where so few rows have their weights fetched, they are also brought from the second cache to the first, so far ahead.
constexpr int kPairsAhead = 16;
// Weights that one tile reads, and no other, need no place in the caches behind the first one. AMD's cores then read
// them faster; Intel's were not tried.
const bool kFetchesPastCaches = vendor() == Vendor::kAmd;
constexpr int kPairsAheadPastCaches = 96;  // 12 KiB
constexpr int64_t kMostAheadPerGroup = 256;  // bytes; of quantised weights
constexpr int kTilesThatFetchWeights = 2;  // where there are so many: a half of the next block each

// The vectors of a block that so many rows leave registers for.
constexpr int vectors_at_once(int num_rows) {
  int vectors = kVectorsPerBlock;
  while (vectors > 1 && num_rows * vectors > kAccumulators) vectors /= 2;
  return vectors;
}

// Rows of activations as the inner loop reads them.
struct Rows {
  const Activation* data;
  int64_t stride;
};

// The weights of a later block, fetched a piece at a time while this one is computed.
struct Prefetch {
  const char* next;
  int64_t bytes_per_pair;  // at most 128
};

// What is fetched while rows are multiplied: weights of the next block; those a little ahead, past the caches behind the
// first one; or what is read after this. One line a pair is what a core can wait for beside its own reading.
enum class Fetch { kNothing, kNextBlock, kPastCaches, kAhead };

// sums[row][column] of `kRows` rows and a part of a block, whose weights stay in registers while
// the rows pass.
template <int kRows, Fetch kFetch>
void multiply_rows(const Rows& input, const bf16* weight, int64_t num_pairs, Prefetch& soon, ReadAhead* ahead,
                   float* sums) {
  constexpr int kVectors = vectors_at_once(kRows);
  Vec sum[kRows][kVectors];
  clear(sum);
  const int64_t stride = input.stride;
  const int64_t stride_of_3 = 3 * stride;
  const char* next = soon.next;
  const char* line = kFetch == Fetch::kAhead ? ahead->next_line : nullptr;
  for (int64_t pair = 0; pair < num_pairs; ++pair) {
    if constexpr (kFetch == Fetch::kPastCaches) {
      prefetch_past_caches(weight + (pair + kPairsAheadPastCaches) * kBlockColumns * 2);
      prefetch_past_caches(weight + (pair + kPairsAheadPastCaches) * kBlockColumns * 2 + kBlockColumns);
    }
    if constexpr (kFetch == Fetch::kNextBlock) {
      prefetch_l2(next);
      prefetch_l2(next + 64);
      next += soon.bytes_per_pair;
      if constexpr (kRows <= kRowsNearlyFree) {
        prefetch(weight + (pair + kPairsAhead) * kBlockColumns * 2);
        prefetch(weight + (pair + kPairsAhead) * kBlockColumns * 2 + kBlockColumns);
      }
    }
    if constexpr (kFetch == Fetch::kAhead) {
      prefetch_l2(line);
      line += 64;
      if (line == ahead->end) {
        ahead->advance();
        line = ahead->next_line;
      }
    }
    Pairs w[kVectors];
    for (int vector = 0; vector < kVectors; ++vector)
      w[vector] = load_pairs(weight + (pair * kBlockColumns + vector * kLanes) * 2);
    const Activation* three_rows = input.data + pair * 2;
    for (int row = 0; row < kRows; ++row) {
      // An address for every third row: the two after it are reached by addressing modes. Left to
      // itself the compiler keeps one for each row, and runs out of registers.
      if (row > 0 && row % 3 == 0) three_rows += stride_of_3;
      if (row % 3 == 0) keep_in_register(three_rows);
      const Pairs x = broadcast_pair(three_rows + row % 3 * stride);
      for (int vector = 0; vector < kVectors; ++vector) sum[row][vector] = dot_pairs(sum[row][vector], x, w[vector]);
    }
  }
  soon.next = next;
  if constexpr (kFetch == Fetch::kAhead) ahead->next_line = line;
  for (int row = 0; row < kRows; ++row)
    for (int vector = 0; vector < kVectors; ++vector)
      store(sums + row * kBlockColumns + vector * kLanes, sum[row][vector]);
}

void add_bias(float* sums, const float* bias) {
  for (int i = 0; i < kBlockColumns; i += kLanes) store(sums + i, load(sums + i) + load(bias + i));
}

template <Vec (*kActivation)(Vec)>
void store_gated(Activation* output, const float* sums) {
  for (int i = 0; i < kGatedColumns; i += kLanes)
    store_activation(output + i, kActivation(load(sums + i)) * load(sums + kGatedColumns + i));
}

// Hand over the sums of one row and one block.
void finish_block(const Gemm& gemm, int64_t row, int64_t block, float* sums) {
  if (gemm.linear->bias != nullptr) add_bias(sums, gemm.linear->bias + block * kBlockColumns);
  float* output = static_cast<float*>(gemm.output) + row * gemm.output_stride + block * kBlockColumns;
  Activation* gated_output = static_cast<Activation*>(gemm.output) + row * gemm.output_stride + block * kGatedColumns;
  switch (gemm.epilogue) {
    case Epilogue::kStore: {
      const int64_t num_columns = gemm.num_columns - block * kBlockColumns;
      if (num_columns >= kBlockColumns) {
        for (int i = 0; i < kBlockColumns; i += kLanes) store(output + i, load(sums + i));
      } else {
        std::copy(sums, sums + num_columns, output);
      }
      break;
    }
    case Epilogue::kAddResidual:
      for (int i = 0; i < kBlockColumns; i += kLanes) store(output + i, load(output + i) + load(sums + i));
      break;
    case Epilogue::kAddWeighted: {
      output = static_cast<float*>(gemm.output) + gemm.output_rows[row] * gemm.output_stride + block * kBlockColumns;
      const Vec weight = broadcast(gemm.row_weights[row]);
      for (int i = 0; i < kBlockColumns; i += kLanes) store(output + i, load(output + i) + weight * load(sums + i));
      break;
    }
    case Epilogue::kSilu:
      store_gated<silu>(gated_output, sums);
      break;
    case Epilogue::kGeluTanh:
      store_gated<gelu_tanh>(gated_output, sums);
      break;
  }
}

const uint8_t* block_weights(const OctavoLinear& linear, int64_t block) {
  return linear.weight + block * block_bytes(linear.format, linear.in_features);
}

struct BlockRange {
  int64_t begin;
  int64_t end;
};

BlockRange blocks_of_item(const GemmItems& items, int item) {
  const int64_t block_item = item % items.num_block_items;
  return {items.num_blocks * block_item / items.num_block_items,
          items.num_blocks * (block_item + 1) / items.num_block_items};
}

template <int kRows>
void run_tile(const Gemm& gemm, const Rows& input, int64_t row, int64_t block, Fetch fetch, Prefetch& soon,
              ReadAhead* ahead) {
  alignas(64) float sums[kRows * kBlockColumns];
  const int64_t num_pairs = divide_up(gemm.linear->in_features, 2);
  for (int column = 0; column < kBlockColumns; column += vectors_at_once(kRows) * kLanes) {
    const bf16* weight = reinterpret_cast<const bf16*>(block_weights(*gemm.linear, block)) + column * 2;
    switch (column == 0 ? fetch : Fetch::kNothing) {
      case Fetch::kNothing:
        multiply_rows<kRows, Fetch::kNothing>(input, weight, num_pairs, soon, ahead, sums + column);
        break;
      case Fetch::kNextBlock:
        multiply_rows<kRows, Fetch::kNextBlock>(input, weight, num_pairs, soon, ahead, sums);
        break;
      case Fetch::kPastCaches:
        multiply_rows<kRows, Fetch::kPastCaches>(input, weight, num_pairs, soon, ahead, sums);
        break;
      case Fetch::kAhead:
        multiply_rows<kRows, Fetch::kAhead>(input, weight, num_pairs, soon, ahead, sums);
        break;
    }
  }
  for (int r = 0; r < kRows; ++r) finish_block(gemm, row + r, block, sums + r * kBlockColumns);
}

// What a tile of a part fetches.
Fetch fetch_of_tile(int64_t tile, int64_t num_tiles, int64_t num_rows, const ReadAhead* ahead) {
  if (num_rows <= kRowsWithoutPrefetch) return Fetch::kNothing;
  if (num_tiles == 1 && kFetchesPastCaches) return Fetch::kPastCaches;
  if (tile < kTilesThatFetchWeights) return Fetch::kNextBlock;
  return ahead != nullptr && !ahead->is_done() ? Fetch::kAhead : Fetch::kNothing;
}

// Rows [begin, end) of some blocks: every block stays in cache for all rows, and the next one is
// fetched meanwhile, by the first two tiles of rows; the others read ahead. A single tile needs no block in cache.
void run_bf16_part(const Gemm& gemm, int64_t begin, int64_t end, const BlockRange& blocks, ReadAhead* ahead) {
  const int64_t num_tiles = divide_up(end - begin, kMaxTileRows);
  for (int64_t block = blocks.begin; block < blocks.end; ++block) {
    // A pair has 128 bytes in a block.
    Prefetch soon{reinterpret_cast<const char*>(block_weights(*gemm.linear, block + 1)), num_tiles == 1 ? 128 : 64};
    for (int64_t tile = 0; tile < num_tiles; ++tile) {
      const int64_t first = (end - begin) * tile / num_tiles;
      const int64_t count = (end - begin) * (tile + 1) / num_tiles - first;
      const Rows tile_rows{gemm.input + (begin + first) * gemm.input_stride, gemm.input_stride};
      const Fetch fetch = fetch_of_tile(tile, num_tiles, end - begin, ahead);
      dispatch_rows(static_cast<int>(count), [&](auto constant) {
        run_tile<constant()>(gemm, tile_rows, begin + first, block, fetch, soon, ahead);
      });
    }
  }
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
      for (int64_t row = 0; row < count; ++row)
        finish_block(gemm, begin + first + row, block, sums + row * kBlockColumns);
    }
  }
}

void run_part(const Gemm& gemm, int64_t begin, int64_t end, const BlockRange& blocks, ReadAhead* ahead) {
  if (is_quantized(*gemm.linear)) return run_quantized_part(gemm, begin, end, blocks, ahead);
  run_bf16_part(gemm, begin, end, blocks, ahead);
}

// How many rows stay in cache while the blocks pass.
int64_t rows_at_once(const OctavoLinear& linear) {
  const int64_t row_bytes = is_quantized(linear) ? quantized_row_bytes(linear.in_features)
                                                 : round_up(linear.in_features, 2) * int64_t{sizeof(Activation)};
  const int64_t rows_in_cache = kActivationBytesInCache / row_bytes / kMaxTileRows * kMaxTileRows;
  return std::clamp<int64_t>(rows_in_cache, kMaxTileRows, 8 * kMaxTileRows);
}

}  // namespace

GemmItems::GemmItems(int rows, const OctavoLinear& linear, bool gated, int num_threads) : num_rows(rows) {
  num_blocks = static_cast<int>(divide_up(linear.out_features, gated ? kGatedColumns : kBlockColumns));
  rows_per_item = static_cast<int>(rows_at_once(linear));
  num_row_items = static_cast<int>(divide_up(rows, rows_per_item));
  const int blocks_per_item = static_cast<int>(divide_up(num_blocks, kMostItemsPerThread * num_threads));
  num_block_items = static_cast<int>(divide_up(num_blocks, blocks_per_item));
}

bool is_quantized(const OctavoLinear& linear) { return linear.format != OCTAVO_WEIGHT_BF16; }

int64_t block_bytes(int32_t format, int64_t in_features) {
  if (format == OCTAVO_WEIGHT_BF16) return divide_up(in_features, 2) * kBlockColumns * 2 * sizeof(bf16);
  return divide_up(in_features, kGroup) * group_bytes(format);
}

void unpack_column(const OctavoLinear& linear, int64_t column, float* output) {
  const uint8_t* block = block_weights(linear, column / kBlockColumns);
  if (is_quantized(linear))
    return unpack_quantized(block, column % kBlockColumns, linear.format, linear.in_features, output);
  const bf16* pairs = reinterpret_cast<const bf16*>(block) + column % kBlockColumns * 2;
  for (int64_t i = 0; i < linear.in_features; ++i)
    output[i] = bf16_to_float(pairs[i / 2 * kBlockColumns * 2 + i % 2]);
}

MemoryRange weights_of_gemm_item(const Gemm& gemm, const GemmItems& items, int item) {
  const BlockRange blocks = blocks_of_item(items, item);
  const uint8_t* begin = block_weights(*gemm.linear, blocks.begin);
  return {reinterpret_cast<const char*>(begin), static_cast<size_t>(block_weights(*gemm.linear, blocks.end) - begin)};
}

void run_gemm_item(const Gemm& gemm, const GemmItems& items, int item, ReadAhead* ahead) {
  const BlockRange blocks = blocks_of_item(items, item);
  const int64_t begin = static_cast<int64_t>(item / items.num_block_items) * items.rows_per_item;
  run_part(gemm, begin, std::min<int64_t>(begin + items.rows_per_item, items.num_rows), blocks, ahead);
}

void run_gemm_blocks(const Gemm& gemm, int64_t begin, int64_t end) {
  const int64_t step = rows_at_once(*gemm.linear);
  for (int64_t row = 0; row < gemm.num_rows; row += step)
    run_part(gemm, row, std::min<int64_t>(row + step, gemm.num_rows), {begin, end}, nullptr);
}

}  // namespace octavo
