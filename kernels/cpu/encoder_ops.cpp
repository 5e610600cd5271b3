#include "encoder_ops.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "dispatch.h"
#include "elementwise.h"
#include "encoder_activation.h"
#include "simd.h"

namespace octavo {
namespace {

const float* row_of(const OctavoTable& table, int64_t row) { return table.data + row * table.stride; }

float sum_of(const float* x, int64_t padded_size) {
  Vec sum = {};
  for (int64_t i = 0; i < padded_size; i += kLanes) sum = sum + load(x + i);
  return sum_lanes(sum);
}

float inverse_rms(const float* x, int64_t padded_size, int size, float eps) {
  Vec squares = {};
  for (int64_t i = 0; i < padded_size; i += kLanes) squares = multiply_add(load(x + i), load(x + i), squares);
  return 1.0f / std::sqrt(sum_lanes(squares) / static_cast<float>(size) + eps);
}

// columns[dim][token] = keys[token][dim], zero from num_tokens up to `padded`, which is a multiple of four.
void transpose_keys(const float* keys, int64_t stride, int64_t num_tokens, int head_dim, int64_t padded,
                    float* columns) {
  for (int64_t token = 0; token + 4 <= num_tokens; token += 4) {
    const float* from = keys + token * stride;
    float* to = columns + token;
    for (int i = 0; i < head_dim; ++i, to += padded) {
      // Written as one: the compiler makes a vector of them.
      const float four[4] = {from[i], from[stride + i], from[2 * stride + i], from[3 * stride + i]};
      std::memcpy(to, four, sizeof four);
    }
  }
  for (int i = 0; i < head_dim; ++i) {
    float* column = columns + i * padded;
    for (int64_t token = num_tokens / 4 * 4; token < num_tokens; ++token) column[token] = keys[token * stride + i];
    std::fill(column + num_tokens, column + padded, 0.0f);
  }
}

// The keys that rows see, [begin, end) of a sequence; `first` is the whole vector that begin is in.
struct KeyRange {
  int64_t first;
  int64_t begin;
  int64_t end;
};

KeyRange keys_seen(const OctavoEncoderOp& op, int64_t first_row, int64_t last_row, int64_t num_tokens) {
  const int64_t begin = std::max<int64_t>(0, first_row - op.before);
  return {begin / kLanes * kLanes, begin, std::min<int64_t>(num_tokens, last_row + op.after + 1)};
}

// scores[row][key] = scale * (query . key), all keys of a vector at once, for whole vectors. Queries are `stride` apart.
template <int kRows>
void score_keys(const float* queries, int64_t stride, const float* keys, int64_t padded, const KeyRange& range,
                int head_dim, Vec scale, float* scores) {
  for (int64_t key = range.first; key < range.end; key += kLanes) {
    Vec sums[kRows] = {};
    for (int i = 0; i < head_dim; ++i) {
      const Vec column = load(keys + i * padded + key);
      for (int row = 0; row < kRows; ++row)
        sums[row] = multiply_add(broadcast(queries[row * stride + i]), column, sums[row]);
    }
    for (int row = 0; row < kRows; ++row) store(scores + row * padded + key, sums[row] * scale);
  }
}

// Turn the scores that a row has of all its tile's keys into weights 2^(score - largest), zero for those that it
// does not see; return one over their sum.
float to_weights(float* scores, const KeyRange& tile, const KeyRange& seen) {
  const int64_t end = round_up(tile.end, kLanes);
  std::fill(scores + tile.first, scores + seen.begin, -std::numeric_limits<float>::infinity());
  std::fill(scores + seen.end, scores + end, -std::numeric_limits<float>::infinity());
  Vec largest = load(scores + tile.first);
  for (int64_t i = tile.first + kLanes; i < end; i += kLanes) largest = maximum(largest, load(scores + i));
  const Vec most = broadcast(max_lanes(largest));
  Vec sum = {};
  for (int64_t i = tile.first; i < end; i += kLanes) {
    const Vec weight = exp2(load(scores + i) - most);
    store(scores + i, weight);
    sum = sum + weight;
  }
  return 1.0f / sum_lanes(sum);
}

// output[row][dim ..] = factor[row] * sum over keys of weight * value, `kVectors` vectors of dimensions.
template <int kRows, int kVectors>
void weigh_values(const float* weights, int64_t padded, const KeyRange& range, const float* values,
                  int64_t value_stride, const float* factors, float* output, int64_t output_stride) {
  Vec sums[kRows][kVectors];
  clear(sums);
  for (int64_t key = range.begin; key < range.end; ++key) {
    Vec value[kVectors];
    for (int vector = 0; vector < kVectors; ++vector) value[vector] = load(values + key * value_stride + vector * kLanes);
    for (int row = 0; row < kRows; ++row) {
      const Vec weight = broadcast(weights[row * padded + key]);
      for (int vector = 0; vector < kVectors; ++vector)
        sums[row][vector] = multiply_add(weight, value[vector], sums[row][vector]);
    }
  }
  for (int row = 0; row < kRows; ++row)
    for (int vector = 0; vector < kVectors; ++vector)
      store(output + row * output_stride + vector * kLanes, sums[row][vector] * broadcast(factors[row]));
}

template <int kRows>
constexpr int dims_at_once() {
  int vectors = 16 / kLanes;  // head_dim is a multiple of 16
  while (vectors > 1 && kRows * vectors > kAccumulators) vectors /= 2;
  return vectors;
}

}  // namespace

void embed_sum_row(const OctavoEncoderOp& op, int32_t token, int32_t position, int32_t segment, float* output) {
  const float* word = row_of(op.words, token);
  if (op.positions.data == nullptr) {
    std::copy(word, word + round_up(op.columns, kRowMultiple), output);
    return;
  }
  const float* place = row_of(op.positions, position);
  const float* text = row_of(op.segments, std::min(segment, op.segments.num_rows - 1));
  for (int64_t i = 0; i < round_up(op.columns, kRowMultiple); i += kLanes)
    store(output + i, load(word + i) + (load(text + i) + load(place + i)));
}

void layer_norm_row(const OctavoEncoderOp& op, const float* x, float* output) {
  const int64_t padded = round_up(op.columns, kRowMultiple);
  const float mean = sum_of(x, padded) / static_cast<float>(op.columns);
  float squares = 0.0f;
  {
    Vec sum = {};
    int64_t i = 0;
    for (; i + kLanes <= op.columns; i += kLanes) {
      const Vec centred = load(x + i) - broadcast(mean);
      sum = multiply_add(centred, centred, sum);
    }
    squares = sum_lanes(sum);
    for (; i < op.columns; ++i) squares += (x[i] - mean) * (x[i] - mean);
  }
  const Vec factor = broadcast(1.0f / std::sqrt(squares / static_cast<float>(op.columns) + op.norm_eps));
  for (int64_t i = 0; i < padded; i += kLanes) {  // the weight is zero in the padding
    const Vec normed = (load(x + i) - broadcast(mean)) * factor * load(op.norm_weight + i);
    store(output + i, op.norm_bias == nullptr ? normed : normed + load(op.norm_bias + i));
  }
}

void rms_norm_row(const OctavoEncoderOp& op, const float* x, float* output) {
  const int64_t padded = round_up(op.columns, kRowMultiple);
  const Vec factor = broadcast(inverse_rms(x, padded, op.columns, op.norm_eps));
  for (int64_t i = 0; i < padded; i += kLanes) store(output + i, load(x + i) * factor * load(op.norm_weight + i));
}

void rotate_row(const OctavoEncoderOp& op, int32_t position, float* qkv) {
  const int half = op.rotary_dim / 2;
  const float* cos = op.cos + int64_t{position} * half;
  const float* sin = op.sin + int64_t{position} * half;
  for (int head = 0; head < op.num_heads + op.num_kv_heads; ++head) {
    float* values = qkv + int64_t{head} * op.head_dim;
    const OctavoNorm& norm = head < op.num_heads ? op.q_norm : op.k_norm;
    if (norm.weight != nullptr) {
      const Vec factor = broadcast(inverse_rms(values, op.head_dim, op.head_dim, norm.eps));
      for (int i = 0; i < op.head_dim; i += kLanes)
        store(values + i, load(values + i) * factor * load(norm.weight + i));
    }
    rotate_halves(values, cos, sin, half);
  }
}

void add_row(const OctavoEncoderOp& op, const float* x, float* output) {
  for (int64_t i = 0; i < round_up(op.columns, kRowMultiple); i += kLanes) store(output + i, load(output + i) + load(x + i));
}

void gate_row(const OctavoEncoderOp& op, const float* x, float* output) {
  const int64_t padded = round_up(op.columns, kRowMultiple);
  for (int64_t i = 0; i < padded; i += kLanes)
    store(output + i, activate(op.activation, load(x + i)) * load(x + padded + i));
}

void attend_sequence(const OctavoEncoderOp& op, int head, int num_tokens, int piece, int num_pieces, const float* qkv,
                     int64_t qkv_stride, float* output, int64_t output_stride, AttentionScratch& scratch) {
  const int64_t num_tiles = divide_up(num_tokens, kMaxTileRows);
  const int64_t begin = num_tiles * piece / num_pieces, end = num_tiles * (piece + 1) / num_pieces;
  if (begin == end) return;
  const int head_dim = op.head_dim;
  const int64_t padded = round_up(num_tokens, kLanes);
  const int kv_head = head / (op.num_heads / op.num_kv_heads);
  const float* queries = qkv + head * head_dim;
  const float* keys = qkv + (op.num_heads + kv_head) * head_dim;
  const float* values = keys + op.num_kv_heads * head_dim;
  if (static_cast<int64_t>(scratch.keys.size()) < head_dim * padded) scratch.keys.resize(head_dim * padded);
  if (static_cast<int64_t>(scratch.scores.size()) < kMaxTileRows * padded) scratch.scores.resize(kMaxTileRows * padded);
  transpose_keys(keys, qkv_stride, num_tokens, head_dim, padded, scratch.keys.data());
  const Vec scale = broadcast(op.scale * 1.44269504f);
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t first = num_tokens * tile / num_tiles;
    const int64_t count = num_tokens * (tile + 1) / num_tiles - first;
    dispatch_rows(static_cast<int>(count), [&](auto constant) {
      constexpr int kRows = constant();
      constexpr int kVectors = dims_at_once<kRows>();
      float* scores = scratch.scores.data();
      float factors[kRows];
      const KeyRange range = keys_seen(op, first, first + kRows - 1, num_tokens);
      score_keys<kRows>(queries + first * qkv_stride, qkv_stride, scratch.keys.data(), padded, range, head_dim, scale,
                        scores);
      for (int row = 0; row < kRows; ++row)
        factors[row] = to_weights(scores + row * padded, range, keys_seen(op, first + row, first + row, num_tokens));
      for (int dim = 0; dim < head_dim; dim += kVectors * kLanes)
        weigh_values<kRows, kVectors>(scores, padded, range, values + dim, qkv_stride, factors,
                                      output + first * output_stride + head * head_dim + dim, output_stride);
    });
  }
}

}  // namespace octavo
