// The C interface for models whose sequences are computed whole, in one step: encoders, in which all tokens
// see each other, and decoders that make vectors. `encoder.py` mirrors it. Everything is float32; what abi.h
// says of memory and padding holds here too.
#pragma once

#include "abi.h"

extern "C" {

enum OctavoEncoderOpKind : int32_t {
  OCTAVO_ENCODER_EMBED_SUM = 0,
  OCTAVO_ENCODER_LAYER_NORM = 1,
  OCTAVO_ENCODER_LINEAR = 2,
  OCTAVO_ENCODER_LINEAR_RESIDUAL = 3,
  OCTAVO_ENCODER_SELF_ATTENTION = 4,
  OCTAVO_ENCODER_HIDDEN = 5,
  OCTAVO_ENCODER_RMS_NORM = 6,
  OCTAVO_ENCODER_ROTATE = 7,
  OCTAVO_ENCODER_GATE = 8,
  OCTAVO_ENCODER_ADD = 9,
};

enum OctavoEncoderActivation : int32_t {
  OCTAVO_ENCODER_NO_ACTIVATION = 0,
  OCTAVO_ENCODER_GELU = 1,
  OCTAVO_ENCODER_GELU_TANH = 2,
  OCTAVO_ENCODER_SILU = 3,
};

// Rows of float32, `stride` elements apart; `data` is null where there is no table.
struct OctavoTable {
  const float* data;
  int32_t num_rows;
  int32_t stride;
};

// One operation of a recorded program: see gpu_worker/devices/cpu/whole_recorder.py. Unused fields are zero.
struct OctavoEncoderOp {
  int32_t kind;     // OctavoEncoderOpKind
  int32_t input;    // number of the buffer read, -1 for OCTAVO_ENCODER_EMBED_SUM
  int32_t output;   // number of the buffer written (added to, for the residual and the sum; changed in place, for the
                    // rotation); -1 for OCTAVO_ENCODER_HIDDEN
  int32_t columns;  // of the result
  OctavoTable words;
  OctavoTable positions;
  OctavoTable segments;
  const float* norm_weight;  // zero-padded to a multiple of 32
  const float* norm_bias;    // the same, or null
  float norm_eps;
  int32_t in_features;
  const float* weight;  // packed as gemm_f32.h says
  const float* bias;    // zero-padded to a multiple of 32; null without bias
  int32_t activation;   // OctavoEncoderActivation
  int32_t num_heads;
  int32_t num_kv_heads;
  int32_t head_dim;  // a multiple of 16
  float scale;
  int32_t before;  // how many tokens before it and behind it a token sees
  int32_t after;
  // rotation: cos, sin [max_positions, rotary_dim / 2]; norms of each head, or null weights
  const float* cos;
  const float* sin;
  int32_t rotary_dim;
  int32_t max_positions;
  OctavoNorm q_norm;
  OctavoNorm k_norm;
};

struct OctavoEncoderInfo {
  const OctavoEncoderOp* ops;
  const OctavoBuffer* buffers;  // [max_batch_tokens, stride] float32, zeroed
  int32_t num_ops;
  int32_t num_buffers;
  int32_t max_batch_tokens;
};

// The parts of `StepInput` of gpu_worker/ops.py that are read here, and the sizes of its arrays.
struct OctavoEncoderStep {
  const int32_t* token_ids;
  const int32_t* positions;
  const int32_t* segments;  // null: all 0
  const int32_t* query_start_loc;
  const int32_t* logits_rows;
  int32_t num_tokens;
  int32_t num_sequences;
  int32_t num_rows;
};

typedef struct OctavoEncoder OctavoEncoder;

// `info` and the arrays it points to are copied; buffers and weights are not.
OCTAVO_EXPORT OctavoEncoder* octavo_encoder_create(OctavoPool* pool, const OctavoEncoderInfo* info);
OCTAVO_EXPORT void octavo_encoder_destroy(OctavoEncoder* encoder);
// Run one step and write hidden states [num_rows, columns of the last operation]. Returns 0, or -1 with a
// sentence in `error` when an index of the step is out of range; then nothing was written. Or OCTAVO_FAILED.
OCTAVO_EXPORT int32_t octavo_encoder_run(OctavoEncoder* encoder, const OctavoEncoderStep* step, float* hidden,
                                         char* error, size_t error_size);

}  // extern "C"
