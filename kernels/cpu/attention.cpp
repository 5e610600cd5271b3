#include "attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "dispatch.h"
#include "elementwise.h"

namespace octavo {
namespace {

constexpr int kTileKeys = kTilePages * kBlockTokens;
constexpr int kVectorsPerPage = kBlockTokens / kLanes;
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
constexpr int kPartialStride = sizeof(PartialRow) / sizeof(float);
static_assert(kKeysPerPiece % kTileKeys == 0);

// The pages of a tile, and of what is read after it, to be fetched meanwhile.
struct Tile {
  const bf16* keys[kTilePages];
  const bf16* next_keys[kTilePages];
  int num_pages;
};

PieceRange pieces_of(int begin, int end) {
  return {begin / kKeysPerPiece, static_cast<int>(divide_up(end, kKeysPerPiece))};
}

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

template <int kRows>
void score_tile(const Activation* queries, const Tile& tile, int head_dim, float* scores) {
  constexpr int kPages = columns_at_once(kRows, kVectorsPerPage, kTilePages);
  int page = 0;
  for (; page + kPages <= tile.num_pages; page += kPages)
    score_pages<kRows, kPages>(queries, tile.keys + page, head_dim, scores + page * kBlockTokens);
  for (; page < tile.num_pages; ++page)
    score_pages<kRows, 1>(queries, tile.keys + page, head_dim, scores + page * kBlockTokens);
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
float reference_of(const PartialRow& row) { return row.largest == kMinusInfinity ? 0.0f : row.largest; }

// Update `row.largest`; 2 to the power of what it returns is the factor for all that was summed up before.
inline float find_largest(PartialRow& row, const float* scores, float scale, int num_keys) {
  Vec largest = load(scores);
  for (int i = kLanes; i < num_keys; i += kLanes) largest = maximum(largest, load(scores + i));
  const float old_largest = row.largest;
  row.largest = std::max(old_largest, max_lanes(largest) * scale);
  return old_largest - reference_of(row);
}

// Turn scores into weights 2^(scale * score - largest), and add them to `totals` [kLanes].
inline void add_weights(const PartialRow& row, const float* scores, Vec scale, float factor, int num_keys,
                        Activation* weights, float* totals) {
  const Vec offset = broadcast(-reference_of(row));
  Vec sum = {};
  for (int i = 0; i < num_keys; i += kLanes) {
    const Vec weight = short_exp2(multiply_add(load(scores + i), scale, offset));
    sum = sum + weight;
    store_activation(weights + i, weight);
  }
  store(totals, load(totals) * broadcast(factor) + sum);
}

// output[row][d] = output[row][d] * factor[row] + sum over keys of weight * value, for `kVectors`
// vectors of the head's dimensions. The rows of `output` are those of neighbouring PartialRows.
template <int kRows, int kVectors>
void add_values(const Tile& tile, const Activation* weights, int head_dim, int dim, const float* factors, float* output) {
  const int64_t page_size = static_cast<int64_t>(head_dim) * kBlockTokens;
  Vec sums[kRows][kVectors];
  for (int row = 0; row < kRows; ++row)
    for (int vector = 0; vector < kVectors; ++vector)
      sums[row][vector] = load(output + row * kPartialStride + dim + vector * kLanes) * broadcast(factors[row]);
  for (int page = 0; page < tile.num_pages; ++page) {
    const bf16* values = tile.keys[page] + page_size + dim * 2;
    const bf16* next_keys = tile.next_keys[page] + dim * 2;
    for (int pair = 0; pair < kBlockTokens / 2; ++pair) {
      Pairs value[kVectors];
      for (int vector = 0; vector < kVectors; ++vector) {
        value[vector] = load_pairs(values + (pair * head_dim + vector * kLanes) * 2);
        prefetch_l2(next_keys + (pair * head_dim + vector * kLanes) * 2);
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
      store(output + row * kPartialStride + dim + vector * kLanes, sums[row][vector]);
}

// Call `body` with the number of keys in a tile: that of a whole one as a constant, for which loops are unrolled.
template <class Body>
void with_constant(int num_keys, const Body& body) {
  if (num_keys == kTileKeys) return body(std::integral_constant<int, kTileKeys>{});
  body(num_keys);
}

// The tile of keys [start, end) at most. After the last one follows the start of the next head.
Tile load_tile(const KvHead& kv, int start, int end) {
  Tile tile;
  const int first_page = start / kBlockTokens;
  const int num_pages = static_cast<int>(divide_up(end - start, kBlockTokens));
  tile.num_pages = std::min(kTilePages, num_pages);
  for (int i = 0; i < tile.num_pages; ++i) tile.keys[i] = kv.page(first_page + i);
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

// What the rows see of piece number `piece`.
template <int kRows>
void attend_piece_rows(const OctavoOp& op, const KvHead& kv, const Row* rows, const Queries<kRows>& queries, int piece,
                       PartialRow* sums) {
  constexpr int kVectors = columns_at_once(kRows, 1, 4);
  alignas(64) float scores[kRows * kTileKeys];
  alignas(64) Activation weights[kRows * kTileKeys];
  alignas(64) float totals[kRows * kLanes] = {};
  alignas(64) float factors[round_up(kRows, kLanes)] = {};
  int begin = rows[0].begin, end = rows[0].end;
  for (int row = 0; row < kRows; ++row) {
    sums[row].largest = kMinusInfinity;
    std::fill(sums[row].output, sums[row].output + op.head_dim, 0.0f);
    begin = std::min(begin, rows[row].begin);
    end = std::max(end, rows[row].end);
  }
  begin = std::max(begin, piece * kKeysPerPiece);
  end = std::min(end, (piece + 1) * kKeysPerPiece);
  const float scale = op.scale * 1.44269504f;
  for (int start = begin / kTileKeys * kTileKeys; start < end; start += kTileKeys) {
    const Tile tile = load_tile(kv, start, end);
    const int num_keys = tile.num_pages * kBlockTokens;
    score_tile<kRows>(queries.values, tile, op.head_dim, scores);
    for (int row = 0; row < kRows; ++row)
      hide_keys(scores + row * kTileKeys, std::clamp(rows[row].begin - start, 0, num_keys),
                std::clamp(rows[row].end - start, 0, num_keys), num_keys);
    with_constant(num_keys, [&](auto constant_or_not) {
      for (int row = 0; row < kRows; ++row)
        factors[row] = find_largest(sums[row], scores + row * kTileKeys, scale, constant_or_not);
      for (int row = 0; row < kRows; row += kLanes) store(factors + row, exp2(load(factors + row)));
      for (int row = 0; row < kRows; ++row)
        add_weights(sums[row], scores + row * kTileKeys, broadcast(scale), factors[row], constant_or_not,
                    weights + row * kTileKeys, totals + row * kLanes);
    });
    int dim = 0;
    for (; dim + kVectors * kLanes <= op.head_dim; dim += kVectors * kLanes)
      add_values<kRows, kVectors>(tile, weights, op.head_dim, dim, factors, sums[0].output);
    for (; dim < op.head_dim; dim += kLanes)
      add_values<kRows, 1>(tile, weights, op.head_dim, dim, factors, sums[0].output);
  }
  for (int row = 0; row < kRows; ++row) sums[row].total = sum_lanes(load(totals + row * kLanes));
}

// Add what rows have seen of a later piece to their sums. As in a tile, all rows' factors are computed at once.
template <int kRows>
void merge_rows(const PartialRow* pieces, int head_dim, PartialRow* sums) {
  constexpr int kPadded = round_up(kRows, kLanes);
  alignas(64) float old_factors[kPadded] = {}, factors[kPadded] = {};
  for (int row = 0; row < kRows; ++row) {
    const float largest = std::max(sums[row].largest, pieces[row].largest);
    old_factors[row] = sums[row].largest - largest;
    factors[row] = pieces[row].largest - largest;
  }
  for (int i = 0; i < kPadded; i += kLanes) {
    store(old_factors + i, exp2(load(old_factors + i)));
    store(factors + i, exp2(load(factors + i)));
  }
  for (int row = 0; row < kRows; ++row) {
    const PartialRow& piece = pieces[row];
    PartialRow& sum = sums[row];
    if (piece.total == 0.0f) continue;  // the row sees nothing of it, though one that it shares a tile with may
    if (sum.total == 0.0f) {
      sum = piece;
      continue;
    }
    const Vec old_factor = broadcast(old_factors[row]), factor = broadcast(factors[row]);
    sum.largest = std::max(sum.largest, piece.largest);
    sum.total = sum.total * old_factors[row] + piece.total * factors[row];
    for (int dim = 0; dim < head_dim; dim += kLanes)
      store(sum.output + dim, load(sum.output + dim) * old_factor + load(piece.output + dim) * factor);
  }
}

void finish(const PartialRow& sum, int head_dim, Activation* output) {
  const Vec factor = broadcast(1.0f / sum.total);
  // Adding zero turns -0 into 0: a sum of zeros may have either sign.
  for (int dim = 0; dim < head_dim; dim += kLanes) store_activation(output + dim, load(sum.output + dim) * factor + Vec{});
}

template <int kRows>
void attend_rows(const OctavoOp& op, const KvHead& kv, const Row* rows) {
  PartialRow sums[kRows], next[kRows];
  int begin = rows[0].begin, end = rows[0].end;
  for (int row = 1; row < kRows; ++row) {
    begin = std::min(begin, rows[row].begin);
    end = std::max(end, rows[row].end);
  }
  const PieceRange pieces = pieces_of(begin, end);
  const Queries<kRows> queries(rows, op.head_dim);
  attend_piece_rows<kRows>(op, kv, rows, queries, pieces.begin, sums);
  for (int piece = pieces.begin + 1; piece < pieces.end; ++piece) {
    attend_piece_rows<kRows>(op, kv, rows, queries, piece, next);
    merge_rows<kRows>(next, op.head_dim, sums);
  }
  for (int row = 0; row < kRows; ++row) finish(sums[row], op.head_dim, rows[row].output);
}

}  // namespace

int first_key(const OctavoOp& op, int position) {
  return op.window > 0 ? std::max(0, position + 1 - op.window) : 0;
}

PieceRange pieces_of(const OctavoOp& op, const AttentionItem& item) {
  return pieces_of(first_key(op, item.first_position), item.first_position + item.num_tokens);
}

Row row_of(const OctavoOp& op, const AttentionItem& item, const Activation* queries, Activation* output, int64_t stride,
           int index) {
  const int group = op.num_heads / op.num_kv_heads;
  const int token = index / group;
  const int64_t offset = token * stride + index % group * op.head_dim;
  const int end = item.first_position + token + 1;
  return {queries + offset, output + offset, first_key(op, end - 1), end};
}

void attend(const OctavoOp& op, const KvHead& kv, const AttentionItem& item, const Activation* queries, Activation* output,
            int64_t stride) {
  const int num_rows = num_rows_of(op, item);
  const int num_tiles = static_cast<int>(divide_up(num_rows, kMaxTileRows));
  for (int tile = 0; tile < num_tiles; ++tile) {
    const int first = num_rows * tile / num_tiles;
    const int count = num_rows * (tile + 1) / num_tiles - first;
    Row rows[kMaxTileRows];
    for (int i = 0; i < count; ++i) rows[i] = row_of(op, item, queries, output, stride, first + i);
    dispatch_rows(count, [&](auto constant) { attend_rows<constant()>(op, kv, rows); });
  }
}

void attend_piece(const OctavoOp& op, const KvHead& kv, const Row* rows, int num_rows, int piece, PartialRow* sums) {
  dispatch_rows(num_rows, [&](auto constant) {
    attend_piece_rows<constant()>(op, kv, rows, Queries<constant()>(rows, op.head_dim), piece, sums);
  });
}

void merge_pieces(const OctavoOp& op, const AttentionItem& item, PartialRow* sums, const int64_t* first_sums,
                  int num_pieces, Activation* output, int64_t stride) {
  const int num_rows = num_rows_of(op, item);
  for (int i = 0; i < num_rows; ++i) {
    PartialRow& sum = sums[first_sums[0] + i];
    for (int piece = 1; piece < num_pieces; ++piece) merge_rows<1>(&sums[first_sums[piece] + i], op.head_dim, &sum);
    finish(sum, op.head_dim, row_of(op, item, output, output, stride, i).output);
  }
}

}  // namespace octavo
