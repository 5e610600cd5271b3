#include "attention.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "dispatch.h"
#include "elementwise.h"

namespace octavo {
namespace {

constexpr int kTilePages = 8;
constexpr int kTileKeys = kTilePages * kBlockTokens;
constexpr int kVectorsPerPage = kBlockTokens / kLanes;
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// One query head of one token.
struct Row {
  const bf16* query;
  bf16* output;
  int begin;  // it sees keys [begin, end)
  int end;
};

// The pages of a tile, and those that come after, to be fetched meanwhile.
struct Tile {
  const bf16* keys[2 * kTilePages];
  int num_pages;
};

// The largest power of two of columns (vectors) that `rows` leave registers for.
constexpr int columns_at_once(int rows, int vectors_per_column, int most) {
  int columns = most;
  while (columns > 1 && rows * columns * vectors_per_column > kAccumulators) columns /= 2;
  return columns;
}

// scores[row][key] = scale * (query . key) for `kPages` pages. Queries are kMaxHeadDim apart.
template <int kRows, int kPages>
void score_pages(const bf16* queries, const bf16* const* pages, int head_dim, Vec scale, float* scores) {
  constexpr int kVectors = kPages * kVectorsPerPage;
  Vec sums[kRows][kVectors];
  clear(sums);
  for (int i = 0; i < head_dim; i += 2) {
    Pairs key[kVectors];
    for (int vector = 0; vector < kVectors; ++vector) {
      const bf16* page = pages[vector / kVectorsPerPage] + i * kBlockTokens;
      key[vector] = load_pairs(page + vector % kVectorsPerPage * kLanes * 2);
    }
    for (int page = 0; page < kPages; ++page) prefetch(pages[page + kPages] + i * kBlockTokens);
    for (int row = 0; row < kRows; ++row) {
      const Pairs query = broadcast_pair(queries + row * kMaxHeadDim + i);
      for (int vector = 0; vector < kVectors; ++vector)
        sums[row][vector] = dot_pairs(sums[row][vector], query, key[vector]);
    }
  }
  for (int row = 0; row < kRows; ++row)
    for (int vector = 0; vector < kVectors; ++vector)
      store(scores + row * kTileKeys + vector * kLanes, sums[row][vector] * scale);
}

template <int kRows>
void score_tile(const bf16* queries, const Tile& tile, int head_dim, Vec scale, float* scores) {
  constexpr int kPages = columns_at_once(kRows, kVectorsPerPage, kTilePages);
  int page = 0;
  for (; page + kPages <= tile.num_pages; page += kPages)
    score_pages<kRows, kPages>(queries, tile.keys + page, head_dim, scale, scores + page * kBlockTokens);
  for (; page < tile.num_pages; ++page)
    score_pages<kRows, 1>(queries, tile.keys + page, head_dim, scale, scores + page * kBlockTokens);
}

// The running softmax of one row: weights are 2^(score - largest).
struct Softmax {
  float largest = kMinusInfinity;
  float total = 0.0f;

