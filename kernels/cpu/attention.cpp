#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(OCTAVO_AMX)
#include "attention_amx.h"
#else
#include "attention_vectors.h"
#endif
#include "activation.h"
#include "aligned.h"
#include "dispatch.h"
#include "elementwise.h"

namespace octavo {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
static_assert(kKeysPerPiece % kTileKeys == 0);
constexpr int kMostTilesKnown = 3;

// Several tiles of rows attend to so many pieces in turn, which stay in a core's cache meanwhile.
constexpr int kPiecesInCache = 4;
constexpr int64_t kKeyBytesInCache = 1 << 20;  // where keys and values of all pieces take no more, each tile reads them at once

PieceRange pieces_of(int begin, int end) {
  return {begin / kKeysPerPiece, static_cast<int>(divide_up(end, kKeysPerPiece))};
}

// The steps of softmax over a tile of `num_keys` scores. Each is done for all rows before the next one:
// the sums of one row wait for each other, those of two rows do not.

// Let a row see the keys [begin, end) of a tile only.
void hide_keys(float* scores, int begin, int end, int num_keys) {
  if (begin == 0 && end == num_keys) return;
  if (begin >= end) begin = end = num_keys;
  std::fill(scores, scores + begin, kMinusInfinity);
  std::fill(scores + end, scores + num_keys, kMinusInfinity);
}

// What the weights' exponents count from: anything where the row has seen no key yet.
float finite(float reference) { return reference == kMinusInfinity ? 0.0f : reference; }

// The largest exponent of a weight: so far the reference stays behind the largest score, because to raise it takes a product for
// all that was summed up before.
constexpr float kMostExponent = 8.0f;

// Raise `reference` if need be; 2 to the power of what it returns is the factor for all that was summed up before.
inline float raise_reference(float& reference, const float* scores, float scale, int num_keys) {
  Vec largest = load(scores);
  for (int i = kLanes; i < num_keys; i += kLanes) largest = maximum(largest, load(scores + i));
  const float old_reference = reference;
  // No branch may wait for scores: what is fetched ahead would wait as well.
  const float most_exponent = old_reference == kMinusInfinity ? 0.0f : kMostExponent;
  reference = std::max(old_reference, max_lanes(largest) * scale - most_exponent);
  return old_reference - finite(reference);
}

// Turn scores into weights 2^(scale * score - reference), and add them to `totals` [kLanes].
inline void add_weights(float reference, const float* scores, Vec scale, float factor, int num_keys,
                        Activation* weights, float* totals) {
  const Vec offset = broadcast(-finite(reference));
  Vec sum = {};
  int i = 0;
  for (; i + 2 * kLanes <= num_keys; i += 2 * kLanes) {
    const Vec first = short_exp2(multiply_add(load(scores + i), scale, offset));
    const Vec second = short_exp2(multiply_add(load(scores + i + kLanes), scale, offset));
    sum = sum + first + second;
    store_activations(weights + i, first, second);
  }
  for (; i < num_keys; i += kLanes) {
    const Vec weight = short_exp2(multiply_add(load(scores + i), scale, offset));
    sum = sum + weight;
    store_activation(weights + i, weight);
  }
  store(totals, load(totals) * broadcast(factor) + sum);
}

// Call `body` with the number of keys in a tile: that of a whole one as a constant, for which loops are unrolled.
template <class Body>
void with_constant(int num_keys, const Body& body) {
  if (num_keys == kTileKeys) return body(std::integral_constant<int, kTileKeys>{});
  body(num_keys);
}

// The V page of a latent K page: [dim / 2][16 tokens][2] becomes [8 token pairs][dim][2].
void make_values(const bf16* keys, int latent_dim, bf16* values) {
  constexpr int kPairs = kBlockTokens / 2;
  constexpr uint64_t kOuter = 0xffff00000000ffff;
  for (int dim = 0; dim < latent_dim; dim += 2) {
    uint64_t pairs[kPairs];  // of two tokens each: the first one's two dimensions, and the second one's
    std::memcpy(pairs, keys + dim * kBlockTokens, sizeof pairs);
    for (uint64_t& pair : pairs) pair = (pair & kOuter) | (pair >> 16 & 0xffff0000) | (pair & 0xffff0000) << 16;
    for (int i = 0; i < kPairs; ++i) std::memcpy(values + (i * latent_dim + dim) * 2, &pairs[i], sizeof pairs[i]);
  }
}

// The V pages of tiles of a latent cache that are in work at once.
bf16* memory_of_values(int tile, int latent_dim) {
  thread_local LineVector<bf16> memory;
  const size_t page_size = size_t(latent_dim) * kBlockTokens, size = kMostTilesKnown * kTilePages * page_size;
  if (memory.size() < size) memory.resize(size);
  return memory.data() + tile * kTilePages * page_size;
}

// The tile of keys [start, end) at most, number `index` of those in work. After the last one follows the start of the
// next head.
Tile load_tile(const OctavoOp& op, const KvHead& kv, int start, int end, int index) {
  Tile tile;
  const int first_page = start / kBlockTokens;
  const int num_pages = static_cast<int>(divide_up(end - start, kBlockTokens));
  tile.num_pages = std::min(kTilePages, num_pages);
  for (int i = 0; i < tile.num_pages; ++i) {
    tile.keys[i] = kv.page(first_page + i);
    tile.values[i] = tile.keys[i] + int64_t{op.head_dim} * kBlockTokens;
  }
  if (op.latent_dim > 0) {
    bf16* values = memory_of_values(index, op.latent_dim);
    for (int i = 0; i < tile.num_pages; ++i, values += op.latent_dim * kBlockTokens) {
      make_values(tile.keys[i], op.latent_dim, values);
      tile.values[i] = values;
    }
  }
  for (int i = 0; i < kTilePages; ++i) {
    const int next = kTilePages + i;
    tile.next_keys[i] = next < num_pages ? kv.page(first_page + next) : kv.read_next[i];
  }
  return tile;
}

// The queries of some rows, copied so that they lie at distances known to the compiler.
template <int kRows>
struct Queries {
  alignas(64) Activation values[kRows * kMaxHeadDim];

