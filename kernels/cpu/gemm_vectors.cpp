// Linear layers over bf16 weights, in vectors.
#include "dispatch.h"
#include "gemm_part.h"

#if !defined(OCTAVO_AMX)
namespace octavo {
namespace {

constexpr int kVectorsPerBlock = kBlockColumns / kLanes;
// Where so few rows have their weights fetched, they are also brought from the second cache to the first, so far ahead.
constexpr int kPairsAhead = 16;
// Weights that one tile reads, and no other, need no place in the caches behind the first one. AMD's cores then read
// them faster; Intel's were not tried.
const bool kFetchesPastCaches = vendor() == Vendor::kAmd;
constexpr int kPairsAheadPastCaches = 96;  // 12 KiB

// The vectors of a block that so many rows leave registers for.
constexpr int vectors_at_once(int num_rows) {
  int vectors = kVectorsPerBlock;
  while (vectors > 1 && num_rows * vectors > kAccumulators) vectors /= 2;
  return vectors;
}

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

}  // namespace

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

}  // namespace octavo
#endif
