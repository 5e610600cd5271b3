// The products of attention in the tile registers of AMX.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "aligned.h"
#include "amx.h"
#include "attention_few_rows.h"
#include "attention_tile.h"

namespace octavo {

using AttentionFloatMode = SubnormalsAreZero;

// The products of one tile of keys and queries, and of another one's weights and values, cut into slices of one page and at
// most four tiles of dimensions. Whoever has work for the other units calls `run` again and again.
//
// queries   [kRows, kMaxHeadDim]
// scores    [kRows, kTileKeys], scores[row][key] = query . key
// weights   [kRows, kTileKeys]
// output    of PartialRows: output[row] = output[row] * factors[row] + sum over keys of weight * value; where
//           `factors` is null there is nothing in it yet
template <int kRows>
class TileProducts {
 public:
  // Tiles and vectors are multiplied by different units of a core, so products run beside the softmax of another tile of keys.
  static constexpr bool kOverlap = true;

  // Pages are fetched ahead where it `fetches`.
  TileProducts(const Activation* queries, int head_dim, int value_dim, bool fetches)
      : queries_(queries), head_dim_(head_dim), value_dim_(value_dim), fetches_(fetches) {}

  // What to compute next; slices that are left over are forgotten. Of either tile there may be none.
  void start(const Tile* scored, float* scores, const Tile* valued, const Activation* weights, const float* factors,
             float* output) {
    scored_ = scored;
    scores_ = scores;
    valued_ = valued;
    weights_ = weights;
    output_ = output;
    is_first_ = factors == nullptr;
    num_score_slices_ = scored == nullptr ? 0 : scored->num_pages;
    num_slices_ = num_score_slices_ + (valued == nullptr ? 0 : num_dim_groups() * valued->num_pages);
    next_ = 0;
    if (valued != nullptr && !is_first_) scale_output(factors);
  }

  // Compute until `part` of `whole` is done.
  void run(int part, int whole) {
    const int end = num_slices_ * part / whole;
    for (; next_ < end; ++next_) {
      if (next_ < num_score_slices_) {
        score_page(next_);
      } else {
        add_page(next_ - num_score_slices_);
      }
    }
  }

 private:
  static constexpr int kDimsAtOnce = 4 * kAmxColumns;
  static constexpr int64_t kQueryBytes = kMaxHeadDim * sizeof(Activation);
  static constexpr int64_t kPageRowBytes = kBlockTokens * 2 * sizeof(bf16);
  static constexpr int kPagesAhead = 4;
  static constexpr int kLineElements = kLineBytes / sizeof(bf16);
  static constexpr int kFetchedElements = 4 * kLineElements;

  // Groups of four tiles of dimensions, and then single tiles.
  int num_dim_groups() const { return value_dim_ / kDimsAtOnce + value_dim_ % kDimsAtOnce / kAmxColumns; }

  void scale_output(const float* factors) {
    for (int row = 0; row < kRows; ++row) {
      if (factors[row] == 1.0f) continue;
      float* sums = output_ + row * output_stride_;
      for (int dim = 0; dim < value_dim_; dim += kLanes) store(sums + dim, load(sums + dim) * broadcast(factors[row]));
    }
  }

  void score_page(int page) {
    constexpr int kStep = kAmxInputs;
    const bf16* keys = scored_->keys[page];
    const bool is_first = page == 0;
    if (fetches_) fetch_ahead(page);
    amx_clear<0>();
    // The first queries stay in registers for all pages.
    if (kStep <= head_dim_) score_step<1>(keys, 0, is_first);
    if (2 * kStep <= head_dim_) score_step<2>(keys, kStep, is_first);
    if (3 * kStep <= head_dim_) score_step<3>(keys, 2 * kStep, is_first);
    int dim = std::min(3 * kStep, head_dim_ / kStep * kStep);
    for (; dim + kStep <= head_dim_; dim += kStep) score_step<4>(keys, dim, true);
    if (dim < head_dim_) {
      amx_load<5>(queries_ + dim, kQueryBytes);
      amx_load<7, false>(keys + dim * kBlockTokens, kPageRowBytes);
      amx_multiply<0, 5, 7>();
    }
    amx_store<0>(scores_ + page * kBlockTokens, kTileKeys * sizeof(float));
  }