  Queries(const Row* rows, int head_dim) {
    for (int row = 0; row < kRows; ++row) std::copy_n(rows[row].query, head_dim, values + row * kMaxHeadDim);
  }
};

// Add what rows have seen of a later piece to their sums. As in a tile, all rows' factors are computed at once.
template <int kRows>
void merge_rows(const PartialRows& pieces, int value_dim, const PartialRows& sums) {
  constexpr int kPadded = round_up(kRows, kLanes);
  alignas(64) float old_factors[kPadded] = {}, factors[kPadded] = {};
  for (int row = 0; row < kRows; ++row) {
    const float reference = std::max(sums.reference(row), pieces.reference(row));
    old_factors[row] = sums.reference(row) - reference;
    factors[row] = pieces.reference(row) - reference;
  }
  for (int i = 0; i < kPadded; i += kLanes) {
    store(old_factors + i, exp2(load(old_factors + i)));
    store(factors + i, exp2(load(factors + i)));
  }
  for (int row = 0; row < kRows; ++row) {
    if (pieces.total(row) == 0.0f) continue;  // it sees nothing of the piece, though one that it shares a tile with may
    if (sums.total(row) == 0.0f) {
      std::copy_n(pieces.output(row), sums.stride, sums.output(row));
      continue;
    }
    const Vec old_factor = broadcast(old_factors[row]), factor = broadcast(factors[row]);
    sums.reference(row) = std::max(sums.reference(row), pieces.reference(row));
    sums.total(row) = sums.total(row) * old_factors[row] + pieces.total(row) * factors[row];
    const float* const piece = pieces.output(row);
    float* const sum = sums.output(row);
    for (int dim = 0; dim < value_dim; dim += kLanes)
      store(sum + dim, load(sum + dim) * old_factor + load(piece + dim) * factor);
  }
}

// The first of `sums` is that of `row`.
void finish(const PartialRows& sums, int value_dim, const Row& row) {
  // A sink is one more score, without a value.
  const float sink = row.sink == nullptr ? 0.0f : std::exp2(*row.sink - sums.reference(0));
  const Vec factor = broadcast(1.0f / (sums.total(0) + sink));
  // Adding zero turns -0 into 0: a sum of zeros may have either sign.
  for (int dim = 0; dim < value_dim; dim += kLanes) store_activation(row.output + dim, load(sums.output(0) + dim) * factor + Vec{});
}

// Some rows of one kv head that attend together, tile by tile of their keys.
//
// Where products overlap with the softmax, three tiles are in work at once: while one's scores become weights, the scores of the
// next one are computed, and the values of the one before are added.
template <int kRows>
class RowsAttention {
 public:
  RowsAttention(const OctavoOp& op, const KvHead& kv, const Row* rows)
      : op_(op), kv_(kv), rows_(rows), queries_(rows, op.head_dim), products_(queries_.values, op.head_dim, value_dim(op), !kv.is_in_cache) {}

