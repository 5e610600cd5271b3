// The operations of an encoder that are no linear layers, in float32.
#pragma once

#include <cstdint>
#include <vector>

#include "encoder_abi.h"

namespace octavo {

// output = words[token] + (segments[segment] + positions[position]), of the tables that there are; padding included.
void embed_sum_row(const OctavoEncoderOp& op, int32_t token, int32_t position, int32_t segment, float* output);

// output = (x - mean) / sqrt(variance + eps) * weight + bias over op.columns; zeros in the padding.
void layer_norm_row(const OctavoEncoderOp& op, const float* x, float* output);

// output = x / sqrt(mean(x^2) + eps) * weight over op.columns; zeros in the padding.
void rms_norm_row(const OctavoEncoderOp& op, const float* x, float* output);

// Norm (if the op has norms) and rotate the queries and keys of a token, in place.
void rotate_row(const OctavoEncoderOp& op, int32_t position, float* qkv);

// output = output + x over op.columns and the padding.
void add_row(const OctavoEncoderOp& op, const float* x, float* output);

// output = activation(x) * y over op.columns and the padding; y begins behind the padding of x.
void gate_row(const OctavoEncoderOp& op, const float* x, float* output);

// Memory of one thread's attention.
struct AttentionScratch {
  std::vector<float> keys;    // [head_dim, tokens rounded up to whole vectors]
  std::vector<float> scores;  // [kMaxTileRows, the same]
};

// A piece of one head of one sequence, of `num_pieces` that have about as many queries each: a token sees those from op.before places before it to
// op.after behind it. `qkv` and `output` are its first token's rows; the head's columns are found by op and head. A query's bits depend on its own
// sequence only.
void attend_sequence(const OctavoEncoderOp& op, int head, int num_tokens, int piece, int num_pieces, const float* qkv, int64_t qkv_stride,
                     float* output, int64_t output_stride, AttentionScratch& scratch);

}  // namespace octavo
