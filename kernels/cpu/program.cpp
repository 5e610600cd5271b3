#include "program.h"

#include <algorithm>
#include <limits>

#include "guard.h"
#include "handles.h"
#include "step_job.h"

namespace octavo {
namespace {

// So many rows of kRowwise stay in a thread's cache. With fewer, all weights would be read too often.
constexpr int64_t kRowwiseBytes = 384 << 10;
constexpr int kFewestRowsAtOnce = 48, kMostRowsAtOnce = 96;
static_assert(kFewestRowsAtOnce % kMaxTileRows == 0);

}  // namespace

Program::Program(ThreadPool& threads, const OctavoProgramInfo& info)
    : threads_(threads),
      info_(info),
      ops_(info.ops, info.ops + info.num_ops),
      last_attention_(info.num_ops),
      buffers_(info.buffers, info.buffers + info.num_buffers),
      max_positions_(std::numeric_limits<int32_t>::max()) {
  for (const OctavoOp& op : ops_) {
    if (op.kind == OCTAVO_PAGED_ATTENTION) last_attention_ = &op - ops_.data();
    if (op.cos != nullptr) max_positions_ = std::min(max_positions_, op.max_positions);
    normed_stride_ = std::max(normed_stride_, row_stride<Activation>(round_up(op.norm.size, kRowMultiple)));
    if (is_quantized(op.linear))
      quantized_stride_ = std::max(quantized_stride_, quantized_row_bytes(op.linear.in_features));
    if (op.kind == OCTAVO_NORM_EXPERTS_RESIDUAL) experts_.reserve(op, info.max_batch_tokens);
  }
  prepared_.resize(info.max_batch_tokens, normed_stride_, quantized_stride_);
  reserve_private_rows();
}

void Program::reserve_private_rows() {
  int64_t passed_bytes = 0, residual_bytes = 0;
  for (const OctavoOp& op : ops_) {
    passed_bytes = std::max(passed_bytes, bytes_passed(op));
    if (op.kind == OCTAVO_LINEAR_RESIDUAL) residual_bytes = buffers_[op.output].stride * int64_t{sizeof(float)};
  }
  const int64_t prepared_bytes = normed_stride_ * int64_t{sizeof(Activation)} + quantized_stride_;
  const int64_t rows_in_cache = kRowwiseBytes / (prepared_bytes + passed_bytes + residual_bytes);
  rows_at_once_ = static_cast<int>(std::clamp<int64_t>(rows_in_cache, kFewestRowsAtOnce, kMostRowsAtOnce));
  rows_at_once_ = rows_at_once_ / kMaxTileRows * kMaxTileRows;
  private_rows_.resize(threads_.num_threads());
  for (PrivateRows& rows : private_rows_) {
    rows.prepared.resize(std::max(kPrivateRows, rows_at_once_), normed_stride_, quantized_stride_);
    rows.passed.resize(rows_at_once_ * passed_bytes);
  }
}

// The bytes of a row of what `op` computes for the next operation alone, where both can be parts of kRowwise; else 0.
int64_t Program::bytes_passed(const OctavoOp& op) const {
  const OctavoOp* const next = &op + 1;
  const OctavoOp* const end = ops_.data() + ops_.size();
  if (next == end || next->input != op.output) return 0;
  if (next->kind != OCTAVO_ROTARY_WRITE_KV && !reads_activations(*next)) return 0;
  for (const OctavoOp* later = next + 1; later < end; ++later) {
    if (later->input == op.output) return 0;
    if (later->output == op.output) break;
  }
  const int64_t stride = buffers_[op.output].stride;
  if (op.kind == OCTAVO_NORM_LINEAR) return stride * int64_t{sizeof(float)};
  return op.kind == OCTAVO_NORM_GATED_LINEAR ? stride * int64_t{sizeof(Activation)} : 0;
}

void Program::run(const OctavoStep& step, const OctavoCache& cache, float* logits, int32_t* best_tokens) {
  StepJob job(*this, step, cache, logits);
  threads_.run(job, job.items_per_phase());
  if (ops_.back().kind == OCTAVO_LOGITS) job.write_best_tokens(best_tokens);
}

}  // namespace octavo

using namespace octavo;

struct OctavoProgram {
  Program program;
};

OctavoProgram* octavo_program_create(OctavoPool* pool, const OctavoProgramInfo* info) {
  return guarded<OctavoProgram*>(nullptr, [&] { return new OctavoProgram{Program(pool->threads, *info)}; });
}

void octavo_program_destroy(OctavoProgram* program) { delete program; }

int32_t octavo_program_run(OctavoProgram* program, const OctavoStep* step, const OctavoCache* cache, float* logits,
                           int32_t* best_tokens, char* error, size_t error_size) {
  if (!program->program.check(*step, *cache, IndexError(error, error_size))) return -1;
  return guarded([&] { program->program.run(*step, *cache, logits, best_tokens); });
}

void octavo_program_profile(OctavoProgram* program, int32_t on, int64_t* ns, int64_t* num_phases) {
  Profile& profile = program->program.profile;
  std::copy(profile.ns, profile.ns + OCTAVO_PROFILE_SIZE, ns);
  std::copy(profile.num_phases, profile.num_phases + OCTAVO_PROFILE_SIZE, num_phases);
  profile = Profile{};
  profile.on = on != 0;
}