  // What the rows see of some pieces, together, into `sums`; or, if it `goes_on`, added to what is there of those before.
  void attend(const PieceRange& pieces, const PartialRows& sums, bool goes_on = false) {
    find_tiles(pieces, sums);
    goes_on_ = goes_on;
    if (num_tiles_ == 0 && goes_on) return;
    if (num_tiles_ == 0) return start_piece(0);
    if constexpr (!Products<kRows>::kOverlap) {
      for (int n = 0; n < num_tiles_; ++n) {
        compute(n, kNoTile);
        weigh(n);
        compute(kNoTile, n);
        end_tile(n);
      }
    } else {
      compute(0, kNoTile);
      products_.run(1, 1);
      for (int n = 0; n <= num_tiles_; ++n) {
        compute(n + 1 < num_tiles_ ? n + 1 : kNoTile, n - 1);
        if (n < num_tiles_) weigh(n);
        products_.run(1, 1);
        if (n > 0) end_tile(n - 1);
      }
    }
  }

 private:
  static constexpr int kNoTile = -1;
  static constexpr int kInWork = Products<kRows>::kOverlap ? 2 : 1;  // tiles with scores, or with weights

  struct Piece {
    PartialRows sums;
    alignas(64) float totals[kRows * kLanes];
  };

  void find_tiles(const PieceRange& pieces, const PartialRows& sums) {
    int begin = rows_[0].begin, end = rows_[0].end;
    for (int row = 1; row < kRows; ++row) {
      begin = std::min(begin, rows_[row].begin);
      end = std::max(end, rows_[row].end);
    }
    first_key_ = std::max(begin, pieces.begin * kKeysPerPiece) / kTileKeys * kTileKeys;
    end_key_ = std::min(end, pieces.end * kKeysPerPiece);
    num_tiles_ = static_cast<int>(divide_up(std::max(end_key_ - first_key_, 0), kTileKeys));
    sums_ = sums;
  }

  int start_of(int tile) const { return first_key_ + tile * kTileKeys; }
  int piece_of(int tile) const { return start_of(tile) / kKeysPerPiece - first_key_ / kKeysPerPiece; }

  bool starts_piece(int tile) const { return tile == 0 || piece_of(tile - 1) != piece_of(tile); }

  void start_piece(int number) {
    Piece& piece = pieces_[number % kInWork];
    piece.sums = number == 0 && !goes_on_ ? sums_ : later_sums_[number % kInWork].rows(value_dim(op_));
    std::fill_n(piece.totals, kRows * kLanes, 0.0f);
    for (int row = 0; row < kRows; ++row) {
      piece.sums.reference(row) = kMinusInfinity;
      piece.sums.total(row) = 0.0f;
    }
  }

  // Ask for the products of one tile's scores and another one's values.
  void compute(int scored, int valued) {
    const Tile *scored_tile = nullptr, *valued_tile = nullptr;
    const float* factors = nullptr;
    float* output = nullptr;
    if (scored != kNoTile) {
      tiles_[scored % kTilesKnown] = load_tile(op_, kv_, start_of(scored), end_key_, scored % kTilesKnown);
      scored_tile = &tiles_[scored % kTilesKnown];
    }
    const int of_scored = std::max(scored, 0) % kInWork, of_valued = std::max(valued, 0) % kInWork;
    if (valued != kNoTile) {
      valued_tile = &tiles_[valued % kTilesKnown];
      if (!starts_piece(valued)) factors = factors_[of_valued];
      output = pieces_[piece_of(valued) % kInWork].sums.output(0);
    }
    products_.start(scored_tile, scores_[of_scored], valued_tile, weights_[of_valued], factors, output);
  }

