#include "elementwise.h"

#include <cmath>
#include <cstring>

#include "gemm.h"

namespace octavo {
namespace {

// The cache never holds infinity or not-a-number: a later owner of the block multiplies what it
// finds beyond its last token by zero, and must get zero.
constexpr float kLargest = 3.38e38f;

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

// A head between its float32 sums and its bf16 form; zero beyond head_dim up to kRowMultiple.
struct Head {
  alignas(64) float values[kMaxHeadDim];
  alignas(64) bf16 rounded[kMaxHeadDim];
};

void norm_head(const OctavoNorm& norm, Head& head) {
  const Vec factor = broadcast(inverse_rms(norm, head.values, round_up(norm.size, kRowMultiple)));
  for (int i = 0; i < norm.size; i += kLanes)
    store(head.values + i, load(head.values + i) * factor * load(norm.weight + i));
}

void rotate_head(const OctavoOp& op, int32_t position, Head& head) {
  const int half = op.rotary_dim / 2;
  const int64_t offset = static_cast<int64_t>(position) * half;
  rotate_halves(head.values, op.cos + offset, op.sin + offset, half);
}

void load_head(const float* source, int head_dim, Head& head) {
  std::memcpy(head.values, source, sizeof(float) * head_dim);
  std::memset(head.values + head_dim, 0, sizeof(float) * (round_up(head_dim, kRowMultiple) - head_dim));
}

void write_key(const Head& head, int head_dim, int offset, bf16* page) {
  for (int i = 0; i < head_dim; i += 2)
    std::memcpy(page + i * kBlockTokens + offset * 2, head.rounded + i, 2 * sizeof(bf16));
}

void write_value(const Head& head, int head_dim, int offset, bf16* page) {
  bf16* target = page + offset / 2 * head_dim * 2 + offset % 2;
  for (int i = 0; i < head_dim; ++i) target[2 * i] = head.rounded[i];
}

}  // namespace

void rotate_halves(float* first, const float* cos, const float* sin, int half) {
  float* second = first + half;
  int i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const Vec a = load(first + i), b = load(second + i), c = load(cos + i), s = load(sin + i);
    store(first + i, a * c - b * s);
    store(second + i, b * c + a * s);
  }
  for (; i < half; ++i) {
    const float a = first[i], b = second[i];
    first[i] = a * cos[i] - b * sin[i];
    second[i] = b * cos[i] + a * sin[i];
  }
}

void embed_token(const OctavoOp& op, int32_t token_id, float* output) {
  if (op.table_stride == 0) return unpack_column(op.linear, token_id, output);
  const bf16* row = op.table + static_cast<int64_t>(token_id) * op.table_stride;
  for (int i = 0; i < op.table_stride; i += kLanes) store(output + i, load_bf16(row + i));
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

void rotary_write_kv(const OctavoOp& op, const float* qkv, int32_t position, int first_kv_head, int num_kv_heads,
                     bf16* pages, int offset, Activation* queries) {
  const int head_dim = op.head_dim;
  const int group = op.num_heads / op.num_kv_heads;
  const int64_t page_size = static_cast<int64_t>(head_dim) * kBlockTokens;
  Head head;
  const auto rotated = [&](int h, const OctavoNorm& norm) {
    load_head(qkv + h * head_dim, head_dim, head);
    if (norm.weight != nullptr) norm_head(norm, head);
    rotate_head(op, position, head);
  };
  const auto round_finite = [&] {
    for (int i = 0; i < head_dim; i += kLanes) store_bf16(head.rounded + i, make_finite(load(head.values + i)));
  };
  for (int h = first_kv_head * group; h < (first_kv_head + num_kv_heads) * group; ++h) {
    rotated(h, op.q_norm);
    for (int i = 0; i < head_dim; i += kLanes) store_activation(queries + h * head_dim + i, load(head.values + i));
  }
  for (int h = first_kv_head; h < first_kv_head + num_kv_heads; ++h) {
    bf16* head_pages = pages + h * 2 * page_size;
    rotated(op.num_heads + h, op.k_norm);
    round_finite();
    write_key(head, head_dim, offset, head_pages);
    load_head(qkv + (op.num_heads + op.num_kv_heads + h) * head_dim, head_dim, head);
    round_finite();
    write_value(head, head_dim, offset, head_pages + page_size);
  }
}

}  // namespace octavo
