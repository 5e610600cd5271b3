// The operations that work on one token at a time.
#pragma once

#include <cstdint>

#include "abi.h"
#include "simd.h"

namespace octavo {

constexpr int kBlockTokens = 16;   // tokens in a KV block
constexpr int kMaxHeadDim = 576;
constexpr int kMaxValueDim = 512;
constexpr int kRowMultiple = 32;   // buffer rows are padded to this many elements

// Dimensions of a value.
inline int value_dim(const OctavoOp& op) { return op.latent_dim > 0 ? op.latent_dim : op.head_dim; }

// Numbers that the pages of a block and kv head hold.
inline int64_t pages_size(const OctavoOp& op) {
  return int64_t{op.latent_dim > 0 ? 1 : 2} * op.head_dim * kBlockTokens;
}

// Look up one token: a row of the table, or of the packed layer that is one, to float32; times op.scale.
void embed_token(const OctavoOp& op, int32_t token_id, float* output);

// output = bf16(x / sqrt(mean(x^2) + eps) * weight), padding included (zeros stay zeros).
void norm_row(const OctavoNorm& norm, const float* x, Activation* output);

// The same without rounding, and without the padding.
void norm_row_exact(const OctavoNorm& norm, const float* x, float* output);

// residual += x / sqrt(mean(x^2) + eps) * weight, padding included (zeros stay zeros).
void add_norm_row(const OctavoNorm& norm, const float* x, float* residual);

// Rotate a head in place: dimension i of its first `half` with i + half, by cos[i] and sin[i].
void rotate_halves(float* first, const float* cos, const float* sin, int half);

// Norm (if the op has norms: of each head, or as long as all heads at once) and rotate some heads of one token: the kv
// heads [first_kv_head, first_kv_head + num_kv_heads) and the query heads that belong to them. Keys and values go to
// place `offset` of the block's pages, queries to `queries`.
//
// qkv      [op.num_heads + 2 * op.num_kv_heads, head_dim]
// pages    K and V page of each kv head: [op.num_kv_heads, 2, head_dim * 16]
// queries  [op.num_heads, head_dim]
void rotary_write_kv(const OctavoOp& op, const float* qkv, int32_t position, int first_kv_head, int num_kv_heads,
                     bf16* pages, int offset, Activation* queries);

// Rotate the last dimensions of each head of one token.
void rotate_queries(const OctavoOp& op, const float* x, int32_t position, Activation* queries);

// Norm the first dimensions of a latent key, rotate the others, and put it at place `offset` of the page.
void write_latent(const OctavoOp& op, const float* x, int32_t position, bf16* page, int offset);

}  // namespace octavo
