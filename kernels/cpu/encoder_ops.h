// The operations of an encoder that are no linear layers, in float32.
#pragma once

#include <cstdint>
#include <vector>

#include "encoder_abi.h"

namespace octavo {

// output = words[token] + (segments[segment] + positions[position]), padding included.
void embed_sum_row(const OctavoEncoderOp& op, int32_t token, int32_t position, int32_t segment, float* output);

// output = (x - mean) / sqrt(variance + eps) * weight + bias over op.columns; zeros in the padding.
void layer_norm_row(const OctavoEncoderOp& op, const float* x, float* output);

// Memory of one thread's attention.
struct AttentionScratch {
  std::vector<float> keys;    // [head_dim, tokens rounded up to whole vectors]
  std::vector<float> scores;  // [kMaxTileRows, the same]
};

// One head of one sequence: every token sees every other. `qkv` and `output` are its first token's rows;
// the head's columns are found by op and head. A query's bits depend on its own sequence only.
void attend_sequence(const OctavoEncoderOp& op, int head, int num_tokens, const float* qkv, int64_t qkv_stride,
                     float* output, int64_t output_stride, AttentionScratch& scratch);

}  // namespace octavo