  // Turn scores into weights, while products are computed.
  void weigh(int tile) {
    const int number = piece_of(tile);
    if (starts_piece(tile)) start_piece(number);
    Piece& piece = pieces_[number % kInWork];
    float* const scores = scores_[tile % kInWork];
    Activation* const weights = weights_[tile % kInWork];
    float* const factors = factors_[tile % kInWork];
    const int start = start_of(tile), num_keys = tiles_[tile % kTilesKnown].num_pages * kBlockTokens;
    const float scale = (op_.soft_cap > 0.0f ? 1.0f : op_.scale) * 1.44269504f;
    if (op_.soft_cap > 0.0f) cap_scores(scores, num_keys);
    for (int row = 0; row < kRows; ++row)
      hide_keys(scores + row * kTileKeys, std::clamp(rows_[row].begin - start, 0, num_keys),
                std::clamp(rows_[row].end - start, 0, num_keys), num_keys);
    with_constant(num_keys, [&](auto constant_or_not) {
      for (int row = 0; row < kRows; ++row) {
        factors[row] = raise_reference(piece.sums.reference(row), scores + row * kTileKeys, scale, constant_or_not);
        products_.run(row + 1, 4 * kRows);
      }
      for (int row = 0; row < kRows; row += kLanes) store(factors + row, exp2(load(factors + row)));
      for (int row = 0; row < kRows; ++row) {
        add_weights(piece.sums.reference(row), scores + row * kTileKeys, broadcast(scale), factors[row], constant_or_not,
                    weights + row * kTileKeys, piece.totals + row * kLanes);
        products_.run(kRows + 3 * (row + 1), 4 * kRows);
      }
    });
  }

  void cap_scores(float* scores, int num_keys) const {
    for (int row = 0; row < kRows; ++row)
      for (float* score = scores + row * kTileKeys; score < scores + row * kTileKeys + num_keys; score += kLanes)
        store(score, soft_capped(load(score), op_.scale, op_.soft_cap));
  }

  // After a tile's values: if it is the last one of a piece, add this to those before.
  void end_tile(int tile) {
    const int number = piece_of(tile);
    if (tile + 1 < num_tiles_ && piece_of(tile + 1) == number) return;
    const Piece& piece = pieces_[number % kInWork];
    for (int row = 0; row < kRows; ++row) piece.sums.total(row) = sum_lanes(load(piece.totals + row * kLanes));
    if (number > 0 || goes_on_) merge_rows<kRows>(piece.sums, value_dim(op_), sums_);
  }

  const OctavoOp& op_;
  const KvHead& kv_;
  const Row* const rows_;
  const Queries<kRows> queries_;
  Products<kRows> products_;
  PartialRows sums_{};
  bool goes_on_ = false;
  int first_key_ = 0;
  int end_key_ = 0;
  int num_tiles_ = 0;
  static constexpr int kTilesKnown = Products<kRows>::kOverlap ? kMostTilesKnown : 1;
  Tile tiles_[kTilesKnown];
  alignas(64) float scores_[kInWork][kRows * kTileKeys];
  alignas(64) Activation weights_[kInWork][kRows * kTileKeys];
  alignas(64) float factors_[kInWork][round_up(kRows, kLanes)] = {};
  Piece pieces_[kInWork];
  PartialRowsMemory<kRows> later_sums_[kInWork];
};

template <int kRows>
void attend_rows(const OctavoOp& op, const KvHead& kv, const Row* rows) {
  int begin = rows[0].begin, end = rows[0].end;
  for (int row = 1; row < kRows; ++row) {
    begin = std::min(begin, rows[row].begin);
    end = std::max(end, rows[row].end);
  }
  PartialRowsMemory<kRows> memory;
  const PartialRows sums = memory.rows(value_dim(op));
  RowsAttention<kRows>(op, kv, rows).attend(pieces_of(begin, end), sums);
  for (int row = 0; row < kRows; ++row) finish(sums.from(row), value_dim(op), rows[row]);
}

// The sums of all rows of an item.
PartialRows sums_of_item(const OctavoOp& op, int num_rows) {
  thread_local LineVector<float> memory;
  const int64_t stride = PartialRows::stride_of(value_dim(op));
  if (static_cast<int64_t>(memory.size()) < num_rows * stride) memory.resize(num_rows * stride);
  return {memory.data(), stride};
}

// `kv` for some pieces of an item: after the last one follow the next of them.
KvHead kv_of_pieces(KvHead kv, const PieceRange& pieces, const AttentionItem& item) {
  const int last_page = (item.first_position + item.num_tokens - 1) / kBlockTokens;
  const int next_page = pieces.end * (kKeysPerPiece / kBlockTokens);
  if (next_page <= last_page)
    for (int i = 0; i < kTilePages; ++i) kv.read_next[i] = kv.page(std::min(next_page + i, last_page));
  return kv;
}

}  // namespace

