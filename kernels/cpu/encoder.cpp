// Runs a recorded encoder over a ragged batch of whole sequences, in one call.
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <vector>

#include "encoder_abi.h"
#include "encoder_ops.h"
#include "gemm_f32.h"
#include "guard.h"
#include "handles.h"
#include "simd.h"

namespace octavo {
namespace {

constexpr int kRowsPerItem = 8;  // of what works on one row at a time
constexpr int kFewestUnitsPerThread = 4;  // of attention; each unit puts all keys of a head in columns first

// Keep the sentence; always -1, so that a check can return it.
[[gnu::format(printf, 3, 4)]] int32_t fail(char* error, size_t size, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(error, size, format, arguments);
  va_end(arguments);
  return -1;
}

}  // namespace

class Encoder {
 public:
  Encoder(ThreadPool& threads, const OctavoEncoderInfo& info)
      : threads_(threads),
        ops_(info.ops, info.ops + info.num_ops),
        buffers_(info.buffers, info.buffers + info.num_buffers),
        max_batch_tokens_(info.max_batch_tokens),
        scratch_(threads.num_threads()) {}

  int32_t check(const OctavoEncoderStep& step, char* error, size_t size) const;
  void run(const OctavoEncoderStep& step, float* hidden);

 private:
  friend class EncoderJob;

  ThreadPool& threads_;
  std::vector<OctavoEncoderOp> ops_;
  std::vector<OctavoBuffer> buffers_;
  int32_t max_batch_tokens_;
  std::vector<AttentionScratch> scratch_;  // by thread
};

// One step: a phase for each operation.
class EncoderJob : public Job {
 public:
  EncoderJob(Encoder& encoder, const OctavoEncoderStep& step, float* hidden);

  const std::vector<int>& items_per_phase() const { return items_per_phase_; }
  void run_items(int phase, int begin, int end, int thread) override;

 private:
  int num_items(const OctavoEncoderOp& op);
  void run_item(int phase, int item, int thread);
  void run_rows(const OctavoEncoderOp& op, int begin, int end);
  void attend(const OctavoEncoderOp& op, int item, int thread);

  float* row(int buffer, int64_t index) const {
    const OctavoBuffer& b = encoder_.buffers_[buffer];
    return static_cast<float*>(b.data) + index * b.stride;
  }