  // Turn the scores of a tile, of which the row sees [begin, end), into weights. Returns by what
  // all that was summed up before must be multiplied.
  float add_tile(float* scores, bf16* weights, int begin, int end, int num_keys) {
    if (begin >= end) {
      std::fill(weights, weights + num_keys, bf16{0});
      return 1.0f;
    }
    std::fill(scores, scores + begin, kMinusInfinity);
    std::fill(scores + end, scores + num_keys, kMinusInfinity);
    Vec tile_largest = load(scores);
    for (int i = kLanes; i < num_keys; i += kLanes) tile_largest = maximum(tile_largest, load(scores + i));
    const float old_largest = largest;
    largest = std::max(largest, max_lanes(tile_largest));
    Vec sum = {};
    for (int i = 0; i < num_keys; i += kLanes) {
      const Vec weight = exp2(load(scores + i) - broadcast(largest));
      sum = sum + weight;
      store_bf16(weights + i, weight);
    }
    const float factor = exp2(broadcast(old_largest - largest))[0];
    total = total * factor + sum_lanes(sum);
    return factor;
  }
};

// output[row][d] = output[row][d] * factor[row] + sum over keys of weight * value, for `kVectors`
// vectors of the head's dimensions.
template <int kRows, int kVectors>
void add_values(const Tile& tile, const bf16* weights, int head_dim, int dim, const float* factors, float* output) {
  const int64_t page_size = static_cast<int64_t>(head_dim) * kBlockTokens;
  Vec sums[kRows][kVectors];
  for (int row = 0; row < kRows; ++row)
    for (int vector = 0; vector < kVectors; ++vector)
      sums[row][vector] = load(output + row * kMaxHeadDim + dim + vector * kLanes) * broadcast(factors[row]);
  for (int page = 0; page < tile.num_pages; ++page) {
    const bf16* values = tile.keys[page] + page_size + dim * 2;
    const bf16* later_values = tile.keys[page + 2] + page_size + dim * 2;
    for (int pair = 0; pair < kBlockTokens / 2; ++pair) {
      Pairs value[kVectors];
      for (int vector = 0; vector < kVectors; ++vector) {
        value[vector] = load_pairs(values + (pair * head_dim + vector * kLanes) * 2);
        prefetch(later_values + (pair * head_dim + vector * kLanes) * 2);
      }
      for (int row = 0; row < kRows; ++row) {
        const Pairs weight = broadcast_pair(weights + row * kTileKeys + page * kBlockTokens + pair * 2);
        for (int vector = 0; vector < kVectors; ++vector)
          sums[row][vector] = dot_pairs(sums[row][vector], weight, value[vector]);
      }
    }
  }
  for (int row = 0; row < kRows; ++row)
    for (int vector = 0; vector < kVectors; ++vector)
      store(output + row * kMaxHeadDim + dim + vector * kLanes, sums[row][vector]);
}

// Pages [start, start + 16) of the sequence, the last one repeated where it has no more.
Tile load_tile(const KvHead& kv, int start, int end) {
  Tile tile;
  const int first_page = start / kBlockTokens;
  const int last_page = (end - 1) / kBlockTokens;
  for (int i = 0; i < 2 * kTilePages; ++i)
    tile.keys[i] = kv.pages + kv.block_table[std::min(first_page + i, last_page)] * kv.block_stride;
  tile.num_pages = std::min(kTilePages, last_page - first_page + 1);
  return tile;
}

template <int kRows>
void attend_rows(const OctavoOp& op, const KvHead& kv, const Row* rows) {
  constexpr int kVectors = columns_at_once(kRows, 1, 4);
  // Copied so that they lie at distances known to the compiler.
  alignas(64) bf16 queries[kRows * kMaxHeadDim];
  for (int row = 0; row < kRows; ++row)
    std::copy(rows[row].query, rows[row].query + op.head_dim, queries + row * kMaxHeadDim);
  alignas(64) float scores[kRows * kTileKeys];
  alignas(64) bf16 weights[kRows * kTileKeys];
  alignas(64) float output[kRows * kMaxHeadDim] = {};
  float factors[kRows];
  Softmax softmax[kRows];
  const Vec scale = broadcast(op.scale * 1.44269504f);
  int begin = rows[0].begin, end = rows[0].end;
  for (int row = 1; row < kRows; ++row) {
    begin = std::min(begin, rows[row].begin);
    end = std::max(end, rows[row].end);
  }
  for (int start = begin / kTileKeys * kTileKeys; start < end; start += kTileKeys) {
    const Tile tile = load_tile(kv, start, end);
    const int num_keys = tile.num_pages * kBlockTokens;
    score_tile<kRows>(queries, tile, op.head_dim, scale, scores);
    for (int row = 0; row < kRows; ++row)
      factors[row] = softmax[row].add_tile(scores + row * kTileKeys, weights + row * kTileKeys,
                                           std::clamp(rows[row].begin - start, 0, num_keys),
                                           std::clamp(rows[row].end - start, 0, num_keys), num_keys);
    int dim = 0;
    for (; dim + kVectors * kLanes <= op.head_dim; dim += kVectors * kLanes)
      add_values<kRows, kVectors>(tile, weights, op.head_dim, dim, factors, output);
    for (; dim < op.head_dim; dim += kLanes)
      add_values<kRows, 1>(tile, weights, op.head_dim, dim, factors, output);
  }
  for (int row = 0; row < kRows; ++row) {
    const Vec factor = broadcast(1.0f / softmax[row].total);
    // Adding zero turns -0 into 0: a sum of zeros may have either sign.
    for (int dim = 0; dim < op.head_dim; dim += kLanes)
      store_bf16(rows[row].output + dim, load(output + row * kMaxHeadDim + dim) * factor + Vec{});
  }
}

}  // namespace

void attend(const OctavoOp& op, const KvHead& kv, const AttentionItem& item, const bf16* queries, bf16* output,
            int64_t stride) {
  const int group = op.num_heads / op.num_kv_heads;
  const int num_rows = item.num_tokens * group;
  const int num_tiles = static_cast<int>(divide_up(num_rows, kMaxTileRows));
  for (int tile = 0; tile < num_tiles; ++tile) {
    const int first = num_rows * tile / num_tiles;
    const int count = num_rows * (tile + 1) / num_tiles - first;
    Row rows[kMaxTileRows];
    for (int i = 0; i < count; ++i) {
      const int token = (first + i) / group;
      const int64_t offset = token * stride + (first + i) % group * op.head_dim;
      const int end = item.first_position + token + 1;
      rows[i] = {queries + offset, output + offset, op.window > 0 ? std::max(0, end - op.window) : 0, end};
    }
    dispatch_rows(count, [&](auto constant) { attend_rows<constant()>(op, kv, rows); });
  }
}

}  // namespace octavo
