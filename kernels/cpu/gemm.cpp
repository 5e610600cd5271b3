#include "gemm.h"

#include <algorithm>

#include "activation.h"
#include "dispatch.h"

namespace octavo {
namespace {

constexpr int kVectorsPerBlock = kBlockColumns / kLanes;
// Few rows leave registers free to work on several blocks at once, which hides the latency of the
// sums: with one row a single block would be a chain of additions waiting for each other.
constexpr int kMaxBlocksAtOnce = kAccumulators / kVectorsPerBlock >= 8 ? 4 : kAccumulators / kVectorsPerBlock;
constexpr int64_t kActivationBytesInCache = 384 << 10;  // of the rows that an item reads again for every block

constexpr int blocks_at_once(int num_rows) {
  int blocks = kMaxBlocksAtOnce;
  while (blocks > 1 && num_rows * blocks * kVectorsPerBlock > kAccumulators) blocks /= 2;
  return blocks;
}

// The vectors of a block that so many rows leave registers for.
constexpr int vectors_at_once(int num_rows) {
  int vectors = kVectorsPerBlock;
  while (vectors > 1 && num_rows * vectors > kAccumulators) vectors /= 2;
  return vectors;
}

// The weights of a later block, fetched a piece at a time while this one is computed.
struct Prefetch {
  const char* next;
  int64_t bytes_per_pair;  // at most 128; 0 once everything is asked for
};

// sums[row][column] of `kRows` rows and `kBlocks` neighbouring blocks. The inputs are broadcast
// first: there are fewer rows than vectors of weights.
template <int kRows, int kBlocks>
void multiply_blocks(const bf16* input, int64_t input_stride, const bf16* weight, int64_t num_pairs, float* sums) {
  constexpr int kVectors = kBlocks * kVectorsPerBlock;
  const int64_t block_size = num_pairs * kBlockColumns * 2;
  Vec sum[kRows][kVectors];
  clear(sum);
  for (int64_t pair = 0; pair < num_pairs; ++pair) {
    Pairs x[kRows];
    for (int row = 0; row < kRows; ++row) x[row] = broadcast_pair(input + row * input_stride + pair * 2);
    for (int vector = 0; vector < kVectors; ++vector) {
      const bf16* block = weight + vector / kVectorsPerBlock * block_size + pair * kBlockColumns * 2;
      const Pairs w = load_pairs(block + vector % kVectorsPerBlock * kLanes * 2);
      for (int row = 0; row < kRows; ++row) sum[row][vector] = dot_pairs(sum[row][vector], x[row], w);
    }
  }
  for (int row = 0; row < kRows; ++row)
    for (int vector = 0; vector < kVectors; ++vector)
      store(sums + (row * kVectors + vector) * kLanes, sum[row][vector]);
}

// sums[row][column] of `kRows` rows and a part of a block, whose weights stay in registers while
// the rows pass.
template <int kRows>
void multiply_rows(const bf16* input, int64_t input_stride, const bf16* weight, int64_t num_pairs, Prefetch& soon,
                   float* sums) {
  constexpr int kVectors = vectors_at_once(kRows);
  Vec sum[kRows][kVectors];
  clear(sum);
  const int64_t stride_of_3 = 3 * input_stride;
  const char* next = soon.next;
  for (int64_t pair = 0; pair < num_pairs; ++pair) {
    prefetch_l2(next);
    prefetch_l2(next + 64);
    next += soon.bytes_per_pair;
    Pairs w[kVectors];
    for (int vector = 0; vector < kVectors; ++vector)
      w[vector] = load_pairs(weight + (pair * kBlockColumns + vector * kLanes) * 2);
    const bf16* three_rows = input + pair * 2;
    for (int row = 0; row < kRows; ++row) {
      // An address for every third row: the two after it are reached by addressing modes. Left to
      // itself the compiler keeps one for each row, and runs out of registers.
      if (row > 0 && row % 3 == 0) three_rows += stride_of_3;
      if (row % 3 == 0) keep_in_register(three_rows);
      const Pairs x = broadcast_pair(three_rows + row % 3 * input_stride);
      for (int vector = 0; vector < kVectors; ++vector) sum[row][vector] = dot_pairs(sum[row][vector], x, w[vector]);
    }
  }
  soon.next = next;
  for (int row = 0; row < kRows; ++row)
    for (int vector = 0; vector < kVectors; ++vector)
      store(sums + row * kBlockColumns + vector * kLanes, sum[row][vector]);
}

void add_bias(float* sums, const float* bias) {
  for (int i = 0; i < kBlockColumns; i += kLanes) store(sums + i, load(sums + i) + load(bias + i));
}

template <Vec (*kActivation)(Vec)>
void store_gated(bf16* output, const float* sums) {
  for (int i = 0; i < kGatedColumns; i += kLanes)
    store_bf16(output + i, kActivation(load(sums + i)) * load(sums + kGatedColumns + i));
}

// Hand over the sums of one row and one block.
void finish_block(const Gemm& gemm, int64_t row, int64_t block, float* sums) {
  if (gemm.linear->bias != nullptr) add_bias(sums, gemm.linear->bias + block * kBlockColumns);
  float* output = static_cast<float*>(gemm.output) + row * gemm.output_stride + block * kBlockColumns;
  bf16* gated_output = static_cast<bf16*>(gemm.output) + row * gemm.output_stride + block * kGatedColumns;
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

const bf16* block_weights(const Gemm& gemm, int64_t block) {
  return gemm.linear->weight + block * divide_up(gemm.linear->in_features, 2) * kBlockColumns * 2;
}

template <int kRows, int kBlocks>
void run_blocks(const Gemm& gemm, int64_t row, int64_t block) {
  alignas(64) float sums[kRows * kBlocks * kBlockColumns];
  multiply_blocks<kRows, kBlocks>(gemm.input + row * gemm.input_stride, gemm.input_stride, block_weights(gemm, block),
                                  divide_up(gemm.linear->in_features, 2), sums);
  for (int r = 0; r < kRows; ++r)
    for (int b = 0; b < kBlocks; ++b)
      finish_block(gemm, row + r, block + b, sums + (r * kBlocks + b) * kBlockColumns);
}

template <int kRows>
void run_rows(const Gemm& gemm, int64_t row, int64_t block, Prefetch& soon) {
  alignas(64) float sums[kRows * kBlockColumns];
  for (int column = 0; column < kBlockColumns; column += vectors_at_once(kRows) * kLanes) {
    if (column > 0) soon.bytes_per_pair = 0;
    multiply_rows<kRows>(gemm.input + row * gemm.input_stride, gemm.input_stride,
                         block_weights(gemm, block) + column * 2, divide_up(gemm.linear->in_features, 2), soon,
                         sums + column);
  }
  for (int r = 0; r < kRows; ++r) finish_block(gemm, row + r, block, sums + r * kBlockColumns);
}

// Rows [row, row + kRows), all there are, of blocks [block, end): several blocks at once. The
// weights are read once, in order, which the processor's own prefetching does best.
template <int kRows>
void run_few_rows(const Gemm& gemm, int64_t row, int64_t block, int64_t end) {
  constexpr int kBlocks = blocks_at_once(kRows);
  for (; block + kBlocks <= end; block += kBlocks) run_blocks<kRows, kBlocks>(gemm, row, block);
  if constexpr (kBlocks > 2) {
    for (; block + 2 <= end; block += 2) run_blocks<kRows, 2>(gemm, row, block);
  }
  for (; block < end; ++block) run_blocks<kRows, 1>(gemm, row, block);
}

// Rows [begin, end) of blocks [block, block_end): every block stays in cache for all rows, and the
// next one is fetched meanwhile.
void run_many_rows(const Gemm& gemm, int64_t begin, int64_t end, int64_t block, int64_t block_end) {
  const int64_t num_tiles = divide_up(end - begin, kMaxTileRows);
  for (; block < block_end; ++block) {
    Prefetch soon{reinterpret_cast<const char*>(block_weights(gemm, block + 1)), 0};
    for (int64_t tile = 0; tile < num_tiles; ++tile) {
      soon.bytes_per_pair = num_tiles == 1 ? 128 : tile < 2 ? 64 : 0;  // a pair has 128 bytes in a block
      const int64_t row = begin + (end - begin) * tile / num_tiles;
      const int64_t next_row = begin + (end - begin) * (tile + 1) / num_tiles;
      dispatch_rows(static_cast<int>(next_row - row), [&](auto rows) { run_rows<rows()>(gemm, row, block, soon); });
    }
  }
}

// Rows [begin, end) of blocks [block, block_end).
void run_part(const Gemm& gemm, int64_t row, int64_t row_end, int64_t block, int64_t block_end) {
  const int num_rows = static_cast<int>(row_end - row);
  if (num_rows <= kMaxTileRows && blocks_at_once(num_rows) > 1) {
    dispatch_rows(num_rows, [&](auto rows) { run_few_rows<rows()>(gemm, row, block, block_end); });
  } else {
    run_many_rows(gemm, row, row_end, block, block_end);
  }
}

// How many rows stay in cache while the blocks pass.
int64_t rows_at_once(const OctavoLinear& linear) {
  const int64_t row_bytes = round_up(linear.in_features, 2) * static_cast<int64_t>(sizeof(bf16));
  const int64_t rows_in_cache = kActivationBytesInCache / row_bytes / kMaxTileRows * kMaxTileRows;
  return std::clamp<int64_t>(rows_in_cache, kMaxTileRows, 8 * kMaxTileRows);
}

}  // namespace

GemmItems::GemmItems(int rows, const OctavoLinear& linear, bool gated, int num_threads) : num_rows(rows) {
  num_blocks = static_cast<int>(divide_up(linear.out_features, gated ? kGatedColumns : kBlockColumns));
  rows_per_item = static_cast<int>(rows_at_once(linear));
  num_row_items = static_cast<int>(divide_up(rows, rows_per_item));
  // As many items as threads, or a multiple of it, so that none is left alone with a last item.
  const int items = static_cast<int>(round_up(divide_up(num_blocks, kMaxBlocksAtOnce), num_threads));
  num_block_items = std::min(items, num_blocks);
}

void run_gemm_item(const Gemm& gemm, const GemmItems& items, int item) {
  const int64_t block_item = item % items.num_block_items;
  const int64_t row = static_cast<int64_t>(item / items.num_block_items) * items.rows_per_item;
  const int64_t row_end = std::min<int64_t>(row + items.rows_per_item, items.num_rows);
  const int64_t block = items.num_blocks * block_item / items.num_block_items;
  const int64_t block_end = items.num_blocks * (block_item + 1) / items.num_block_items;
  run_part(gemm, row, row_end, block, block_end);
}

void run_gemm_blocks(const Gemm& gemm, int64_t begin, int64_t end) {
  const int64_t step = rows_at_once(*gemm.linear);
  for (int64_t row = 0; row < gemm.num_rows; row += step)
    run_part(gemm, row, std::min<int64_t>(row + step, gemm.num_rows), begin, end);
}

}  // namespace octavo
