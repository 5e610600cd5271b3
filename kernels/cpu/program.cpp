// Runs a recorded program over a ragged batch, in one call.
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <limits>
#include <vector>

#include "abi.h"
#include "attention.h"
#include "elementwise.h"
#include "experts.h"
#include "gemm.h"
#include "handles.h"

namespace octavo {
namespace {

// So few rows are normed by every thread for itself: cheaper than one more wait for each other.
constexpr int kPrivateNormRows = 8;
constexpr int kRowsPerItem = 4;  // of embedding, norm and rotary

enum class PhaseKind { kEmbed, kNorm, kGemm, kNormGemm, kRotary, kAttention, kChoose, kGather, kExpertsGated, kExpertsDown };

// What the threads do between two barriers. An operation becomes one phase or more.
struct Phase {
  PhaseKind kind;
  const OctavoOp* op;
  int num_rows;
  Gemm gemm;
  GemmItems gemm_items;
};

bool is_gated(const OctavoOp& op) { return op.kind == OCTAVO_NORM_GATED_LINEAR; }

Epilogue epilogue_of(const OctavoOp& op) {
  if (op.kind == OCTAVO_LINEAR_RESIDUAL) return Epilogue::kAddResidual;
  if (!is_gated(op)) return Epilogue::kStore;
  return op.activation == OCTAVO_SILU ? Epilogue::kSilu : Epilogue::kGeluTanh;
}

class IndexError {
 public:
  IndexError(char* text, size_t size) : text_(text), size_(size) {}

  // Keep the sentence; always false, so that a check can return it.
  [[gnu::format(printf, 2, 3)]] bool operator()(const char* format, ...) const {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text_, size_, format, arguments);
    va_end(arguments);
    return false;
  }

 private:
  char* text_;
  size_t size_;
};

class Program {
 public:
  Program(ThreadPool& threads, const OctavoProgramInfo& info);

  bool check(const OctavoStep& step, const OctavoCache& cache, const IndexError& error) const;
  void run(const OctavoStep& step, const OctavoCache& cache, float* logits);

 private:
  friend class StepJob;

  bool check_tokens(const OctavoStep& step, const OctavoCache& cache, const IndexError& error) const;
  bool check_sequence(const OctavoStep& step, const OctavoCache& cache, int s, const IndexError& error) const;

  ThreadPool& threads_;
  OctavoProgramInfo info_;
  std::vector<OctavoOp> ops_;
  std::vector<OctavoBuffer> buffers_;
  int32_t max_positions_;
  int64_t normed_stride_ = 0;
  std::vector<bf16> normed_;                       // [max_batch_tokens, normed_stride]
  std::vector<std::vector<bf16>> private_normed_;  // a thread's own, [kPrivateNormRows, normed_stride]
  ExpertsWork experts_;
};

// One step: the phases of the program for this batch, and the code of their items.
class StepJob : public Job {
 public:
  StepJob(Program& program, const OctavoStep& step, const OctavoCache& cache, float* logits);

  const std::vector<int>& items_per_phase() const { return items_per_phase_; }
  void run_item(int phase, int item, int thread) override;

 private:
  void add_phases(const OctavoOp& op);
  void add_phase(PhaseKind kind, const OctavoOp& op, int num_rows, int num_items);
  void add_gemm(PhaseKind kind, const OctavoOp& op, int num_rows);
  void add_experts(const OctavoOp& op);
  void add_attention_items();
  void norm_rows(const Phase& phase, int begin, int end, bf16* output) const;
  void run_private_norm_gemm(int phase, int item, int thread);
  void run_rotary(const OctavoOp& op, int begin, int end) const;
  void run_attention(const OctavoOp& op, int item) const;
  bf16* layer_pages(const OctavoOp& op, int64_t block) const;

  template <class T>
  T* row(int buffer, int64_t index) const {
    const OctavoBuffer& b = program_.buffers_[buffer];
    return static_cast<T*>(b.data) + index * b.stride;
  }

