// A step of a program: what its threads do, in phases.
#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <vector>

#include "abi.h"
#include "attention_plan.h"
#include "gemm.h"
#include "needed_rows.h"
#include "program.h"
#include "thread_pool.h"

namespace octavo {

enum class PhaseKind {
  kEmbed,
  kPrepare,       // norm and quantise the rows that a Gemm reads
  kMultiplyRanks,  // A of each row's adapter times these rows
  kGemm,          // over rows that are ready
  kPrepareGemm,   // over rows that each thread prepares for itself
  kRotary,
  kAttention,
  kRotaryAttention,
  kKeepNeededRows,
  kChoose,         // experts for each row
  kSort,           // the rows by expert
  kChooseAndSort,  // both at once, by one thread
  kGather,
  kExpertsGated,
  kExpertsDown,
  kHidden,
  kNormResidual,
  kRotateQueries,
  kWriteLatent,
  kHeadLinear,
  kRowwise,  // some of these, one after the other over a few rows, whose values stay in a thread's cache
};

constexpr int kRowsPerItem = 4;  // of embedding, norm and rotary

// What the threads do between two barriers. An operation becomes one phase or more.
struct Phase {
  PhaseKind kind;
  const OctavoOp* op;  // for kRotaryAttention the second of the two, for kRowwise the first of all
  int num_rows;
  Gemm gemm;
  GemmItems gemm_items;
  const OctavoOp* ahead = nullptr;  // the attention whose pages a Gemm fetches; null: none
  std::vector<Phase> parts = {};    // of kRowwise
  int rows_per_item = kRowsPerItem;  // of what works row by row
  int prepared_by = -1;  // the phase whose rows, which each thread prepares for itself, are those of this one
  bool reads_private_rows = false;  // of kMultiplyRanks
};

// Whether the rows that `op` multiplies are activations as they come, not the norm of a residual.
inline bool reads_activations(const OctavoOp& op) { return op.kind == OCTAVO_LINEAR_RESIDUAL || op.kind == OCTAVO_LINEAR; }
inline bool is_gated(const OctavoOp& op) { return op.kind == OCTAVO_NORM_GATED_LINEAR; }

// One step: the phases of the program for this batch, and the code of their items.
class StepJob : public Job {
 public:
  StepJob(Program& program, const OctavoStep& step, const OctavoCache& cache, float* logits);

  const std::vector<int>& items_per_phase() const { return items_per_phase_; }
  // After the job, which computes logits.
  void write_best_tokens(int32_t* tokens) const;
  void run_items(int phase, int begin, int end, int thread) override;
  bool has_runs(int phase) const override;
  MemoryRange first_read(int phase, int item) const override;
  void phase_begins(int phase) override;

 private:
  bool attends_at_once(const OctavoOp& op, const OctavoOp* next);
  void add_phases(const OctavoOp& op, const OctavoOp* next);
  void add_phase(PhaseKind kind, const OctavoOp& op, int num_rows, int num_items);
  void add_gemm(PhaseKind kind, const OctavoOp& op, int num_rows);
  bool prepares_for_itself(const OctavoOp& op, int num_rows) const;
  void add_prepare(const OctavoOp& op, int num_rows);
  void add_prepared_gemm(const OctavoOp& op, int num_rows);
  int64_t ranks_of(const OctavoOp& op) const;
  void add_multiply_ranks(const OctavoOp& op, bool reads_private_rows);
  void run_multiply_ranks(int phase, int item, int thread);
  PreparedRows& private_rows(int phase, int item, int thread);
  void add_experts(const OctavoOp& op, int num_rows);
  void join_rowwise_phases();
  void prepare_rows(const Phase& phase, int begin, int end, PreparedRows& output) const;
  void prepare_row(const OctavoOp& op, const void* input, PreparedRows& output, int64_t index) const;
  void run_gemm(int phase, Gemm gemm, int begin, int end, int thread);
  void run_private_gemm(int phase, int begin, int end, int thread);
  void run_item(int phase, int item);
  void run_rowwise_item(int phase, int item, int thread);
  void run_rows(const Phase& part, int begin, int end, PrivateRows& rows, bool takes, bool passes, ReadAhead* ahead) const;
  void run_rotary(const OctavoOp& op, const char* qkv, int begin, int end, int first_kv_head, int num_kv_heads) const;
  void fetch_to_write_kv(const OctavoOp& op, int unit) const;
  void run_rotary_attention(int phase, int unit);
  void run_attention(int phase, int unit);
  void run_head_linear(const OctavoOp& op, int num_rows, int item) const;
  void plan_ahead();
  ReadAhead* ahead_of(int phase, int thread);
  void keep_needed_rows(const OctavoOp& attention, int item) const;
  AttentionData attention_data(const OctavoOp& op) const;
  bf16* layer_pages(const OctavoOp& op, int64_t block) const;

  // What `op` computes: after the last keys and values are written, only rows that logits come from.
  const OctavoStep& step_of(const OctavoOp& op) const {
    return program_.is_after_last_kv(op) ? needed_rows_.step() : step_;
  }
  // The rows of it that have adapters.
  const std::vector<int>& adapter_rows_of(const OctavoOp& op) const {
    return drops_rows(op) ? needed_adapter_rows_ : adapter_rows_;
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
  std::vector<int> adapter_rows_;         // that have adapters, by adapter
  std::vector<int> needed_adapter_rows_;  // the same of the needed rows
  std::vector<AdapterRows> adapters_;     // by number of the operation
  int measured_phase_ = -1;  // began at phase_start_
  std::chrono::steady_clock::time_point phase_start_;
  std::vector<LineVector<RowBest>> best_;  // by thread: of each row of logits
  struct alignas(64) OfThread {
    int private_phase = -1;  // the phase whose rows its own memory holds
    const OctavoOp* ahead = nullptr;
    PagesAhead pages;  // of `ahead`
  };
  std::vector<OfThread> of_threads_;
};

}  // namespace octavo