  Encoder& encoder_;
  const OctavoEncoderStep& step_;
  float* const hidden_;
  int pieces_per_head_ = 1;  // of attention; the same for all sequences
  std::vector<GemmF32> gemms_;  // by phase; unused for other operations
  std::vector<int> items_per_phase_;
};

int32_t Encoder::check(const OctavoEncoderStep& step, char* error, size_t size) const {
  if (step.num_tokens > max_batch_tokens_)
    return fail(error, size, "%d tokens in a step, more than max_batch_tokens %d", step.num_tokens, max_batch_tokens_);
  for (const OctavoEncoderOp& op : ops_) {
    const bool has_positions = op.kind == OCTAVO_ENCODER_ROTATE || op.positions.data != nullptr;
    const int32_t num_positions = op.kind == OCTAVO_ENCODER_ROTATE ? op.max_positions : op.positions.num_rows;
    for (int t = 0; has_positions && t < step.num_tokens; ++t) {
      if (step.positions[t] < 0 || step.positions[t] >= num_positions)
        return fail(error, size, "positions[%d] is %d of %d", t, step.positions[t], num_positions);
    }
    if (op.kind != OCTAVO_ENCODER_EMBED_SUM) continue;
    for (int t = 0; t < step.num_tokens; ++t) {
      if (step.token_ids[t] < 0 || step.token_ids[t] >= op.words.num_rows)
        return fail(error, size, "token_ids[%d] is %d of %d words", t, step.token_ids[t], op.words.num_rows);
      if (step.segments != nullptr && (step.segments[t] < 0 || step.segments[t] > 1))
        return fail(error, size, "segments[%d] is %d, not 0 or 1", t, step.segments[t]);
    }
  }
  int32_t end = 0;
  for (int s = 0; s <= step.num_sequences; ++s) {
    const int32_t next = step.query_start_loc[s];
    if (next < end || (s == 0 && next != 0) || next > step.num_tokens)
      return fail(error, size, "query_start_loc[%d] is %d after %d, with %d tokens", s, next, end, step.num_tokens);
    end = next;
  }
  if (end != step.num_tokens)
    return fail(error, size, "query_start_loc ends at %d, not at %d tokens", end, step.num_tokens);
  for (int i = 0; i < step.num_rows; ++i) {
    if (step.logits_rows[i] < 0 || step.logits_rows[i] >= step.num_tokens)
      return fail(error, size, "logits_rows[%d] is %d of %d tokens", i, step.logits_rows[i], step.num_tokens);
  }
  return 0;
}

void Encoder::run(const OctavoEncoderStep& step, float* hidden) {
  EncoderJob job(*this, step, hidden);
  threads_.run(job, job.items_per_phase());
}

EncoderJob::EncoderJob(Encoder& encoder, const OctavoEncoderStep& step, float* hidden)
    : encoder_(encoder), step_(step), hidden_(hidden), gemms_(encoder.ops_.size()) {
  for (const OctavoEncoderOp& op : encoder.ops_) items_per_phase_.push_back(num_items(op));
}

int EncoderJob::num_items(const OctavoEncoderOp& op) {
  switch (op.kind) {
    case OCTAVO_ENCODER_LINEAR:
    case OCTAVO_ENCODER_LINEAR_RESIDUAL: {
      const OctavoBuffer& input = encoder_.buffers_[op.input];
      const OctavoBuffer& output = encoder_.buffers_[op.output];
      GemmF32& gemm = gemms_[&op - encoder_.ops_.data()];
      gemm = make_gemm_f32(op, static_cast<const float*>(input.data), input.stride, static_cast<float*>(output.data),
                           output.stride, step_.num_tokens, encoder_.threads_.num_threads());
      return gemm.count();
    }
    case OCTAVO_ENCODER_SELF_ATTENTION: {
      const int num_units = std::max(step_.num_sequences * op.num_heads, 1);
      const int wanted = kFewestUnitsPerThread * encoder_.threads_.num_threads();
      pieces_per_head_ = static_cast<int>(divide_up(wanted, num_units));
      return step_.num_sequences * op.num_heads * pieces_per_head_;
    }
    case OCTAVO_ENCODER_HIDDEN:
      return static_cast<int>(divide_up(step_.num_rows, kRowsPerItem));
    default:
      return static_cast<int>(divide_up(step_.num_tokens, kRowsPerItem));
  }
}

void EncoderJob::run_items(int phase, int begin, int end, int thread) {
  for (int item = begin; item < end; ++item) run_item(phase, item, thread);
}

void EncoderJob::run_item(int phase, int item, int thread) {
  const OctavoEncoderOp& op = encoder_.ops_[phase];
  switch (op.kind) {
    case OCTAVO_ENCODER_LINEAR:
    case OCTAVO_ENCODER_LINEAR_RESIDUAL:
      run_gemm_f32_item(gemms_[phase], item);
      break;
    case OCTAVO_ENCODER_SELF_ATTENTION:
      attend(op, item, thread);
      break;
    default: {
      const int num_rows = op.kind == OCTAVO_ENCODER_HIDDEN ? step_.num_rows : step_.num_tokens;
      run_rows(op, item * kRowsPerItem, std::min((item + 1) * kRowsPerItem, num_rows));
    }
  }
}

void EncoderJob::run_rows(const OctavoEncoderOp& op, int begin, int end) {
  for (int i = begin; i < end; ++i) {
    switch (op.kind) {
      case OCTAVO_ENCODER_EMBED_SUM:
        embed_sum_row(op, step_.token_ids[i], step_.positions[i], step_.segments == nullptr ? 0 : step_.segments[i],
                      row(op.output, i));
        break;
      case OCTAVO_ENCODER_LAYER_NORM:
        layer_norm_row(op, row(op.input, i), row(op.output, i));
        break;
      case OCTAVO_ENCODER_RMS_NORM:
        rms_norm_row(op, row(op.input, i), row(op.output, i));
        break;
      case OCTAVO_ENCODER_ROTATE:
        rotate_row(op, step_.positions[i], row(op.output, i));
        break;
      case OCTAVO_ENCODER_GATE:
        gate_row(op, row(op.input, i), row(op.output, i));
        break;
      case OCTAVO_ENCODER_ADD:
        add_row(op, row(op.input, i), row(op.output, i));
        break;
      default: {
        const float* source = row(op.input, step_.logits_rows[i]);
        std::copy(source, source + op.columns, hidden_ + int64_t{i} * op.columns);
      }
    }
  }
}

void EncoderJob::attend(const OctavoEncoderOp& op, int item, int thread) {
  const int piece = item % pieces_per_head_, unit = item / pieces_per_head_;
  const int sequence = unit / op.num_heads;
  const int32_t begin = step_.query_start_loc[sequence];
  const int32_t num_tokens = step_.query_start_loc[sequence + 1] - begin;
  if (num_tokens == 0) return;
  attend_sequence(op, unit % op.num_heads, num_tokens, piece, pieces_per_head_, row(op.input, begin), encoder_.buffers_[op.input].stride,
                  row(op.output, begin), encoder_.buffers_[op.output].stride, encoder_.scratch_[thread]);
}

}  // namespace octavo

using namespace octavo;

struct OctavoEncoder {
  Encoder encoder;
};

OctavoEncoder* octavo_encoder_create(OctavoPool* pool, const OctavoEncoderInfo* info) {
  return guarded<OctavoEncoder*>(nullptr, [&] { return new OctavoEncoder{Encoder(pool->threads, *info)}; });
}

void octavo_encoder_destroy(OctavoEncoder* encoder) { delete encoder; }

int32_t octavo_encoder_run(OctavoEncoder* encoder, const OctavoEncoderStep* step, float* hidden, char* error,
                           size_t error_size) {
  if (encoder->encoder.check(*step, error, error_size) != 0) return -1;
  return guarded([&] { encoder->encoder.run(*step, hidden); });
}
