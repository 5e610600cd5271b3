// Runs a recorded program over a ragged batch, in one call.
#include <algorithm>
#include <chrono>
#include <cstdarg>
#include <cstdio>
#include <limits>
#include <optional>
#include <vector>

#include "abi.h"
#include "aligned.h"
#include "attention_plan.h"
#include "elementwise.h"
#include "experts.h"
#include "gemm.h"
#include "handles.h"
#include "needed_rows.h"

namespace octavo {
namespace {

// So few rows are normed and quantised by every thread for itself: cheaper than one more wait for each other.
constexpr int kPrivateRows = 32;
constexpr int kRowsPerItem = 4;  // of embedding, norm and rotary

// Where each thread has so many rows, what is done row by row between two attentions is one phase: see kRowwise.
constexpr int kFewestRowwiseRows = 256;
// So many of them stay in a thread's cache the while. With fewer, all weights would be read too often.
constexpr int64_t kRowwiseBytes = 384 << 10;
constexpr int kFewestRowsAtOnce = 48, kMostRowsAtOnce = 96;
static_assert(kFewestRowsAtOnce % kMaxTileRows == 0);
// In tiles, rows are multiplied so fast that weights for so few cannot arrive in time.
#if defined(OCTAVO_AMX)
constexpr bool kJoinsRowwise = false;
#else
constexpr bool kJoinsRowwise = true;
#endif

constexpr size_t kBytesFetchedAhead = 256 << 10;  // by a thread that waits; a fraction of its cache
constexpr size_t kBytesFetchedBeforeRows = 2 << 10;

enum class PhaseKind {
  kEmbed,
  kPrepare,       // norm and quantise the rows that a Gemm reads
  kGemm,          // over rows that are ready
  kPrepareGemm,   // over rows that each thread prepares for itself
  kRotary,
  kAttention,
  kRotaryAttention,
  kKeepNeededRows,
  kChoose,
  kGather,
  kExpertsGated,
  kExpertsDown,
  kHidden,
  kRowwise,  // some of these, one after the other over a few rows, whose values stay in a thread's cache
};

// What the threads do between two barriers. An operation becomes one phase or more.
struct Phase {
  PhaseKind kind;
  const OctavoOp* op;  // for kRotaryAttention the second of the two, for kRowwise the first of all
  int num_rows;
  Gemm gemm;
  GemmItems gemm_items;
  const OctavoOp* ahead = nullptr;  // the attention whose pages a Gemm fetches; null: none
  std::vector<Phase> parts = {};    // of kRowwise
};

bool is_gated(const OctavoOp& op) { return op.kind == OCTAVO_NORM_GATED_LINEAR; }

Epilogue epilogue_of(const OctavoOp& op) {
  if (op.kind == OCTAVO_LINEAR_RESIDUAL) return Epilogue::kAddResidual;
  if (!is_gated(op)) return Epilogue::kStore;
  return op.activation == OCTAVO_SILU ? Epilogue::kSilu : Epilogue::kGeluTanh;
}

int profiled_kind(const Phase& phase) {
  if (phase.kind == PhaseKind::kRowwise) return OCTAVO_PROFILE_ROWWISE;
  return phase.kind == PhaseKind::kPrepare ? OCTAVO_PROFILE_PREPARE : phase.op->kind;
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

// Where time goes: see octavo_program_profile.
struct Profile {
  bool on = false;
  int64_t ns[OCTAVO_PROFILE_SIZE] = {};
  int64_t num_phases[OCTAVO_PROFILE_SIZE] = {};
};

// Rows as Gemms read them.
struct PreparedRows {
  LineVector<Activation> normed;  // [rows, normed_stride]
  std::vector<char> quantized;    // [rows, quantized_stride]

  void resize(int64_t num_rows, int64_t normed_stride, int64_t quantized_stride) {
    normed.resize(num_rows * normed_stride);
    quantized.resize(num_rows * quantized_stride);
  }
};

// A thread's own.
struct PrivateRows {
  PreparedRows prepared;
  LineVector<char> passed;  // what an operation passes to the next one: see Program::bytes_passed
};

class Program {
 public:
  Program(ThreadPool& threads, const OctavoProgramInfo& info);

  bool check(const OctavoStep& step, const OctavoCache& cache, const IndexError& error) const;
  void run(const OctavoStep& step, const OctavoCache& cache, float* logits);

  Profile profile;

 private:
  friend class StepJob;

  bool check_tokens(const OctavoStep& step, const OctavoCache& cache, const IndexError& error) const;
  bool check_sequence(const OctavoStep& step, const OctavoCache& cache, int s, const IndexError& error) const;

  int64_t bytes_passed(const OctavoOp& op) const;
  void reserve_private_rows();

  // Whether `op` reads keys and values, or what came of them, and nothing writes any after it.
  bool is_after_last_kv(const OctavoOp& op) const { return &op - ops_.data() >= last_attention_; }

  ThreadPool& threads_;
  OctavoProgramInfo info_;
  std::vector<OctavoOp> ops_;
  ptrdiff_t last_attention_;  // into ops_
  std::vector<OctavoBuffer> buffers_;
  int32_t max_positions_;
  int64_t normed_stride_ = 0;
  int64_t quantized_stride_ = 0;
  PreparedRows prepared_;                  // of max_batch_tokens
  std::vector<PrivateRows> private_rows_;  // by thread
  int rows_at_once_ = 0;                   // of kRowwise
  ExpertsWork experts_;
  PieceSums piece_sums_;
};

// One step: the phases of the program for this batch, and the code of their items.
class StepJob : public Job {
 public:
  StepJob(Program& program, const OctavoStep& step, const OctavoCache& cache, float* logits);

  const std::vector<int>& items_per_phase() const { return items_per_phase_; }
  void run_items(int phase, int begin, int end, int thread) override;
  bool has_runs(int phase) const override;
  MemoryRange first_read(int phase, int item) const override;
  void phase_begins(int phase) override;

 private:
  bool attends_at_once(const OctavoOp& op, const OctavoOp* next);
  void add_phases(const OctavoOp& op, const OctavoOp* next);
  void add_phase(PhaseKind kind, const OctavoOp& op, int num_rows, int num_items);
  void add_gemm(PhaseKind kind, const OctavoOp& op, int num_rows);
  void add_prepared_gemm(const OctavoOp& op, int num_rows);
  void add_experts(const OctavoOp& op, int num_rows);
  void join_rowwise_phases();
  void prepare_rows(const Phase& phase, int begin, int end, PreparedRows& output) const;
  void prepare_row(const OctavoOp& op, const void* input, PreparedRows& output, int64_t index) const;
  void run_private_gemm(int phase, int begin, int end, int thread);
  void run_item(int phase, int item);
  void run_rowwise_item(int phase, int item, int thread);
  void run_rows(const Phase& part, int begin, int end, PrivateRows& rows, bool takes, bool passes, ReadAhead* ahead) const;
  void run_rotary(const OctavoOp& op, int begin, int end, int first_kv_head, int num_kv_heads) const;
  void run_rotary(const OctavoOp& op, const float* qkv, int token, int first_kv_head, int num_kv_heads) const;
  void fetch_to_write_kv(const OctavoOp& op, int unit) const;
  void run_rotary_attention(int phase, int unit);
  void run_attention(int phase, int unit);
  void plan_ahead();
  ReadAhead* ahead_of(int phase, int thread);
  void keep_needed_rows(const OctavoOp& attention, int item) const;
  AttentionData attention_data(const OctavoOp& op) const;
  bf16* layer_pages(const OctavoOp& op, int64_t block) const;

  // What `op` computes: after the last keys and values are written, only rows that logits come from.
  const OctavoStep& step_of(const OctavoOp& op) const {
    return program_.is_after_last_kv(op) ? needed_rows_.step() : step_;
  }
  bool drops_rows(const OctavoOp& op) const { return needed_rows_.are_fewer() && program_.is_after_last_kv(op); }
  AttentionPlan& plan_of(const OctavoOp& op) { return drops_rows(op) ? *last_attention_ : attention_; }

  template <class T>
  T* row(int buffer, int64_t index) const {
    const OctavoBuffer& b = program_.buffers_[buffer];
    return static_cast<T*>(b.data) + index * b.stride;
  }

  // What `op` reads and writes of a row: float32 or activations.
  const char* input_row(const OctavoOp& op, int64_t index) const {
    const bool is_float = op.norm.weight != nullptr || op.kind == OCTAVO_ROTARY_WRITE_KV;
    return is_float ? reinterpret_cast<const char*>(row<float>(op.input, index))
                    : reinterpret_cast<const char*>(row<Activation>(op.input, index));
  }
  char* output_row(const OctavoOp& op, int64_t index) const {
    return is_gated(op) ? reinterpret_cast<char*>(row<Activation>(op.output, index))
                        : reinterpret_cast<char*>(row<float>(op.output, index));
  }

  Program& program_;
  const OctavoStep& step_;
  const OctavoCache& cache_;
  float* const logits_;
  std::vector<Phase> phases_;
  std::vector<int> items_per_phase_;
  const NeededRows needed_rows_;
  AttentionPlan attention_;
  std::optional<AttentionPlan> last_attention_;  // of the last layer, where it drops rows
  int measured_phase_ = -1;  // began at phase_start_
  std::chrono::steady_clock::time_point phase_start_;
  std::vector<int> private_phase_;  // by thread: the phase whose rows its own memory holds
  struct alignas(64) ThreadAhead {
    const OctavoOp* op = nullptr;
    PagesAhead pages;
  };
  std::vector<ThreadAhead> ahead_;  // by thread
};

// ---------------------------------------------------------------- program

Program::Program(ThreadPool& threads, const OctavoProgramInfo& info)
    : threads_(threads),
      info_(info),
      ops_(info.ops, info.ops + info.num_ops),
      last_attention_(info.num_ops),
      buffers_(info.buffers, info.buffers + info.num_buffers),
      max_positions_(std::numeric_limits<int32_t>::max()) {
  for (const OctavoOp& op : ops_) {
    if (op.kind == OCTAVO_PAGED_ATTENTION) last_attention_ = &op - ops_.data();
    if (op.kind == OCTAVO_ROTARY_WRITE_KV) max_positions_ = std::min(max_positions_, op.max_positions);
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
  if (next->kind != OCTAVO_ROTARY_WRITE_KV && next->kind != OCTAVO_LINEAR_RESIDUAL) return 0;
  for (const OctavoOp* later = next + 1; later < end; ++later) {
    if (later->input == op.output) return 0;
    if (later->output == op.output) break;
  }
  const int64_t stride = buffers_[op.output].stride;
  if (op.kind == OCTAVO_NORM_LINEAR) return stride * int64_t{sizeof(float)};
  return op.kind == OCTAVO_NORM_GATED_LINEAR ? stride * int64_t{sizeof(Activation)} : 0;
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
      needed_rows_(step),
      attention_(step, program.threads_.num_threads(), program.piece_sums_),
      private_phase_(program.threads_.num_threads(), -1),
      ahead_(program.threads_.num_threads()) {
  if (needed_rows_.are_fewer())
    last_attention_.emplace(needed_rows_.step(), program.threads_.num_threads(), program.piece_sums_);
  const OctavoOp* end = program.ops_.data() + program.ops_.size();
  for (const OctavoOp& op : program.ops_) add_phases(op, &op + 1 == end ? nullptr : &op + 1);
  if constexpr (kJoinsRowwise) join_rowwise_phases();
  plan_ahead();
}

// Join neighbours that do something with each row of the same rows.
void StepJob::join_rowwise_phases() {
  const int num_threads = program_.threads_.num_threads();
  const auto can_join = [&](const Phase& phase) {
    if (phase.op->kind == OCTAVO_LOGITS || phase.op->kind == OCTAVO_NORM_EXPERTS_RESIDUAL) return false;
    return phase.kind == PhaseKind::kEmbed || phase.kind == PhaseKind::kPrepare || phase.kind == PhaseKind::kGemm ||
           phase.kind == PhaseKind::kRotary;
  };
  std::vector<Phase> phases;
  std::vector<int> items_per_phase;
  for (size_t i = 0; i < phases_.size(); ++i) {
    const int num_rows = phases_[i].num_rows;
    size_t end = i;
    if (num_rows >= kFewestRowwiseRows * num_threads)
      while (end < phases_.size() && phases_[end].num_rows == num_rows && can_join(phases_[end])) ++end;
    if (end < i + 2) {
      phases.push_back(std::move(phases_[i]));
      items_per_phase.push_back(items_per_phase_[i]);
      continue;
    }
    Phase joined{PhaseKind::kRowwise, phases_[i].op, num_rows, Gemm{}, GemmItems{}};
    joined.parts.assign(phases_.begin() + i, phases_.begin() + end);
    phases.push_back(std::move(joined));
    const int64_t num_tiles = divide_up(num_rows, kMaxTileRows), tiles_at_once = program_.rows_at_once_ / kMaxTileRows;
    items_per_phase.push_back(static_cast<int>(round_up(divide_up(num_tiles, tiles_at_once), num_threads)));
    i = end - 1;
  }
  phases_ = std::move(phases);
  items_per_phase_ = std::move(items_per_phase);
}

// Every Gemm since the attention before fetches for the next one.
void StepJob::plan_ahead() {
  const OctavoOp* attention = nullptr;
  for (size_t i = phases_.size(); i-- > 0;) {
    const bool is_attention = phases_[i].kind == PhaseKind::kRotaryAttention || phases_[i].kind == PhaseKind::kAttention;
    if (is_attention && plan_of(*phases_[i].op).can_read_ahead(*phases_[i].op)) attention = phases_[i].op;
    phases_[i].ahead = attention;
  }
}

// Whether rotary and the attention after it are one phase: each unit of attention then rotates its
// own heads first, and waits for nobody.
bool StepJob::attends_at_once(const OctavoOp& op, const OctavoOp* next) {
  return op.kind == OCTAVO_ROTARY_WRITE_KV && next != nullptr && next->kind == OCTAVO_PAGED_ATTENTION &&
         next->input == op.output && next->layer == op.layer && !drops_rows(*next) && attention_.is_self_contained(*next);
}

void StepJob::add_phases(const OctavoOp& op, const OctavoOp* next) {
  const int num_tokens = step_of(op).num_tokens, num_logits_rows = step_of(op).num_logits_rows;
  switch (op.kind) {
    case OCTAVO_EMBED:
      add_phase(PhaseKind::kEmbed, op, num_tokens, static_cast<int>(divide_up(num_tokens, kRowsPerItem)));
      break;
    case OCTAVO_ROTARY_WRITE_KV:
      if (!attends_at_once(op, next))
        add_phase(PhaseKind::kRotary, op, num_tokens, static_cast<int>(divide_up(num_tokens, kRowsPerItem)));
      break;
    case OCTAVO_PAGED_ATTENTION: {
      const bool at_once = &op != program_.ops_.data() && attends_at_once(*(&op - 1), &op);
      if (drops_rows(op)) add_phase(PhaseKind::kKeepNeededRows, op, num_tokens, 2);
      add_phase(at_once ? PhaseKind::kRotaryAttention : PhaseKind::kAttention, op, num_tokens, plan_of(op).prepare(op));
      break;
    }
    case OCTAVO_LINEAR_RESIDUAL:
      if (is_quantized(op.linear)) {
        add_prepared_gemm(op, num_tokens);
      } else {
        add_gemm(PhaseKind::kGemm, op, num_tokens);
      }
      break;
    case OCTAVO_NORM_EXPERTS_RESIDUAL:
      add_experts(op, num_tokens);
      break;
    case OCTAVO_HIDDEN:
      add_phase(PhaseKind::kHidden, op, num_logits_rows, static_cast<int>(divide_up(num_logits_rows, kRowsPerItem)));
      break;
    case OCTAVO_NORM_LINEAR:
    case OCTAVO_NORM_GATED_LINEAR:
    case OCTAVO_LOGITS:
      add_prepared_gemm(op, op.kind == OCTAVO_LOGITS ? num_logits_rows : num_tokens);
      break;
  }
}

void StepJob::add_prepared_gemm(const OctavoOp& op, int num_rows) {
  if (num_rows <= kPrivateRows) {
    add_gemm(PhaseKind::kPrepareGemm, op, num_rows);
  } else {
    add_phase(PhaseKind::kPrepare, op, num_rows, static_cast<int>(divide_up(num_rows, kRowsPerItem)));
    add_gemm(PhaseKind::kGemm, op, num_rows);
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
    gemm.input = row<Activation>(op.input, 0);
    gemm.input_stride = program_.buffers_[op.input].stride;
  } else {
    gemm.input = program_.prepared_.normed.data();
    gemm.input_stride = program_.normed_stride_;
  }
  if (is_quantized(op.linear))
    gemm.quantized_input = {program_.prepared_.quantized.data(), program_.quantized_stride_};
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

void StepJob::add_experts(const OctavoOp& op, int num_rows) {
  const int num_threads = program_.threads_.num_threads();
  if (num_rows == 0) return;
  add_phase(PhaseKind::kPrepare, op, num_rows, static_cast<int>(divide_up(num_rows, kRowsPerItem)));
  add_gemm(PhaseKind::kGemm, op, num_rows);
  add_phase(PhaseKind::kChoose, op, num_rows, 1);
  add_phase(PhaseKind::kGather, op, num_rows, ExpertsWork::num_gather_items(op, num_rows));
  add_phase(PhaseKind::kExpertsGated, op, num_rows, ExpertsWork::num_gated_items(op, num_rows, num_threads));
  add_phase(PhaseKind::kExpertsDown, op, num_rows, ExpertsWork::num_down_items(op, num_threads));
}

// A thread that goes on to the neighbouring weights has set out to fetch them already.
bool StepJob::has_runs(int index) const {
  return phases_[index].kind == PhaseKind::kGemm || phases_[index].kind == PhaseKind::kPrepareGemm;
}

void StepJob::run_items(int index, int begin, int end, int thread) {
  const Phase& phase = phases_[index];
  switch (phase.kind) {
    case PhaseKind::kGemm:
      run_gemm_items(phase.gemm, phase.gemm_items, begin, end, ahead_of(index, thread));
      break;
    case PhaseKind::kPrepareGemm:
      run_private_gemm(index, begin, end, thread);
      break;
    case PhaseKind::kRowwise:
      for (int item = begin; item < end; ++item) run_rowwise_item(index, item, thread);
      break;
    default:
      for (int item = begin; item < end; ++item) run_item(index, item);
  }
}

void StepJob::run_item(int index, int item) {
  const Phase& phase = phases_[index];
  const OctavoOp& op = *phase.op;
  const int begin = item * kRowsPerItem;
  const int end = std::min(begin + kRowsPerItem, phase.num_rows);
  switch (phase.kind) {
    case PhaseKind::kEmbed:
      for (int t = begin; t < end; ++t) embed_token(op, step_.token_ids[t], row<float>(op.output, t));
      break;
    case PhaseKind::kPrepare:
      prepare_rows(phase, begin, end, program_.prepared_);
      break;
    case PhaseKind::kGemm:
    case PhaseKind::kPrepareGemm:
    case PhaseKind::kRowwise:  // see run_items
      break;
    case PhaseKind::kRotary:
      run_rotary(op, begin, end, 0, op.num_kv_heads);
      break;
    case PhaseKind::kAttention:
      run_attention(index, item);
      break;
    case PhaseKind::kRotaryAttention:
      run_rotary_attention(index, item);
      break;
    case PhaseKind::kKeepNeededRows:
      keep_needed_rows(op, item);
      break;
    case PhaseKind::kChoose:
      program_.experts_.choose(op, phase.num_rows);
      break;
    case PhaseKind::kGather:
      program_.experts_.gather(program_.prepared_.normed.data(), program_.normed_stride_, item);
      break;
    case PhaseKind::kExpertsGated:
      program_.experts_.run_gated(op, program_.prepared_.normed.data(), program_.normed_stride_, item, items_per_phase_[index]);
      break;
    case PhaseKind::kExpertsDown:
      program_.experts_.run_down(op, row<float>(op.output, 0), program_.buffers_[op.output].stride, item,
                                 items_per_phase_[index]);
      break;
    case PhaseKind::kHidden:
      for (int r = begin; r < end; ++r)
        norm_row_exact(op.norm, row<float>(op.input, step_of(op).logits_rows[r]), logits_ + int64_t{r} * op.norm.size);
      break;
  }
}

void StepJob::phase_begins(int index) {
  Profile& profile = program_.profile;
  if (!profile.on) return;
  const auto now = std::chrono::steady_clock::now();
  if (measured_phase_ >= 0) {
    const Phase& phase = phases_[measured_phase_];
    const int kind = profiled_kind(phase);
    profile.ns[kind] += std::chrono::nanoseconds(now - phase_start_).count();
    ++profile.num_phases[kind];
  }
  measured_phase_ = index;
  phase_start_ = now;
}

MemoryRange StepJob::first_read(int index, int item) const {
  const Phase& phase = phases_[index];
  if (phase.kind != PhaseKind::kGemm && phase.kind != PhaseKind::kPrepareGemm) return {};
  const MemoryRange weights = weights_of_gemm_item(phase.gemm, phase.gemm_items, item);
  return {weights.begin, std::min<size_t>(weights.size, kBytesFetchedAhead)};
}

void StepJob::prepare_row(const OctavoOp& op, const void* input, PreparedRows& output, int64_t index) const {
  Activation* const normed = output.normed.data() + index * program_.normed_stride_;
  const bool has_norm = op.norm.weight != nullptr;
  if (has_norm) norm_row(op.norm, static_cast<const float*>(input), normed);
  if (is_quantized(op.linear))
    quantize_row(has_norm ? normed : static_cast<const Activation*>(input), op.linear.in_features,
                 output.quantized.data() + index * program_.quantized_stride_);
}

void StepJob::prepare_rows(const Phase& phase, int begin, int end, PreparedRows& output) const {
  const OctavoOp& op = *phase.op;
  for (int r = begin; r < end; ++r) {
    const int token = op.kind == OCTAVO_LOGITS ? step_of(op).logits_rows[r] : r;
    prepare_row(op, input_row(op, token), output, r);
  }
}

// All parts over some rows, which begin and end where tiles do.
void StepJob::run_rowwise_item(int index, int item, int thread) {
  const Phase& phase = phases_[index];
  const int64_t num_items = items_per_phase_[index], num_tiles = divide_up(phase.num_rows, kMaxTileRows);
  const int begin = static_cast<int>(num_tiles * item / num_items * kMaxTileRows);
  const int end = std::min(phase.num_rows, static_cast<int>(num_tiles * (item + 1) / num_items * kMaxTileRows));
  const OctavoOp* const last_op = phase.parts.back().op;
  const auto passes = [&](const OctavoOp& op) { return &op < last_op && program_.bytes_passed(op) > 0; };
  for (const Phase& part : phase.parts) {
    const OctavoOp& op = *part.op;
    run_rows(part, begin, end, program_.private_rows_[thread], &op > phase.op && passes(*(&op - 1)), passes(op),
             ahead_of(index, thread));
  }
}

// One part. What it takes of the one before or passes to the one after lies in the thread's own memory.
void StepJob::run_rows(const Phase& part, int begin, int end, PrivateRows& rows, bool takes, bool passes,
                       ReadAhead* ahead) const {
  const OctavoOp& op = *part.op;
  const auto input = [&](int r) {
    return takes ? rows.passed.data() + (r - begin) * program_.bytes_passed(*(&op - 1)) : input_row(op, r);
  };
  switch (part.kind) {
    case PhaseKind::kEmbed:
      for (int t = begin; t < end; ++t) embed_token(op, step_.token_ids[t], row<float>(op.output, t));
      break;
    case PhaseKind::kPrepare:
      for (int r = begin; r < end; ++r) prepare_row(op, input(r), rows.prepared, r - begin);
      break;
    case PhaseKind::kRotary:
      for (int t = begin; t < end; ++t)
        run_rotary(op, reinterpret_cast<const float*>(input(t)), t, 0, op.num_kv_heads);
      break;
    default: {
      Gemm gemm = part.gemm;
      gemm.num_rows = end - begin;
      gemm.input = op.kind == OCTAVO_LINEAR_RESIDUAL ? reinterpret_cast<const Activation*>(input(begin)) : rows.prepared.normed.data();
      if (is_quantized(op.linear)) gemm.quantized_input.data = rows.prepared.quantized.data();
      gemm.output = passes ? rows.passed.data() : output_row(op, begin);
      run_gemm_blocks(gemm, 0, part.gemm_items.num_blocks, ahead);
    }
  }
}

void StepJob::run_private_gemm(int index, int begin, int end, int thread) {
  const Phase& phase = phases_[index];
  PreparedRows& rows = program_.private_rows_[thread].prepared;
  if (private_phase_[thread] != index) {
    // This waits for rows that another thread has just written; the weights set out meanwhile.
    const MemoryRange weights = weights_of_gemm_item(phase.gemm, phase.gemm_items, begin);
    for (size_t i = 0; i < std::min(weights.size, kBytesFetchedBeforeRows); i += 64) prefetch_l2(weights.begin + i);
    prepare_rows(phase, 0, phase.num_rows, rows);
    private_phase_[thread] = index;
  }
  Gemm gemm = phase.gemm;
  gemm.input = rows.normed.data();
  if (is_quantized(*gemm.linear)) gemm.quantized_input.data = rows.quantized.data();
  run_gemm_items(gemm, phase.gemm_items, begin, end, ahead_of(index, thread));
}

// What a thread has still to fetch for the attention after a phase.
ReadAhead* StepJob::ahead_of(int index, int thread) {
  const OctavoOp* op = phases_[index].ahead;
  if (op == nullptr) return nullptr;
  ThreadAhead& ahead = ahead_[thread];
  if (ahead.op != op)
    ahead = {op, PagesAhead(plan_of(*op), *op, attention_data(*op), thread, program_.threads_.num_threads())};
  return &ahead.pages;
}

bf16* StepJob::layer_pages(const OctavoOp& op, int64_t block) const {
  const int64_t layer_size = int64_t{2} * op.num_kv_heads * op.head_dim * kBlockTokens;
  return cache_.data + (block * program_.info_.num_layers + op.layer) * layer_size;
}

void StepJob::run_rotary(const OctavoOp& op, int begin, int end, int first_kv_head, int num_kv_heads) const {
  for (int t = begin; t < end; ++t) run_rotary(op, row<float>(op.input, t), t, first_kv_head, num_kv_heads);
}

void StepJob::run_rotary(const OctavoOp& op, const float* qkv, int token, int first_kv_head, int num_kv_heads) const {
  const int32_t slot = step_.slot_mapping[token];
  rotary_write_kv(op, qkv, step_.positions[token], first_kv_head, num_kv_heads, layer_pages(op, slot / kBlockTokens),
                  slot % kBlockTokens, row<Activation>(op.output, token));
}

// A key is spread over all lines of its page: without this, the writes would wait for one after the other.
void StepJob::fetch_to_write_kv(const OctavoOp& op, int unit) const {
  const AttentionItem& item = attention_.items()[unit / op.num_kv_heads];
  const int64_t page_size = int64_t{op.head_dim} * kBlockTokens;
  for (int t = item.first_token; t < item.first_token + item.num_tokens; ++t) {
    const int32_t slot = step_.slot_mapping[t];
    const bf16* keys = layer_pages(op, slot / kBlockTokens) + unit % op.num_kv_heads * 2 * page_size;
    const bf16* values = keys + page_size + slot % kBlockTokens / 2 * op.head_dim * 2;
    for (int64_t i = 0; i < page_size; i += 32) prefetch_to_write(keys + i);
    for (int64_t i = 0; i < op.head_dim * 2; i += 32) prefetch_to_write(values + i);
  }
}

void StepJob::run_rotary_attention(int phase, int unit) {
  const OctavoOp& op = *phases_[phase].op;
  const AttentionItem& item = attention_.items()[unit / op.num_kv_heads];
  fetch_to_write_kv(op, unit);
  if (unit + 1 < items_per_phase_[phase]) fetch_to_write_kv(op, unit + 1);
  run_rotary(*(&op - 1), item.first_token, item.first_token + item.num_tokens, unit % op.num_kv_heads, 1);
  run_attention(phase, unit);
}

void StepJob::run_attention(int phase, int unit) {
  const OctavoOp& op = *phases_[phase].op;
  plan_of(op).run_unit(op, unit, items_per_phase_[phase], attention_data(op));
}

// The queries, and the residual: the operations from here on read nothing else of before.
void StepJob::keep_needed_rows(const OctavoOp& attention, int item) const {
  const int residual = program_.ops_.back().input;
  if (item == 0) {
    needed_rows_.move(row<Activation>(attention.input, 0), program_.buffers_[attention.input].stride);
  } else {
    needed_rows_.move(row<float>(residual, 0), program_.buffers_[residual].stride);
  }
}

AttentionData StepJob::attention_data(const OctavoOp& op) const {
  return {layer_pages(op, 0), layer_pages(op, 1) - layer_pages(op, 0), row<Activation>(op.input, 0), row<Activation>(op.output, 0),
          program_.buffers_[op.input].stride};
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

void octavo_program_profile(OctavoProgram* program, int32_t on, int64_t* ns, int64_t* num_phases) {
  Profile& profile = program->program.profile;
  std::copy(profile.ns, profile.ns + OCTAVO_PROFILE_SIZE, ns);
  std::copy(profile.num_phases, profile.num_phases + OCTAVO_PROFILE_SIZE, num_phases);
  profile = Profile{};
  profile.on = on != 0;
}
