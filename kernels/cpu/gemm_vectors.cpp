// Linear layers over bf16 weights, in vectors.
#include <optional>

#include "aligned.h"
#include "decompressor.h"
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
// Up to so many rows a whole step is decompressed at once: few have little to do meanwhile, and short vectors have loops enough.
constexpr int kRowsOfStep = kLanes == 16 ? 2 : kMaxTileRows;
constexpr int64_t kBytesAhead = 12 << 10;  // where a tile fetches what it reads itself

// The vectors of a block that so many rows leave registers for.
constexpr int vectors_at_once(int num_rows) {
  int vectors = kVectorsPerBlock;
  while (vectors > 1 && num_rows * vectors > kAccumulators) vectors /= 2;
  return vectors;
}

// Weights that are fetched a piece at a time while others are multiplied.
struct Prefetch {
  const char* next;
  int64_t bytes_per_pair;  // at most 128
};

// What is fetched while rows are multiplied: weights of the next block; those a little ahead, and these past the caches behind
// the first one; or what is read after this. One line a pair is what a core can wait for beside its own reading.
enum class Fetch { kNothing, kNextBlock, kSoon, kSoonPastCaches, kAhead };

// The weights of a block as they are packed, all pairs of inputs at once.
struct PlainPairs {
  static constexpr bool kAreInMemory = true;
  int64_t pairs_at_once() const { return num_pairs; }
  const bf16* next() const { return weights; }

  const bf16* weights;
  int64_t num_pairs;
};

// Compressed ones, few groups at once, so that a core can decompress some while it multiplies those before: behind these, or in
// their place, which stays in the first cache then.
template <int kGroups>
struct DecompressedPairs {
  static constexpr bool kAreInMemory = false;
  int64_t pairs_at_once() const { return kGroups * CompressedGroup::kWeights / (2 * kBlockColumns); }
  const bf16* next() {
    bf16* const groups = place;
    source.write_next<kGroups>(groups);
    if (!are_read_once) place += kGroups * CompressedGroup::kWeights;
    return groups;
  }

  Decompressor source;
  bf16* place;
  bool are_read_once;
};