  Program& program_;
  const OctavoStep& step_;
  const OctavoCache& cache_;
  float* const logits_;
  std::vector<Phase> phases_;
  std::vector<int> items_per_phase_;
  std::vector<AttentionItem> attention_items_;
  std::vector<int> private_norm_phase_;  // by thread: the phase whose rows its own memory holds
};

// ---------------------------------------------------------------- program

Program::Program(ThreadPool& threads, const OctavoProgramInfo& info)
    : threads_(threads),
      info_(info),
      ops_(info.ops, info.ops + info.num_ops),
      buffers_(info.buffers, info.buffers + info.num_buffers),
      max_positions_(std::numeric_limits<int32_t>::max()) {
  for (const OctavoOp& op : ops_) {
    if (op.kind == OCTAVO_ROTARY_WRITE_KV) max_positions_ = std::min(max_positions_, op.max_positions);
    normed_stride_ = std::max(normed_stride_, round_up(op.norm.size, kRowMultiple));
    if (op.kind == OCTAVO_NORM_EXPERTS_RESIDUAL) experts_.reserve(op, info.max_batch_tokens);
  }
  normed_.resize(normed_stride_ * info.max_batch_tokens);
  private_normed_.resize(threads.num_threads());
  for (std::vector<bf16>& memory : private_normed_) memory.resize(normed_stride_ * kPrivateNormRows);
}

bool Program::check(const OctavoStep& step, const OctavoCache& cache, const IndexError& error) const {
  if (step.num_tokens > info_.max_batch_tokens)
    return error("%d tokens in a step, more than max_batch_tokens %d", step.num_tokens, info_.max_batch_tokens);
  if (step.num_sequences > info_.max_running)
    return error("%d sequences in a step, more than max_running %d", step.num_sequences, info_.max_running);
  if (!check_tokens(step, cache, error)) return false;
  if (step.query_start_loc[0] != 0) return error("query_start_loc starts at %d, not 0", step.query_start_loc[0]);
  for (int s = 0; s < step.num_sequences; ++s) {
    if (!check_sequence(step, cache, s, error)) return false;
  }
  const int end = step.query_start_loc[step.num_sequences];
  if (end != step.num_tokens) return error("query_start_loc ends at %d, not at %d tokens", end, step.num_tokens);
  for (int i = 0; i < step.num_logits_rows; ++i) {
    const int32_t row = step.logits_rows[i];
    if (row < 0 || row >= step.num_tokens) return error("logits_rows[%d] is %d of %d tokens", i, row, step.num_tokens);
  }
  return true;
}

bool Program::check_tokens(const OctavoStep& step, const OctavoCache& cache, const IndexError& error) const {
  for (int t = 0; t < step.num_tokens; ++t) {
    if (step.token_ids[t] < 0 || step.token_ids[t] >= info_.vocab_size)
      return error("token_ids[%d] is %d, vocab_size %d", t, step.token_ids[t], info_.vocab_size);
    if (step.positions[t] < 0 || step.positions[t] >= max_positions_)
      return error("positions[%d] is %d of %d positions", t, step.positions[t], max_positions_);
    if (step.slot_mapping[t] < 0 || step.slot_mapping[t] / kBlockTokens >= cache.num_blocks)
      return error("slot_mapping[%d] is %d, with %d blocks", t, step.slot_mapping[t], cache.num_blocks);
  }
  return true;
}

bool Program::check_sequence(const OctavoStep& step, const OctavoCache& cache, int s, const IndexError& error) const {
  const int begin = step.query_start_loc[s], end = step.query_start_loc[s + 1];
  if (end < begin || end > step.num_tokens)
    return error("query_start_loc[%d] is %d after %d, with %d tokens", s + 1, end, begin, step.num_tokens);
  const int64_t seq_len = step.seq_lens[s];
  const int64_t num_blocks = divide_up(seq_len, kBlockTokens);
  if (seq_len < end - begin || num_blocks > step.max_blocks || num_blocks > info_.max_blocks_per_sequence)
    return error("seq_lens[%d] is %d, with %d new tokens and room for %d blocks", s, step.seq_lens[s], end - begin,
                 std::min(step.max_blocks, info_.max_blocks_per_sequence));
  for (int t = begin; t < end; ++t) {
    const int64_t expected = seq_len - (end - t);
    if (step.positions[t] != expected)
      return error("positions[%d] is %d, but seq_lens[%d] makes it %d", t, step.positions[t], s,
                   static_cast<int>(expected));
  }
  const int32_t* block_table = step.block_tables + static_cast<int64_t>(s) * step.max_blocks;
  for (int b = 0; b < num_blocks; ++b) {
    if (block_table[b] < 0 || block_table[b] >= cache.num_blocks)
      return error("block_tables[%d][%d] is %d of %d blocks", s, b, block_table[b], cache.num_blocks);
  }
  return true;
}

void Program::run(const OctavoStep& step, const OctavoCache& cache, float* logits) {
  StepJob job(*this, step, cache, logits);
  threads_.run(job, job.items_per_phase());
}

// ---------------------------------------------------------------- step

StepJob::StepJob(Program& program, const OctavoStep& step, const OctavoCache& cache, float* logits)
    : program_(program),
      step_(step),
      cache_(cache),
      logits_(logits),
      private_norm_phase_(program.threads_.num_threads(), -1) {
  add_attention_items();
  for (const OctavoOp& op : program.ops_) add_phases(op);
}

void StepJob::add_attention_items() {
  for (int s = 0; s < step_.num_sequences; ++s) {
    const int begin = step_.query_start_loc[s], end = step_.query_start_loc[s + 1];
    // The last tokens of a prompt see most and take longest: they go first.
    for (int last = end; last > begin; last -= kTokensPerAttentionItem) {
      const int first = std::max(begin, last - kTokensPerAttentionItem);
      attention_items_.push_back({s, first, last - first, step_.seq_lens[s] - (end - first)});
    }
  }
}

void StepJob::add_phases(const OctavoOp& op) {
  const int num_tokens = step_.num_tokens;
  switch (op.kind) {
    case OCTAVO_EMBED:
      add_phase(PhaseKind::kEmbed, op, num_tokens, static_cast<int>(divide_up(num_tokens, kRowsPerItem)));
      break;
    case OCTAVO_ROTARY_WRITE_KV:
      add_phase(PhaseKind::kRotary, op, num_tokens, static_cast<int>(divide_up(num_tokens, kRowsPerItem)));
      break;
    case OCTAVO_PAGED_ATTENTION:
      add_phase(PhaseKind::kAttention, op, num_tokens, static_cast<int>(attention_items_.size()) * op.num_kv_heads);
      break;
    case OCTAVO_LINEAR_RESIDUAL:
      add_gemm(PhaseKind::kGemm, op, num_tokens);
      break;
    case OCTAVO_NORM_EXPERTS_RESIDUAL:
      add_experts(op);
      break;
    case OCTAVO_NORM_LINEAR:
    case OCTAVO_NORM_GATED_LINEAR:
    case OCTAVO_LOGITS: {
      const int num_rows = op.kind == OCTAVO_LOGITS ? step_.num_logits_rows : num_tokens;
      if (num_rows <= kPrivateNormRows) {
        add_gemm(PhaseKind::kNormGemm, op, num_rows);
      } else {
        add_phase(PhaseKind::kNorm, op, num_rows, static_cast<int>(divide_up(num_rows, kRowsPerItem)));
        add_gemm(PhaseKind::kGemm, op, num_rows);
      }
      break;
    }
  }
}

void StepJob::add_phase(PhaseKind kind, const OctavoOp& op, int num_rows, int num_items) {
  phases_.push_back({kind, &op, num_rows, Gemm{}, GemmItems{}});
  items_per_phase_.push_back(num_items);
}

void StepJob::add_gemm(PhaseKind kind, const OctavoOp& op, int num_rows) {
  Gemm gemm{};
  gemm.num_rows = num_rows;
  gemm.linear = &op.linear;
  gemm.epilogue = epilogue_of(op);
  if (op.kind == OCTAVO_LINEAR_RESIDUAL) {
    gemm.input = row<bf16>(op.input, 0);
    gemm.input_stride = program_.buffers_[op.input].stride;
  } else {
    gemm.input = program_.normed_.data();
    gemm.input_stride = program_.normed_stride_;
  }
  if (op.kind == OCTAVO_NORM_EXPERTS_RESIDUAL) {  // the router
    gemm.output = program_.experts_.logits();
    gemm.output_stride = gemm.num_columns = static_cast<int>(ExpertsWork::logits_stride(op));
  } else if (op.kind == OCTAVO_LOGITS) {
    gemm.output = logits_;
    gemm.output_stride = gemm.num_columns = op.linear.out_features;
  } else {
    gemm.output = program_.buffers_[op.output].data;
    gemm.output_stride = gemm.num_columns = program_.buffers_[op.output].stride;
  }
  const GemmItems items(num_rows, op.linear, is_gated(op), program_.threads_.num_threads());
  phases_.push_back({kind, &op, num_rows, gemm, items});
  items_per_phase_.push_back(items.count());
}

void StepJob::add_experts(const OctavoOp& op) {
  const int num_rows = step_.num_tokens, num_threads = program_.threads_.num_threads();
  if (num_rows == 0) return;
  add_phase(PhaseKind::kNorm, op, num_rows, static_cast<int>(divide_up(num_rows, kRowsPerItem)));
  add_gemm(PhaseKind::kGemm, op, num_rows);
  add_phase(PhaseKind::kChoose, op, num_rows, 1);
  add_phase(PhaseKind::kGather, op, num_rows, ExpertsWork::num_gather_items(op, num_rows));
  add_phase(PhaseKind::kExpertsGated, op, num_rows, ExpertsWork::num_gated_items(op, num_rows, num_threads));
  add_phase(PhaseKind::kExpertsDown, op, num_rows, ExpertsWork::num_down_items(op, num_threads));
}

void StepJob::run_item(int index, int item, int thread) {
  const Phase& phase = phases_[index];
  const OctavoOp& op = *phase.op;
  const int begin = item * kRowsPerItem;
  const int end = std::min(begin + kRowsPerItem, phase.num_rows);
  switch (phase.kind) {
    case PhaseKind::kEmbed:
      for (int t = begin; t < end; ++t) embed_token(op, step_.token_ids[t], row<float>(op.output, t));
      break;
    case PhaseKind::kNorm:
      norm_rows(phase, begin, end, program_.normed_.data());
      break;
    case PhaseKind::kGemm:
      run_gemm_item(phase.gemm, phase.gemm_items, item);
      break;
    case PhaseKind::kNormGemm:
      run_private_norm_gemm(index, item, thread);
      break;
    case PhaseKind::kRotary:
      run_rotary(op, begin, end);
      break;
    case PhaseKind::kAttention:
      run_attention(op, item);
      break;
    case PhaseKind::kChoose:
      program_.experts_.choose(op, phase.num_rows);
      break;
    case PhaseKind::kGather:
      program_.experts_.gather(program_.normed_.data(), program_.normed_stride_, item);
      break;
    case PhaseKind::kExpertsGated:
      program_.experts_.run_gated(op, program_.normed_.data(), program_.normed_stride_, item, items_per_phase_[index]);
      break;
    case PhaseKind::kExpertsDown:
      program_.experts_.run_down(op, row<float>(op.output, 0), program_.buffers_[op.output].stride, item,
                                 items_per_phase_[index]);
      break;
  }
}

void StepJob::norm_rows(const Phase& phase, int begin, int end, bf16* output) const {
  for (int r = begin; r < end; ++r) {
    const int token = phase.op->kind == OCTAVO_LOGITS ? step_.logits_rows[r] : r;
    norm_row(phase.op->norm, row<float>(phase.op->input, token), output + r * program_.normed_stride_);
  }
}

void StepJob::run_private_norm_gemm(int index, int item, int thread) {
  const Phase& phase = phases_[index];
  bf16* normed = program_.private_normed_[thread].data();
  if (private_norm_phase_[thread] != index) {
    norm_rows(phase, 0, phase.num_rows, normed);
    private_norm_phase_[thread] = index;
  }
  Gemm gemm = phase.gemm;
  gemm.input = normed;
  run_gemm_item(gemm, phase.gemm_items, item);
}

bf16* StepJob::layer_pages(const OctavoOp& op, int64_t block) const {
  const int64_t layer_size = int64_t{2} * op.num_kv_heads * op.head_dim * kBlockTokens;
  return cache_.data + (block * program_.info_.num_layers + op.layer) * layer_size;
}

void StepJob::run_rotary(const OctavoOp& op, int begin, int end) const {
  for (int t = begin; t < end; ++t) {
    const int32_t slot = step_.slot_mapping[t];
    rotary_write_kv(op, row<float>(op.input, t), step_.positions[t], layer_pages(op, slot / kBlockTokens),
                    slot % kBlockTokens, row<bf16>(op.output, t));
  }
}

void StepJob::run_attention(const OctavoOp& op, int index) const {
  const AttentionItem& item = attention_items_[index / op.num_kv_heads];
  const int kv_head = index % op.num_kv_heads;
  const int first_head = op.num_heads / op.num_kv_heads * kv_head;
  const int64_t page_size = int64_t{op.head_dim} * kBlockTokens;
  const KvHead kv{layer_pages(op, 0) + kv_head * 2 * page_size, layer_pages(op, 1) - layer_pages(op, 0),
                  step_.block_tables + int64_t{item.sequence} * step_.max_blocks};
  attend(op, kv, item, row<bf16>(op.input, item.first_token) + first_head * op.head_dim,
         row<bf16>(op.output, item.first_token) + first_head * op.head_dim, program_.buffers_[op.input].stride);
}

}  // namespace
}  // namespace octavo

using namespace octavo;

struct OctavoProgram {
  Program program;
};

OctavoProgram* octavo_program_create(OctavoPool* pool, const OctavoProgramInfo* info) {
  return new OctavoProgram{Program(pool->threads, *info)};
}

void octavo_program_destroy(OctavoProgram* program) { delete program; }

int32_t octavo_program_run(OctavoProgram* program, const OctavoStep* step, const OctavoCache* cache, float* logits,
                           char* error, size_t error_size) {
  if (!program->program.check(*step, *cache, IndexError(error, error_size))) return -1;
  program->program.run(*step, *cache, logits);
  return 0;
}
