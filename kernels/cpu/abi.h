// The C interface of the library: plain structs, pointers and sizes. `library.py` mirrors it.
//
// Unless a comment says otherwise, the caller owns all memory and keeps it alive and in place.
// bf16 values travel as uint16_t. Every row of an internal buffer starts at a multiple of 32
// elements; the padding between the last column and the next row holds zeros.
#pragma once

#include <cstddef>
#include <cstdint>

#define OCTAVO_EXPORT extern "C" __attribute__((visibility("default")))

extern "C" {

// Raised when a struct or function below changes; checked by `library.py` after loading.
enum { OCTAVO_ABI_REVISION = 21 };

// Numbers, or codes of one byte each with scales apart.
enum OctavoType : int32_t {
  OCTAVO_BF16 = 0,
  OCTAVO_F16 = 1,
  OCTAVO_F32 = 2,
  OCTAVO_CODES = 3,
};

// How packed weights are kept; see gemm.h, and quantized.h for codes. Compressed ones are those of bf16 in fewer bits.
enum OctavoWeightFormat : int32_t {
  OCTAVO_WEIGHT_BF16 = 0,
  OCTAVO_WEIGHT_INT8 = 1,
  OCTAVO_WEIGHT_INT4 = 2,
  OCTAVO_WEIGHT_COMPRESSED = 3,
  OCTAVO_WEIGHT_INT5 = 4,
  OCTAVO_WEIGHT_INT5_MINIMUM = 5,
  OCTAVO_WEIGHT_INT6 = 6,
  OCTAVO_WEIGHT_INT4_MINIMUM_16 = 7,
  OCTAVO_WEIGHT_INT8_MINIMUM_16 = 8,
  OCTAVO_WEIGHT_IQ4 = 9,
  OCTAVO_WEIGHT_MXFP4 = 10,
};

enum OctavoOpKind : int32_t {
  OCTAVO_EMBED = 0,
  OCTAVO_NORM_LINEAR = 1,
  OCTAVO_ROTARY_WRITE_KV = 2,
  OCTAVO_PAGED_ATTENTION = 3,
  OCTAVO_LINEAR_RESIDUAL = 4,
  OCTAVO_NORM_GATED_LINEAR = 5,
  OCTAVO_LOGITS = 6,
  OCTAVO_NORM_EXPERTS_RESIDUAL = 7,
  OCTAVO_HIDDEN = 8,
  OCTAVO_LINEAR = 9,          // of activations, to float32
  OCTAVO_NORM_RESIDUAL = 10,  // output += norm(input)
  // Of latent attention; see `LatentOps` of gpu_worker/ops.py.
  OCTAVO_ROTATE_QUERIES = 11,  // of float32, to activations
  OCTAVO_WRITE_LATENT = 12,    // of float32; normed with `k_norm`
  OCTAVO_HEAD_LINEAR = 13,     // of activations; `linear` is the first head's, and the others lie behind it, as experts do
};

enum OctavoActivation : int32_t { OCTAVO_SILU = 0, OCTAVO_GELU_TANH = 1, OCTAVO_SWIGLUOAI = 2 };

// A row-major matrix as the checkpoint holds it; read only while it is packed. Codes are those of the format that it is packed in;
// scales and minima are [rows, groups of a row], and groups have `group` columns, a multiple of the format's.
struct OctavoMatrix {
  const void* data;
  const float* scales;  // null for numbers
  const float* minima;  // null where the format has none
  int32_t type;         // OctavoType
  int32_t rows;
  int32_t columns;
  int32_t group;
};

// RMSNorm. `weight` is float32, zero-padded to a multiple of 32; null where there is no norm.
struct OctavoNorm {
  const float* weight;
  float eps;
  int32_t size;
};

// A linear layer packed by octavo_pack_linear or octavo_pack_gated.
struct OctavoLinear {
  const uint8_t* weight;
  const float* bias;  // in packed column order, zero-padded to whole blocks; null without bias
  int32_t in_features;
  int32_t out_features;  // of the result: for a gated pair, the intermediate size
  int32_t format;        // OctavoWeightFormat
};

// `Experts` of gpu_worker/ops.py, whose router is the operation's `linear`. The layers of all experts
// have one shape; `gated` and `down` are the first one's, and the packed weights of the others lie behind
// it, octavo_packed_weight_size apart, and their biases, whole blocks apart.
struct OctavoExperts {
  OctavoLinear gated;
  OctavoLinear down;
  int32_t num_experts;
  int32_t num_chosen;
  int32_t num_shared;
  int32_t is_normalized;
  // `Routing` of kernels/routing.py; the bias is [num_experts - num_shared], or null.
  const float* bias;
  int32_t is_sigmoid;
  int32_t num_groups;
  int32_t num_chosen_groups;
  int32_t num_best;
  float scale;
  int32_t has_shared_gate;
};

// One operation of a recorded program. Fields that an operation does not use are zero.
struct OctavoOp {
  int32_t kind;    // OctavoOpKind
  int32_t input;   // number of the buffer read, -1 for OCTAVO_EMBED
  int32_t output;  // number of the buffer written (added to, for those with a residual); -1 for the last operation
  int32_t layer;
  OctavoNorm norm;
  OctavoNorm q_norm;
  OctavoNorm k_norm;
  OctavoLinear linear;
  int32_t activation;  // OctavoActivation
  int32_t num_heads;
  int32_t num_kv_heads;
  int32_t head_dim;  // a multiple of 16
  float scale;  // of attention's scores; of an embedding's rows
  int32_t window;  // 0: no window
  const float* sinks;  // of attention, [num_heads] times log2(e): a score of each row that has no value; null for none
  float soft_cap;  // of attention's scores, and of logits: x becomes cap * tanh(x / cap); 0: none
  // embedding: bf16 rows [vocab_size, table_stride]; where table_stride is 0, `linear` is the table,
  // packed: a head that is tied to the embedding is not held twice
  const uint16_t* table;
  int32_t table_stride;
  int32_t vocab_size;
  // rotary: cos, sin [max_positions, rotary_dim / 2]
  const float* cos;
  const float* sin;
  int32_t rotary_dim;
  int32_t max_positions;
  OctavoExperts experts;
  int32_t latent_dim;  // `Heads.latent_dim` of gpu_worker/ops.py
};

// A buffer between operations: [max_batch_tokens, stride], float32 or activations as its users expect.
// An activation is a bf16 number, held as octavo_activation_bytes() say: in float32 where products are of that.
struct OctavoBuffer {
  void* data;
  int32_t stride;
};

struct OctavoProgramInfo {
  const OctavoOp* ops;
  const OctavoBuffer* buffers;
  int32_t num_ops;
  int32_t num_buffers;
  int32_t num_layers;
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t vocab_size;
  int32_t max_batch_tokens;
  int32_t max_running;
  int32_t max_blocks_per_sequence;
};

// Sixteen outputs of a packed block, as an adapter adds to them: of its products with `a` those from `first_rank` on.
struct OctavoAdapterStripe {
  const uint16_t* b;  // bf16 [num_pairs, 16, 2]: two ranks at once, as weights are multiplied
  int32_t first_rank;  // even
  int32_t num_pairs;
};

// What an adapter adds to the linear layer of one operation: scale * B (A x), in packed column order.
struct OctavoAdapterLayer {
  // bf16 [num_ranks / 8][a_stride / 32][8, at last what is left][32], zero-padded. Where octavo_activation_bytes() are 4, the 32
  // are of inputs 0, 16, 1, 17, ...
  const uint16_t* a;
  const float* scales;                 // [num_ranks]
  const OctavoAdapterStripe* stripes;  // [num_blocks, 2]
  int32_t num_ranks;                   // of all modules that the layer was joined of, even each; 0: it adds nothing
  int32_t a_stride;                    // inputs, rounded up to 32
  int32_t num_blocks;                  // of the packed layer
};

// `StepInput` of gpu_worker/ops.py, plus the sizes of its arrays.
struct OctavoStep {
  const int32_t* token_ids;
  const int32_t* positions;
  const int32_t* slot_mapping;
  const int32_t* query_start_loc;
  const int32_t* seq_lens;
  const int32_t* block_tables;
  const int32_t* logits_rows;
  const int32_t* adapter_ids;                 // [num_tokens], 0 for none; null if no token has one
  const OctavoAdapterLayer* const* adapters;  // [num_adapters] by id: a layer for each operation, or null
  int32_t num_adapters;
  int32_t num_tokens;
  int32_t num_sequences;
  int32_t num_logits_rows;
  int32_t max_blocks;  // width of block_tables
};

// The KV cache: bf16 [num_blocks, num_layers, num_kv_heads, 2, head_dim * 16].
// The first of the two is the K page, [head_dim / 2][16 tokens][2]; the second the V page,
// [8 token pairs][head_dim][2]. Either feeds the bf16 pair dot product without a shuffle. A latent cache has K pages alone,
// from which V pages of `latent_dim` are made where they are read.
// A block is one piece of memory, so blocks that were never used take no memory.
struct OctavoCache {
  uint16_t* data;
  int32_t num_blocks;
};

// `Draw` of gpu_worker/ops.py. Switched off by temperature == 0 (greedy), top_k <= 0,
// top_p >= 1, min_p <= 0, top_n_sigma <= 0,
// typical_p >= 1.
struct OctavoDraw {
  double top_p;
  double min_p;
  uint64_t seed;
  double top_n_sigma;
  double typical_p;
  float temperature;
  int32_t top_k;
  uint32_t candidate_index;
  uint32_t position;
};

typedef struct OctavoPool OctavoPool;
typedef struct OctavoArena OctavoArena;
typedef struct OctavoProgram OctavoProgram;

// What a function returns that the system refuses memory or threads, where it returns a number; null where it returns a
// pointer. Memory that it was to write holds anything then.
enum { OCTAVO_FAILED = -2 };
// Write why the last function of this thread failed. Returns whether it was for want of memory.
OCTAVO_EXPORT int32_t octavo_last_error(char* text, size_t size);

OCTAVO_EXPORT int32_t octavo_abi_revision(void);
OCTAVO_EXPORT int32_t octavo_activation_bytes(void);

// How many rows a linear layer multiplies in little more time than one row, because it reads its weights, of this format, once.
OCTAVO_EXPORT int32_t octavo_rows_at_once(int32_t format);

// Threads. The calling thread is one of `num_threads`; the others sleep between calls.
OCTAVO_EXPORT OctavoPool* octavo_pool_create(int32_t num_threads);
// In a forked child, destroying does nothing.
OCTAVO_EXPORT void octavo_pool_destroy(OctavoPool* pool);
// Pieces of work that the threads have done since they started, of any call: a call that runs and whose count stays the
// same is stuck. May be called from any thread at any time.
OCTAVO_EXPORT uint64_t octavo_pool_progress(const OctavoPool* pool);

// Memory: zeroed, 64-byte aligned, on huge pages where the system gives them, touched lazily.
// Pieces live until the whole arena is destroyed. Returns null when there is no memory.
// Its huge pages lie in turn on the nodes of memory whose bits are set in `nodes`, where the system does that and nobody
// has told it another place; with 0, near the core that touches them first.
OCTAVO_EXPORT OctavoArena* octavo_arena_create(uint64_t nodes);
OCTAVO_EXPORT void octavo_arena_destroy(OctavoArena* arena);
OCTAVO_EXPORT void* octavo_arena_allocate(OctavoArena* arena, size_t num_bytes);
// Have the system give the memory of one more huge page for each thread, of what was handed out first.
// Nobody may write there meanwhile. Returns whether more is left, or OCTAVO_FAILED.
OCTAVO_EXPORT int32_t octavo_arena_touch(OctavoArena* arena, OctavoPool* pool);

// Packing in an OctavoWeightFormat: codes are taken as they are, their scales rounded to half precision; numbers are
// quantised, for INT8 and INT4. Sizes are in bytes of the destination, which must be zeroed. A matrix is the layer's rows from
// `first_row` on; of a gated pair, where a block begins. Return 0 or OCTAVO_FAILED.
OCTAVO_EXPORT size_t octavo_packed_weight_size(int32_t format, int32_t out_features, int32_t in_features);
OCTAVO_EXPORT int32_t octavo_pack_linear(OctavoPool* pool, int32_t format, const OctavoMatrix* matrix, int64_t first_row,
                                         uint8_t* packed);
// Gate and up, same shape, interleaved by 16 columns. Size: octavo_packed_weight_size of twice
// the intermediate size rounded up to 16.
OCTAVO_EXPORT int32_t octavo_pack_gated(OctavoPool* pool, int32_t format, const OctavoMatrix* gate,
                                        const OctavoMatrix* up, int64_t first_row, uint8_t* packed);
// Compress blocks that were packed as bf16, [num_blocks] of so many inputs; `compressed` has the size of that format. Returns 0, with
// anything in there, if one of the blocks is not like those of a trained model; see compressed.h. Not all variants read such layers.
OCTAVO_EXPORT int32_t octavo_reads_compressed(void);
OCTAVO_EXPORT int32_t octavo_compress(OctavoPool* pool, const uint8_t* packed, int32_t num_blocks, int32_t in_features,
                                      uint8_t* compressed);
OCTAVO_EXPORT int32_t octavo_to_bf16(OctavoPool* pool, const OctavoMatrix* matrix, uint16_t* rows, int32_t stride);

// Packed weights in a file. A checksum is of OCTAVO_CHUNK_BYTES, the last one of what is left.
enum { OCTAVO_CHUNK_BYTES = 1 << 20 };
// Read `size` bytes at `offset` with all threads and sum them up. Returns 0, an errno or OCTAVO_FAILED.
OCTAVO_EXPORT int32_t octavo_read_file(OctavoPool* pool, int32_t file, int64_t offset, size_t size, void* memory,
                                       uint64_t* checksums);
OCTAVO_EXPORT void octavo_checksums(const void* memory, size_t size, uint64_t* checksums);

// Programs. `info` and the arrays it points to are copied; buffers and weights are not.
OCTAVO_EXPORT OctavoProgram* octavo_program_create(OctavoPool* pool, const OctavoProgramInfo* info);
OCTAVO_EXPORT void octavo_program_destroy(OctavoProgram* program);
// Run one step and write logits [num_logits_rows, vocab_size], or hidden states [num_logits_rows, size of the
// norm] where the last operation is OCTAVO_HIDDEN. Of logits, `best_tokens` [num_logits_rows] gets what octavo_argmax
// would find. There are at most max_batch_tokens rows of logits. Returns 0, or -1 with a sentence in `error` when an index of the step is out of range; then
// nothing was written. Or OCTAVO_FAILED.
OCTAVO_EXPORT int32_t octavo_program_run(OctavoProgram* program, const OctavoStep* step, const OctavoCache* cache,
                                         float* logits, int32_t* best_tokens, char* error, size_t error_size);

// Where the time of the steps since the last call went, in ns and number of phases (waits of all
// threads for each other); both arrays are indexed by OctavoOpKind, OCTAVO_PROFILE_PREPARE for rows that are normed
// and quantised in a phase of their own, and OCTAVO_PROFILE_ROWWISE for operations that together are one phase: the
// linear layers of many rows, with what lies between them. Measured only while switched on, which is off at first.
enum { OCTAVO_PROFILE_ROWWISE = 14, OCTAVO_PROFILE_PREPARE = 15, OCTAVO_PROFILE_SIZE = 16 };
OCTAVO_EXPORT void octavo_program_profile(OctavoProgram* program, int32_t on, int64_t* ns, int64_t* num_phases);

// The most that this machine can do, for benchmarks: read memory, and multiply pairs of bf16 or quads
// of bytes that lie in registers. The caller takes the time. Return the bytes read and the operations, or OCTAVO_FAILED.
OCTAVO_EXPORT int64_t octavo_measure_read(OctavoPool* pool, const void* data, int64_t num_bytes);
OCTAVO_EXPORT int64_t octavo_measure_dot(OctavoPool* pool, int32_t num_items);
OCTAVO_EXPORT int64_t octavo_measure_integer_dot(OctavoPool* pool, int32_t num_items);

// Sets those of `size` logits to -inf whose bit is not set: bit i % 32 of allowed[i / 32]. In the caller's thread.
OCTAVO_EXPORT void octavo_mask(float* logits, const uint32_t* allowed, int32_t size);

// Sampling over rows of `logits`, `stride` elements apart. A row without a drawable token (all
// -inf, or not a number) gives -1. Return 0 or OCTAVO_FAILED.
OCTAVO_EXPORT int32_t octavo_draw(OctavoPool* pool, const float* logits, int64_t stride, int32_t num_rows,
                                  int32_t vocab_size, const OctavoDraw* draws, int32_t* token_ids);
// The lowest index of each row's largest value; -1 where that is infinite, or a value is not a number.
OCTAVO_EXPORT int32_t octavo_argmax(OctavoPool* pool, const float* logits, int64_t stride, int32_t num_rows,
                                    int32_t vocab_size, int32_t* token_ids);

}  // extern "C"