// sums[row][column] of `kRows` rows and a part of a block, whose weights stay in registers while
// the rows pass. The part begins with column `column`.
template <int kRows, Fetch kFetch, class Weights>
void multiply_rows(const Rows& input, Weights& weights, int column, int64_t num_pairs, Prefetch& soon, ReadAhead* ahead,
                   float* sums) {
  constexpr int kVectors = vectors_at_once(kRows);
  Vec sum[kRows][kVectors];
  clear(sum);
  const int64_t stride = input.stride;
  const int64_t stride_of_3 = 3 * stride;
  const char* next = soon.next;
  const char* line = kFetch == Fetch::kAhead ? ahead->next_line : nullptr;
  const Activation* x_of_pair = input.data;
  int64_t left = num_pairs;
  do {
    const bf16* weight = weights.next() + column * 2;
    const Activation* const end = x_of_pair + std::min(left, weights.pairs_at_once()) * 2;
    do {
      if constexpr (kFetch == Fetch::kSoonPastCaches) {
        prefetch_past_caches(next);
        prefetch_past_caches(next + 64);
        next += soon.bytes_per_pair;
      }
      if constexpr (kFetch == Fetch::kNextBlock) {
        prefetch_l2(next);
        prefetch_l2(next + 64);
        next += soon.bytes_per_pair;
        if constexpr (kRows <= kRowsNearlyFree && Weights::kAreInMemory) {
          prefetch(weight + kPairsAhead * kBlockColumns * 2);
          prefetch(weight + kPairsAhead * kBlockColumns * 2 + kBlockColumns);
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
      for (int vector = 0; vector < kVectors; ++vector) w[vector] = load_pairs(weight + vector * kLanes * 2);
      const Activation* three_rows = x_of_pair;
      for (int row = 0; row < kRows; ++row) {
        // An address for every third row: the two after it are reached by addressing modes. Left to
        // itself the compiler keeps one for each row, and runs out of registers.
        if (row > 0 && row % 3 == 0) three_rows += stride_of_3;
        if (row % 3 == 0) keep_in_register(three_rows);
        const Pairs x = broadcast_pair(three_rows + row % 3 * stride);
        for (int vector = 0; vector < kVectors; ++vector) sum[row][vector] = dot_pairs(sum[row][vector], x, w[vector]);
      }
      x_of_pair += 2;
      weight += kBlockColumns * 2;
    } while (x_of_pair != end);
    left -= weights.pairs_at_once();
  } while (left > 0);
  soon.next = next;
  if constexpr (kFetch == Fetch::kAhead) ahead->next_line = line;
  for (int row = 0; row < kRows; ++row)
    for (int vector = 0; vector < kVectors; ++vector)
      store(sums + row * kBlockColumns + column + vector * kLanes, sum[row][vector]);
}

// The two kinds of weights, plain and compressed. The first tile of rows reads a block's by `first`, and what reads them again
// then, later tiles or another part of its columns, by `again`.

class PlainWeights {
 public:
  explicit PlainWeights(const OctavoLinear& linear) : linear_(linear), num_pairs_(divide_up(linear.in_features, 2)) {}

  // What a tile that has the weights for itself fetches.
  static Fetch fetch_of_only_tile(int64_t num_rows) {
    if (num_rows <= kRowsWithoutPrefetch) return Fetch::kNothing;
    return kFetchesPastCaches ? Fetch::kSoonPastCaches : Fetch::kNextBlock;
  }

  template <int kRows>
  PlainPairs first(int64_t block, bool /*are_read_once*/) const {
    return again(block);
  }
  PlainPairs again(int64_t block) const {
    return {reinterpret_cast<const bf16*>(block_weights(linear_, block)), num_pairs_};
  }

 private:
  const OctavoLinear& linear_;
  const int64_t num_pairs_;
};

// The first reader decompresses a block into a buffer.
class CompressedWeights {
 public:
  explicit CompressedWeights(const OctavoLinear& linear) : linear_(linear), num_pairs_(divide_up(linear.in_features, 2)) {
    const size_t size = divide_up(linear.in_features, kCompressedInputs) * kStepWeights;
    thread_local LineVector<bf16> buffer;
    if (buffer.size() < size) buffer.resize(size);
    buffer_ = buffer.data();
  }

  // Past the second cache they would come too late: a core waits for fewer lines there.
  static Fetch fetch_of_only_tile(int64_t /*num_rows*/) { return Fetch::kSoon; }

  template <int kRows>
  DecompressedPairs<kRows <= kRowsOfStep ? kGroupsPerStep : 1> first(int64_t block, bool are_read_once) const {
    return {Decompressor(block_weights(linear_, block), 1, linear_.in_features), buffer_, are_read_once};
  }
  PlainPairs again(int64_t /*block*/) const { return {buffer_, num_pairs_}; }

 private:
  const OctavoLinear& linear_;
  const int64_t num_pairs_;
  bf16* buffer_;
};

template <int kRows, class Pairs>
void multiply_rows(const Rows& input, Pairs weights, int column, int64_t num_pairs, Fetch fetch, Prefetch& soon,
                   ReadAhead* ahead, float* sums) {
  switch (fetch) {
    case Fetch::kNothing:
      return multiply_rows<kRows, Fetch::kNothing>(input, weights, column, num_pairs, soon, ahead, sums);
    case Fetch::kNextBlock:
    case Fetch::kSoon:
      return multiply_rows<kRows, Fetch::kNextBlock>(input, weights, column, num_pairs, soon, ahead, sums);
    case Fetch::kSoonPastCaches:
      return multiply_rows<kRows, Fetch::kSoonPastCaches>(input, weights, column, num_pairs, soon, ahead, sums);
    case Fetch::kAhead:
      return multiply_rows<kRows, Fetch::kAhead>(input, weights, column, num_pairs, soon, ahead, sums);
  }
}

// What sums will be added to is fetched while they are formed.
void fetch_output(const Gemm& gemm, int64_t row, int num_rows, int64_t block) {
  constexpr int64_t kBytes = kBlockColumns * sizeof(float);
  for (int r = 0; r < num_rows; ++r) {
    const char* const output = output_of(gemm, row + r, block);
    for (int64_t line = 0; line < kBytes; line += kLineBytes) prefetch_to_write(output + line);
  }
}

// The first or a later tile of rows of a block.
template <int kRows, class Weights>
void run_tile(const Gemm& gemm, const Rows& input, int64_t row, int64_t block, const Weights& weights, int64_t tile,
              int64_t num_tiles, Fetch fetch, Prefetch& soon, ReadAhead* ahead) {
  alignas(64) float sums[kRows * kBlockColumns];
  const int64_t num_pairs = divide_up(gemm.linear->in_features, 2);
  constexpr int kColumnsAtOnce = vectors_at_once(kRows) * kLanes;
  if (kRows > kRowsNearlyFree && gemm.epilogue == Epilogue::kAddResidual) fetch_output(gemm, row, kRows, block);
  if (tile == 0) {
    const bool are_read_once = num_tiles == 1 && kColumnsAtOnce == kBlockColumns;
    multiply_rows<kRows>(input, weights.template first<kRows>(block, are_read_once), 0, num_pairs, fetch, soon, ahead, sums);
  } else {
    multiply_rows<kRows>(input, weights.again(block), 0, num_pairs, fetch, soon, ahead, sums);
  }
  for (int column = kColumnsAtOnce; column < kBlockColumns; column += kColumnsAtOnce) {
    PlainPairs pairs = weights.again(block);
    multiply_rows<kRows, Fetch::kNothing>(input, pairs, column, num_pairs, soon, ahead, sums);
  }
  finish_rows(gemm, row, kRows, block, sums);
}

// What one of several tiles fetches.
Fetch fetch_of_tile(int64_t tile, int64_t tiles_that_fetch_weights, const ReadAhead* ahead) {
  if (tile < tiles_that_fetch_weights) return Fetch::kNextBlock;
  return ahead != nullptr && !ahead->is_done() ? Fetch::kAhead : Fetch::kNothing;
}

// Rows [begin, end) of some blocks: every block stays in cache for all rows, and the next one is
// fetched meanwhile, by the first two tiles of rows; the others read ahead. A single tile needs no block in cache.
template <class Weights>
void run_part(const Gemm& gemm, int64_t begin, int64_t end, const BlockRange& blocks, ReadAhead* ahead) {
  const OctavoLinear& linear = *gemm.linear;
  const int64_t num_tiles = divide_up(end - begin, kMaxTileRows);
  const int64_t num_pairs = divide_up(linear.in_features, 2);
  const bool has_adapters = gemm.adapters != nullptr;  // one of two tiles is for them
  const int64_t tiles_that_fetch_weights = has_adapters && num_tiles == 2 ? 1 : std::min<int64_t>(num_tiles, kTilesThatFetchWeights);
  const int64_t bytes_per_pair = divide_up(block_bytes(linear.format, linear.in_features),
                                           num_pairs * tiles_that_fetch_weights);
  const Fetch of_only_tile = Weights::fetch_of_only_tile(end - begin);
  const bool fetches_soon = num_tiles == 1 && (of_only_tile == Fetch::kSoon || of_only_tile == Fetch::kSoonPastCaches);
  const Weights weights(linear);
  std::optional<StripesAhead> stripes;
  if (has_adapters && num_tiles > 1) ahead = &stripes.emplace(*gemm.adapters, ahead);
  for (int64_t block = blocks.begin; block < blocks.end; ++block) {
    if (stripes) stripes->start(begin, end, block + 1);
    if (has_adapters && num_tiles == 1) fetch_stripes(*gemm.adapters, begin, end, block + 1);
    const uint8_t* const fetched =
        fetches_soon ? block_weights(linear, block) + kBytesAhead : block_weights(linear, block + 1);
    Prefetch soon{reinterpret_cast<const char*>(fetched), bytes_per_pair};
    for (int64_t tile = 0; tile < num_tiles; ++tile) {
      const int64_t first = (end - begin) * tile / num_tiles;
      const int64_t count = (end - begin) * (tile + 1) / num_tiles - first;
      const Rows tile_rows{gemm.input + (begin + first) * gemm.input_stride, gemm.input_stride};
      const Fetch fetch = num_tiles == 1 ? of_only_tile : fetch_of_tile(tile, tiles_that_fetch_weights, ahead);
      dispatch_rows(static_cast<int>(count), [&](auto constant) {
        run_tile<constant()>(gemm, tile_rows, begin + first, block, weights, tile, num_tiles, fetch, soon, ahead);
      });
    }
  }
}

}  // namespace

void run_bf16_part(const Gemm& gemm, int64_t begin, int64_t end, const BlockRange& blocks, ReadAhead* ahead) {
  if (gemm.linear->format == OCTAVO_WEIGHT_COMPRESSED) return run_part<CompressedWeights>(gemm, begin, end, blocks, ahead);
  run_part<PlainWeights>(gemm, begin, end, blocks, ahead);
}

}  // namespace octavo
#endif
