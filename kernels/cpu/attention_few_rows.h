// The products of attention for few rows, in vectors, with the bits that tile registers make.
//
// For one token most of a tile register is empty, which takes as long to load and to multiply as a full one. So few rows are
// multiplied in vectors. But a row's bits must not depend on how many rows attend with it: its sums are formed as tile
// registers form them (see amx_multiply), of the same groups of inputs, while SubnormalsAreZero lives.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "amx.h"
#include "attention_tile.h"
#include "simd.h"

namespace octavo {

// With more rows tile registers take less time.
constexpr int kFewRows = 4;

// Pairs of bf16 that lie side by side, as float32.
struct SplitPairs {
  Vec even;
  Vec odd;

  static SplitPairs load(const bf16* source) {
    IntVec pairs;
    std::memcpy(&pairs, source, sizeof pairs);
    return {from_bits(pairs << 16), from_bits(pairs & broadcast(static_cast<int32_t>(0xffff0000)))};
  }
};

// What one product of tile registers adds to a sum: the products of even inputs, and those of odd ones.
template <int kRows, int kVectors>
struct SplitSums {
  Vec even[kRows][kVectors] = {};
  Vec odd[kRows][kVectors] = {};

  void add(int row, int vector, const float* pair, const SplitPairs& pairs) {
    even[row][vector] = multiply_add(broadcast(pair[0]), pairs.even, even[row][vector]);
    odd[row][vector] = multiply_add(broadcast(pair[1]), pairs.odd, odd[row][vector]);
  }
  Vec total(int row, int vector) const { return even[row][vector] + odd[row][vector]; }
};

inline void widen(const Activation* source, int count, float* target) {
  for (int i = 0; i < count; i += kLanes) store(target + i, load_bf16(source + i));
}

// As TileProducts, but computed as soon as they are asked for.
template <int kRows>
class FewRowsProducts {
 public:
  static constexpr bool kOverlap = false;

  FewRowsProducts(const Activation* queries, int head_dim, int value_dim, bool /*fetches*/)
      : head_dim_(head_dim), value_dim_(value_dim) {
    for (int row = 0; row < kRows; ++row) widen(queries + row * kMaxHeadDim, head_dim, queries_ + row * kMaxHeadDim);
  }

  void start(const Tile* scored, float* scores, const Tile* valued, const Activation* weights, const float* factors,
             float* output) {
    if (scored != nullptr) score(*scored, scores);
    if (valued != nullptr) add_values(*valued, weights, factors, output);
  }
  void run(int /*part*/, int /*whole*/) {}

 private:
  static constexpr int kPagesAtOnce = 2;
  static constexpr int kVectorsAtOnce = 2;

  void score(const Tile& tile, float* scores) const {
    int page = 0;
    for (; page + kPagesAtOnce <= tile.num_pages; page += kPagesAtOnce)
      score_pages<kPagesAtOnce>(tile.keys + page, scores + page * kBlockTokens);
    if (page < tile.num_pages) score_pages<1>(tile.keys + page, scores + page * kBlockTokens);
  }

  template <int kPages>
  void score_pages(const bf16* const* pages, float* scores) const {
    Vec sums[kRows][kPages] = {};
    for (int begin = 0; begin < head_dim_; begin += kAmxInputs) {
      SplitSums<kRows, kPages> products;
      const int end = std::min(begin + kAmxInputs, head_dim_);
      for (int i = begin; i < end; i += 2) {
        for (int page = 0; page < kPages; ++page) {
          const SplitPairs keys = SplitPairs::load(pages[page] + i * kBlockTokens);
          prefetch_l2(pages[page] + (head_dim_ + i) * kBlockTokens);  // its values
          for (int row = 0; row < kRows; ++row) products.add(row, page, queries_ + row * kMaxHeadDim + i, keys);
        }
      }
      for (int row = 0; row < kRows; ++row)
        for (int page = 0; page < kPages; ++page) sums[row][page] = sums[row][page] + products.total(row, page);
    }
    for (int row = 0; row < kRows; ++row)
      for (int page = 0; page < kPages; ++page) store(scores + row * kTileKeys + page * kBlockTokens, sums[row][page]);
  }

  void add_values(const Tile& tile, const Activation* weights, const float* factors, float* output) const {
    alignas(64) float wide[kRows * kTileKeys];
    for (int row = 0; row < kRows; ++row)
      widen(weights + row * kTileKeys, tile.num_pages * kBlockTokens, wide + row * kTileKeys);
    int dim = 0;
    for (; dim + kVectorsAtOnce * kLanes <= value_dim_; dim += kVectorsAtOnce * kLanes)
      add_some_values<kVectorsAtOnce>(tile, wide, dim, factors, output);
    if (dim < value_dim_) add_some_values<1>(tile, wide, dim, factors, output);
  }

  template <int kVectors>
  void add_some_values(const Tile& tile, const float* weights, int dim, const float* factors, float* output) const {
    Vec sums[kRows][kVectors] = {};
    if (factors != nullptr)
      for (int row = 0; row < kRows; ++row)
        for (int vector = 0; vector < kVectors; ++vector)
          sums[row][vector] = load(output + row * output_stride_ + dim + vector * kLanes) * broadcast(factors[row]);
    for (int page = 0; page < tile.num_pages; ++page) {
      const bf16* values = tile.values[page] + dim * 2;
      const bf16* next_keys = tile.next_keys[page] + dim * 2;
      SplitSums<kRows, kVectors> products;
      for (int i = 0; i < kBlockTokens; i += 2) {
        for (int vector = 0; vector < kVectors; ++vector) {
          const int at = i * value_dim_ + vector * kLanes * 2;
          const SplitPairs pairs = SplitPairs::load(values + at);
          prefetch_l2(next_keys + at);
          for (int row = 0; row < kRows; ++row)
            products.add(row, vector, weights + row * kTileKeys + page * kBlockTokens + i, pairs);
        }
      }
      for (int row = 0; row < kRows; ++row)
        for (int vector = 0; vector < kVectors; ++vector)
          sums[row][vector] = sums[row][vector] + products.total(row, vector);
    }
    for (int row = 0; row < kRows; ++row)
      for (int vector = 0; vector < kVectors; ++vector)
        store(output + row * output_stride_ + dim + vector * kLanes, sums[row][vector]);
  }

  const int head_dim_;
  const int value_dim_;
  const int64_t output_stride_ = PartialRows::stride_of(value_dim_);
  alignas(64) float queries_[kRows * kMaxHeadDim];
};

}  // namespace octavo
