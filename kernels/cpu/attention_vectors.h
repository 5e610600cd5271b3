// The products of attention in vectors.
#pragma once

#include <cstdint>

#include "attention_tile.h"
#include "simd.h"

namespace octavo {

// What floating-point numbers are like while rows attend: as everywhere else.
struct AttentionFloatMode {
  AttentionFloatMode() {}
};

constexpr int kVectorsPerPage = kBlockTokens / kLanes;

// The largest power of two of columns (vectors) that `rows` leave registers for.
constexpr int columns_at_once(int rows, int vectors_per_column, int most) {
  int columns = most;
  while (columns > 1 && rows * columns * vectors_per_column > kAccumulators) columns /= 2;
  return columns;
}

// scores[row][key] = query . key for `kPages` pages. Queries are kMaxHeadDim apart.
template <int kRows, int kPages>
void score_pages(const Activation* queries, const bf16* const* pages, int head_dim, float* scores) {
  constexpr int kVectors = kPages * kVectorsPerPage;
  Vec sums[kRows][kVectors];
  clear(sums);
  assume(head_dim > 0);
  for (int i = 0; i < head_dim; i += 2) {
    Pairs key[kVectors];
    for (int vector = 0; vector < kVectors; ++vector) {
      const bf16* page = pages[vector / kVectorsPerPage] + i * kBlockTokens;
      key[vector] = load_pairs(page + vector % kVectorsPerPage * kLanes * 2);
    }
    for (int page = 0; page < kPages; ++page) prefetch_l2(pages[page] + (head_dim + i) * kBlockTokens);  // its values
    for (int row = 0; row < kRows; ++row) {
      const Pairs query = broadcast_pair(queries + row * kMaxHeadDim + i);
      for (int vector = 0; vector < kVectors; ++vector)
        sums[row][vector] = dot_pairs(sums[row][vector], query, key[vector]);
    }
  }
  for (int row = 0; row < kRows; ++row)
    for (int vector = 0; vector < kVectors; ++vector)
      store(scores + row * kTileKeys + vector * kLanes, sums[row][vector]);
}

// The products of weights and values for `kVectors` vectors of the head's dimensions, added to `output` times `factors`, or without
// any in place of what it holds.
template <int kRows, int kVectors, bool kHasFactors>
void add_some_values(const Tile& tile, const Activation* weights, int value_dim, int dim, const float* factors,
                     float* output, int64_t output_stride) {
  Vec sums[kRows][kVectors];
  if constexpr (kHasFactors) {
    for (int row = 0; row < kRows; ++row)
      for (int vector = 0; vector < kVectors; ++vector)
        sums[row][vector] = load(output + row * output_stride + dim + vector * kLanes) * broadcast(factors[row]);
  } else {
    clear(sums);
  }
  assume(tile.num_pages > 0);
  for (int page = 0; page < tile.num_pages; ++page) {
    const bf16* values = tile.values[page] + dim * 2;
    const bf16* next_keys = tile.next_keys[page] + dim * 2;
    for (int pair = 0; pair < kBlockTokens / 2; ++pair) {
      Pairs value[kVectors];
      for (int vector = 0; vector < kVectors; ++vector) {
        value[vector] = load_pairs(values + (pair * value_dim + vector * kLanes) * 2);
        prefetch_l2(next_keys + (pair * value_dim + vector * kLanes) * 2);
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
      store(output + row * output_stride + dim + vector * kLanes, sums[row][vector]);
}

// The same where both products take the units that the softmax takes, too: they are computed as soon as they are asked for.
template <int kRows>
class Products {
 public:
  static constexpr bool kOverlap = false;

  Products(const Activation* queries, int head_dim, int value_dim, bool /*fetches*/)
      : queries_(queries), head_dim_(head_dim), value_dim_(value_dim) {}

  void start(const Tile* scored, float* scores, const Tile* valued, const Activation* weights, const float* factors,
             float* output) {
    if (scored != nullptr) score(*scored, scores);
    if (valued != nullptr) add_values(*valued, weights, factors, output);
  }
  void run(int /*part*/, int /*whole*/) {}

 private:
  void score(const Tile& tile, float* scores) const {
    constexpr int kPages = columns_at_once(kRows, kVectorsPerPage, kTilePages);
    int page = 0;
    for (; page + kPages <= tile.num_pages; page += kPages)
      score_pages<kRows, kPages>(queries_, tile.keys + page, head_dim_, scores + page * kBlockTokens);
    for (; page < tile.num_pages; ++page)
      score_pages<kRows, 1>(queries_, tile.keys + page, head_dim_, scores + page * kBlockTokens);
  }

  void add_values(const Tile& tile, const Activation* weights, const float* factors, float* output) const {
    constexpr int kVectors = columns_at_once(kRows, 1, 4);
    int dim = 0;
    for (; dim + kVectors * kLanes <= value_dim_; dim += kVectors * kLanes)
      add_some_values<kVectors>(tile, weights, dim, factors, output);
    for (; dim < value_dim_; dim += kLanes) add_some_values<1>(tile, weights, dim, factors, output);
  }

  // Two functions: in one, the compiler would move the sums through memory where its two ways meet.
  template <int kVectors>
  void add_some_values(const Tile& tile, const Activation* weights, int dim, const float* factors, float* output) const {
    if (factors == nullptr)
      return octavo::add_some_values<kRows, kVectors, false>(tile, weights, value_dim_, dim, nullptr, output, output_stride_);
    octavo::add_some_values<kRows, kVectors, true>(tile, weights, value_dim_, dim, factors, output, output_stride_);
  }

  const Activation* const queries_;
  const int head_dim_;
  const int value_dim_;
  const int64_t output_stride_ = PartialRows::stride_of(value_dim_);
};

}  // namespace octavo
