#include "elementwise.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "gemm.h"

namespace octavo {
namespace {

// The cache never holds infinity or not-a-number: a later owner of the block multiplies what it
// finds beyond its last token by zero, and must get zero.
constexpr float kLargest = 3.38e38f;

struct Rotated {
  Rotated(Vec a, Vec b, Vec cos, Vec sin) : first(a * cos - b * sin), second(b * cos + a * sin) {}
  Vec first;
  Vec second;
};

Vec make_finite(Vec value) { return minimum(maximum(value, broadcast(-kLargest)), broadcast(kLargest)); }

// Sum of squares over a multiple of kRowMultiple elements, in one fixed order.
float sum_of_squares(const float* x, int64_t padded_size) {
  constexpr int kSums = kRowMultiple / kLanes;
  Vec sums[kSums] = {};
  for (int64_t i = 0; i < padded_size; i += kRowMultiple) {
    for (int s = 0; s < kSums; ++s) {
      const Vec value = load(x + i + s * kLanes);
      sums[s] = multiply_add(value, value, sums[s]);
    }
  }
  for (int width = kSums / 2; width > 0; width /= 2)
    for (int s = 0; s < width; ++s) sums[s] = sums[s] + sums[s + width];
  return sum_lanes(sums[0]);
}

float inverse_rms(const OctavoNorm& norm, const float* x, int64_t padded_size) {
  return 1.0f / std::sqrt(sum_of_squares(x, padded_size) / static_cast<float>(norm.size) + norm.eps);
}

// A head of float32; zero beyond head_dim up to kRowMultiple.
struct Head {
  alignas(64) float values[kMaxHeadDim];
};

void norm_head(const OctavoNorm& norm, Head& head) {
  const Vec factor = broadcast(inverse_rms(norm, head.values, round_up(norm.size, kRowMultiple)));
  for (int i = 0; i < norm.size; i += kLanes)
    store(head.values + i, load(head.values + i) * factor * load(norm.weight + i));
}

// What heads that are normed all at once are multiplied by, besides the weight; 0 where they are not. A row of them
// need not end at a multiple of kRowMultiple, and others follow it.
float factor_of_heads(const OctavoOp& op, const OctavoNorm& norm, const float* heads) {
  if (norm.weight == nullptr || norm.size == op.head_dim) return 0.0f;
  Vec sum = {};
  for (int i = 0; i < norm.size; i += kLanes) {
    const Vec value = load(heads + i);
    sum = multiply_add(value, value, sum);
  }
  return 1.0f / std::sqrt(sum_lanes(sum) / static_cast<float>(norm.size) + norm.eps);
}

// Norm and rotate head `h` of `heads`, and hand it over: `take`(i, dimensions from i on). `factor` is that of
// factor_of_heads.
template <class Take>
void rotate_head(const OctavoOp& op, const float* heads, int h, const OctavoNorm& norm, float factor, int32_t position,
                 const Take& take) {
  const float* const source = heads + h * op.head_dim;
  const int half = op.rotary_dim / 2;
  const float* const cos = op.cos + static_cast<int64_t>(position) * half;
  const float* const sin = op.sin + static_cast<int64_t>(position) * half;
  if (norm.weight == nullptr && half % kLanes == 0) {
    for (int i = 0; i < half; i += kLanes) {
      const Rotated rotated(load(source + i), load(source + half + i), load(cos + i), load(sin + i));
      take(i, rotated.first);
      take(half + i, rotated.second);
    }
    for (int i = op.rotary_dim; i < op.head_dim; i += kLanes) take(i, load(source + i));
    return;
  }
  Head head;
  std::copy_n(source, op.head_dim, head.values);
  std::fill(head.values + op.head_dim, head.values + round_up(op.head_dim, kRowMultiple), 0.0f);
  if (norm.weight != nullptr && norm.size == op.head_dim) norm_head(norm, head);
  if (norm.weight != nullptr && norm.size != op.head_dim) {
    const float* const weight = norm.weight + h * op.head_dim;
    for (int i = 0; i < op.head_dim; i += kLanes)
      store(head.values + i, load(head.values + i) * broadcast(factor) * load(weight + i));
  }
  rotate_halves(head.values, cos, sin, half);
  for (int i = 0; i < op.head_dim; i += kLanes) take(i, load(head.values + i));
}

void write_key(const bf16* key, int head_dim, bf16* page, int offset) {
  for (int i = 0; i < head_dim; i += 2)
    std::memcpy(page + i * kBlockTokens + offset * 2, key + i, 2 * sizeof(bf16));
}

// Rotate the dimensions of a head from `first` on.
void rotate_from(const OctavoOp& op, int first, int32_t position, Head& head) {
  const int half = op.rotary_dim / 2;
  const int64_t row = static_cast<int64_t>(position) * half;
  rotate_halves(head.values + first, op.cos + row, op.sin + row, half);
}

}  // namespace

void rotate_halves(float* first, const float* cos, const float* sin, int half) {
  float* second = first + half;
  int i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const Rotated rotated(load(first + i), load(second + i), load(cos + i), load(sin + i));
    store(first + i, rotated.first);
    store(second + i, rotated.second);
  }
  for (; i < half; ++i) {
    const float a = first[i], b = second[i];
    first[i] = a * cos[i] - b * sin[i];
    second[i] = b * cos[i] + a * sin[i];
  }
}

