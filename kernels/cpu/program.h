// A recorded program: operations over a ragged batch, and the memory that they need.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "abi.h"
#include "aligned.h"
#include "attention_plan.h"
#include "check_step.h"
#include "elementwise.h"
#include "experts.h"
#include "thread_pool.h"

namespace octavo {

// At most so many rows are normed and quantised by every thread for itself, where that is cheaper than one more wait of
// all for each other: see StepJob::prepares_for_itself.
constexpr int kPrivateRows = 32;

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

  // See check_step.h.
  bool check(const OctavoStep& step, const OctavoCache& cache, const IndexError& error) const {
    return check_step(step, cache, info_, max_positions_, error);
  }
  void run(const OctavoStep& step, const OctavoCache& cache, float* logits, int32_t* best_tokens);

  Profile profile;

 private:
  friend class StepJob;

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
  LineVector<Activation> adapter_products_;  // of the operation that is computed
  PieceSums piece_sums_;
};

}  // namespace octavo