  template <int kTile>
  void score_step(const bf16* keys, int dim, bool loads_queries) {
    if (loads_queries) amx_load<kTile>(queries_ + dim, kQueryBytes);
    amx_load<6, false>(keys + dim * kBlockTokens, kPageRowBytes);
    amx_multiply<0, kTile, 6>();
  }

  void add_page(int slice) {
    const int group = slice / valued_->num_pages, page = slice % valued_->num_pages;
    const int num_whole = value_dim_ / kDimsAtOnce;
    if (group < num_whole) {
      add_page<true>(page, group * kDimsAtOnce);
    } else {
      add_page<false>(page, num_whole * kDimsAtOnce + (group - num_whole) * kAmxColumns);
    }
  }

  template <bool kHasFour>
  void add_page(int page, int dim) {
    const int64_t output_bytes = output_stride_ * sizeof(float);
    float* output = output_ + dim;
    if (page == 0 && is_first_) {
      amx_clear<0>();
      if constexpr (kHasFour) {
        amx_clear<1>();
        amx_clear<2>();
        amx_clear<3>();
      }
    } else if (page == 0) {
      amx_load<0>(output, output_bytes);
      if constexpr (kHasFour) {
        amx_load<1>(output + kAmxColumns, output_bytes);
        amx_load<2>(output + 2 * kAmxColumns, output_bytes);
        amx_load<3>(output + 3 * kAmxColumns, output_bytes);
      }
    }
    amx_load<5>(weights_ + page * kBlockTokens, kTileKeys * sizeof(Activation));
    const bf16* values = valued_->values[page] + dim * 2;
    multiply_values<0>(values);
    if constexpr (kHasFour) {
      multiply_values<1>(values);
      multiply_values<2>(values);
      multiply_values<3>(values);
    }
    if (page + 1 < valued_->num_pages) return;
    amx_store<0>(output, output_bytes);
    if constexpr (kHasFour) {
      amx_store<1>(output + kAmxColumns, output_bytes);
      amx_store<2>(output + 2 * kAmxColumns, output_bytes);
      amx_store<3>(output + 3 * kAmxColumns, output_bytes);
    }
  }

  template <int kTile>
  void multiply_values(const bf16* values) {
    amx_load<7, false>(values + kTile * kAmxColumns * 2, value_dim_ * 2 * static_cast<int64_t>(sizeof(bf16)));
    amx_multiply<kTile, 5, 7>();
  }

  // Keys and values lie side by side. Of a page that is read a while later some lines are asked for, and the processor fetches those
  // between; what is read next comes into the first cache: the next page's keys, and this one's values.
  void fetch_ahead(int page) const {
    const int size = head_dim_ * kBlockTokens;
    const bf16* const later = page_after(page + kPagesAhead);
    for (int i = 0; i < 2 * size; i += kFetchedElements) prefetch_l2(later + i);
    const bf16* const next = page_after(page + 1);
    const bf16* const values = scored_->values[page];
    for (int i = 0; i < size; i += kLineElements) prefetch(next + i);
    for (int i = 0; i < value_dim_ * kBlockTokens; i += kLineElements) prefetch(values + i);
  }

  // Page number `index` from the start of the tile of scores on, at most kPagesAhead beyond its last one.
  const bf16* page_after(int index) const {
    static_assert(kPagesAhead <= kTilePages);
    const int num_pages = scored_->num_pages;
    return index < num_pages ? scored_->keys[index] : scored_->next_keys[index - num_pages];
  }

  const AmxShapes shapes_ = AmxShapes::halves(kRows);
  const Activation* const queries_;
  const int head_dim_;
  const int value_dim_;
  const int64_t output_stride_ = PartialRows::stride_of(value_dim_);
  const bool fetches_;
  const Tile* scored_ = nullptr;
  float* scores_ = nullptr;
  const Tile* valued_ = nullptr;
  const Activation* weights_ = nullptr;
  float* output_ = nullptr;
  bool is_first_ = false;
  int num_score_slices_ = 0;
  int num_slices_ = 0;
  int next_ = 0;
};

// Either makes the same bits.
template <int kRows>
using Products = std::conditional_t<kRows <= kFewRows, FewRowsProducts<kRows>, TileProducts<kRows>>;

}  // namespace octavo