int first_key(const OctavoOp& op, int position) {
  return op.window > 0 ? std::max(0, position + 1 - op.window) : 0;
}

PieceRange pieces_of(const OctavoOp& op, const AttentionItem& item) {
  return pieces_of(first_key(op, item.first_position), item.first_position + item.num_tokens);
}

Row row_of(const OctavoOp& op, const AttentionItem& item, const AttentionRows& data, int index) {
  const int group = op.num_heads / op.num_kv_heads;
  const int token = index / group;
  const AttentionRows row = data.from(op, token, index % group);
  const int end = item.first_position + token + 1;
  return {row.queries, row.output, first_key(op, end - 1), end, row.sinks};
}

void attend(const OctavoOp& op, KvHead kv, const AttentionItem& item, const AttentionRows& data) {
  const AttentionFloatMode float_mode;
  const int num_rows = num_rows_of(op, item);
  const int num_tiles = static_cast<int>(divide_up(num_rows, kMaxAttentionRows));
  // Call `body(first row, rows, their number as a constant)` for each tile of rows.
  const auto for_each_tile = [&](const auto& body) {
    for (int tile = 0; tile < num_tiles; ++tile) {
      const int first = num_rows * tile / num_tiles;
      const int count = num_rows * (tile + 1) / num_tiles - first;
      Row rows[kMaxAttentionRows];
      for (int i = 0; i < count; ++i) rows[i] = row_of(op, item, data, first + i);
      dispatch_rows<kMaxAttentionRows>(count, [&](auto constant) { body(first, rows, constant); });
    }
  };
  const PieceRange pieces = pieces_of(op, item);
  const int64_t piece_bytes = pages_size(op) * (kKeysPerPiece / kBlockTokens) * int64_t{sizeof(bf16)};
  if (num_tiles == 1 || pieces.count() * piece_bytes <= kKeyBytesInCache) {
    return for_each_tile([&](int, const Row* rows, auto constant) {
      attend_rows<constant()>(op, kv, rows);
      kv.is_in_cache = true;
    });
  }
  const PartialRows sums = sums_of_item(op, num_rows);
  for (int begin = pieces.begin; begin < pieces.end; begin += kPiecesInCache) {
    const PieceRange some{begin, std::min(begin + kPiecesInCache, pieces.end)};
    KvHead part = kv_of_pieces(kv, some, item);
    for_each_tile([&](int first, const Row* rows, auto constant) {
      RowsAttention<constant()>(op, part, rows).attend(some, sums.from(first), begin > pieces.begin);
      part.is_in_cache = true;
    });
  }
  for (int i = 0; i < num_rows; ++i) finish(sums.from(i), value_dim(op), row_of(op, item, data, i));
}

void attend_pieces(const OctavoOp& op, const KvHead& kv, const Row* rows, int num_rows, const PieceRange& pieces,
                   PartialRows sums) {
  const AttentionFloatMode float_mode;
  dispatch_rows<kMaxAttentionRows>(num_rows, [&](auto constant) {
    RowsAttention<constant()>(op, kv, rows).attend(pieces, sums);
  });
}

void merge_pieces(const OctavoOp& op, const AttentionItem& item, PartialRows sums, const int64_t* first_sums,
                  int num_pieces, const AttentionRows& data) {
  const AttentionFloatMode float_mode;
  const int num_rows = num_rows_of(op, item);
  for (int i = 0; i < num_rows; ++i) {
    const PartialRows sum = sums.from(first_sums[0] + i);
    for (int piece = 1; piece < num_pieces; ++piece)
      if (first_sums[piece] != kWithPieceBefore) merge_rows<1>(sums.from(first_sums[piece] + i), value_dim(op), sum);
    finish(sum, value_dim(op), row_of(op, item, data, i));
  }
}

}  // namespace octavo