void embed_token(const OctavoOp& op, int32_t token_id, float* output) {
  if (op.table_stride == 0) {
    unpack_column(op.linear, token_id, output);
    // What an earlier token of this row was may be no number, in the padding too.
    const int64_t size = op.linear.in_features;
    std::fill(output + size, output + round_up(size, kRowMultiple), 0.0f);
    if (op.scale != 1.0f)
      for (int64_t i = 0; i < size; ++i) output[i] *= op.scale;
    return;
  }
  const bf16* row = op.table + static_cast<int64_t>(token_id) * op.table_stride;
  const Vec scale = broadcast(op.scale);  // times 1 changes no bit
  for (int i = 0; i < op.table_stride; i += kLanes) store(output + i, load_bf16(row + i) * scale);
}

void norm_row(const OctavoNorm& norm, const float* x, Activation* output) {
  const int64_t padded_size = round_up(norm.size, kRowMultiple);
  const Vec factor = broadcast(inverse_rms(norm, x, padded_size));
  for (int64_t i = 0; i < padded_size; i += kLanes)
    store_activation(output + i, load(x + i) * factor * load(norm.weight + i));
}

void norm_row_exact(const OctavoNorm& norm, const float* x, float* output) {
  const float factor = inverse_rms(norm, x, round_up(norm.size, kRowMultiple));
  int i = 0;
  for (; i + kLanes <= norm.size; i += kLanes) store(output + i, load(x + i) * broadcast(factor) * load(norm.weight + i));
  for (; i < norm.size; ++i) output[i] = x[i] * factor * norm.weight[i];
}

void add_norm_row(const OctavoNorm& norm, const float* x, float* residual) {
  const int64_t padded_size = round_up(norm.size, kRowMultiple);
  const Vec factor = broadcast(inverse_rms(norm, x, padded_size));
  for (int64_t i = 0; i < padded_size; i += kLanes)
    store(residual + i, load(residual + i) + load(x + i) * factor * load(norm.weight + i));
}

void rotary_write_kv(const OctavoOp& op, const float* qkv, int32_t position, int first_kv_head, int num_kv_heads,
                     bf16* pages, int offset, Activation* queries) {
  const int head_dim = op.head_dim;
  const int group = op.num_heads / op.num_kv_heads;
  const int64_t page_size = static_cast<int64_t>(head_dim) * kBlockTokens;
  const float* const keys = qkv + op.num_heads * head_dim;
  const float query_factor = factor_of_heads(op, op.q_norm, qkv), key_factor = factor_of_heads(op, op.k_norm, keys);
  for (int h = first_kv_head * group; h < (first_kv_head + num_kv_heads) * group; ++h)
    rotate_head(op, qkv, h, op.q_norm, query_factor, position,
                [&](int i, Vec some) { store_activation(queries + h * head_dim + i, some); });
  for (int h = first_kv_head; h < first_kv_head + num_kv_heads; ++h) {
    bf16* const key_page = pages + h * 2 * page_size;
    alignas(64) bf16 key[kMaxHeadDim];
    rotate_head(op, keys, h, op.k_norm, key_factor, position,
                [&](int i, Vec some) { store_bf16(key + i, make_finite(some)); });
    write_key(key, head_dim, key_page, offset);
    const float* const value = qkv + (op.num_heads + op.num_kv_heads + h) * head_dim;
    bf16* const value_row = key_page + page_size + offset / 2 * head_dim * 2;
    for (int i = 0; i < head_dim; i += kLanes)
      store_every_second(value_row + 2 * i, offset % 2, make_finite(load(value + i)));
  }
}

void rotate_queries(const OctavoOp& op, const float* x, int32_t position, Activation* queries) {
  for (int h = 0; h < op.num_heads; ++h, x += op.head_dim, queries += op.head_dim) {
    Head head;
    std::copy_n(x, op.head_dim, head.values);
    rotate_from(op, op.head_dim - op.rotary_dim, position, head);
    for (int i = 0; i < op.head_dim; i += kLanes) store_activation(queries + i, load(head.values + i));
  }
}

void write_latent(const OctavoOp& op, const float* x, int32_t position, bf16* page, int offset) {
  Head head;
  const int64_t padded_size = round_up(op.latent_dim, kRowMultiple);
  std::copy_n(x, op.latent_dim, head.values);
  std::fill(head.values + op.latent_dim, head.values + padded_size, 0.0f);
  norm_head(op.k_norm, head);
  std::copy(x + op.latent_dim, x + op.head_dim, head.values + op.latent_dim);
  rotate_from(op, op.latent_dim, position, head);
  alignas(64) bf16 key[kMaxHeadDim];
  for (int i = 0; i < op.head_dim; i += kLanes) store_bf16(key + i, make_finite(load(head.values + i)));
  write_key(key, op.head_dim, page, offset);
}

}  // namespace octavo
