#include "step_job.h"

#include <algorithm>
#include <limits>

#include "elementwise.h"
#include "experts.h"

namespace octavo {
namespace {

// Where each thread has so many rows, what is done row by row between two attentions is one phase: see kRowwise.
constexpr int kFewestRowwiseRows = 256;
// In tiles, rows are multiplied so fast that weights for so few cannot arrive in time.
#if defined(OCTAVO_AMX)
constexpr bool kJoinsRowwise = false;
#else
constexpr bool kJoinsRowwise = true;
#endif

// What it takes to norm and to quantise an element, and all threads to wait for each other: the more there are, the more each
// has to look at. Measured with the rows in the cache.
constexpr double kNsOfNorm = 0.08, kNsOfQuantising = 0.19, kNsOfWait = 1000.0, kNsOfWaitPerThread = 50.0;

constexpr int kRowsPerHeadItem = 64;  // of one head's product

constexpr int kRowsChosenByOneThread = 16;  // experts for more are worth a wait

// With fewer rows for each thread, the ranks of a row are dealt out as well.
constexpr int kFewestAdapterRows = 4;
constexpr int kRanksPerItem = 16;

constexpr size_t kBytesFetchedAhead = 256 << 10;  // by a thread that waits; a fraction of its cache
constexpr size_t kBytesFetchedBeforeRows = 2 << 10;

// Logits of so many rows fill the caches that weights pass through, and no core reads them right after. AMD's cores then wait
// less for their own weights; Intel's were not tried.
const int kRowsOfLogitsInCache = vendor() == Vendor::kAmd ? kMaxTileRows : std::numeric_limits<int>::max();

Epilogue epilogue_of(const OctavoOp& op) {
  if (op.kind == OCTAVO_LOGITS) return Epilogue::kLogits;
  if (op.kind == OCTAVO_LINEAR_RESIDUAL) return Epilogue::kAddResidual;
  if (!is_gated(op)) return Epilogue::kStore;
  return gated_epilogue(op.activation);
}

int profiled_kind(const Phase& phase) {
  if (phase.kind == PhaseKind::kRowwise) return OCTAVO_PROFILE_ROWWISE;
  return phase.kind == PhaseKind::kPrepare ? OCTAVO_PROFILE_PREPARE : phase.op->kind;
}

}  // namespace

StepJob::StepJob(Program& program, const OctavoStep& step, const OctavoCache& cache, float* logits)
    : program_(program),
      step_(step),
      cache_(cache),
      logits_(logits),
      needed_rows_(step),
      attention_(step, program.threads_.num_threads(), program.piece_sums_),
      best_(program.threads_.num_threads(), LineVector<RowBest>(step.num_logits_rows)),
      of_threads_(program.threads_.num_threads()) {
  if (needed_rows_.are_fewer())
    last_attention_.emplace(needed_rows_.step(), program.threads_.num_threads(), program.piece_sums_);
  if (step.adapter_ids != nullptr) {
    adapter_rows_ = rows_by_adapter(step);
    if (needed_rows_.are_fewer()) needed_adapter_rows_ = rows_by_adapter(needed_rows_.step());
    adapters_.resize(program.ops_.size());  // before phases point to them
  }
  const OctavoOp* end = program.ops_.data() + program.ops_.size();
  for (const OctavoOp& op : program.ops_) add_phases(op, &op + 1 == end ? nullptr : &op + 1);
  for (AdapterRows& rows : adapters_) rows.products = program.adapter_products_.data();  // which no longer grow
  if (kJoinsRowwise && adapters_.empty()) join_rowwise_phases();
  plan_ahead();
}

// Join neighbours that do something with each row of the same rows.
void StepJob::join_rowwise_phases() {
  const int num_threads = program_.threads_.num_threads();
  const auto can_join = [&](const Phase& phase) {
    if (phase.op->kind == OCTAVO_LOGITS || phase.op->kind == OCTAVO_NORM_EXPERTS_RESIDUAL) return false;
    return phase.kind == PhaseKind::kEmbed || phase.kind == PhaseKind::kPrepare || phase.kind == PhaseKind::kGemm ||
           phase.kind == PhaseKind::kRotary || phase.kind == PhaseKind::kNormResidual;
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
    case OCTAVO_ROTATE_QUERIES:
      add_phase(PhaseKind::kRotateQueries, op, num_tokens, static_cast<int>(divide_up(num_tokens, kRowsPerItem)));
      break;
    case OCTAVO_WRITE_LATENT:
      add_phase(PhaseKind::kWriteLatent, op, num_tokens, static_cast<int>(divide_up(num_tokens, kRowsPerItem)));
      break;
    case OCTAVO_HEAD_LINEAR:
      add_phase(PhaseKind::kHeadLinear, op, num_tokens,
                static_cast<int>(divide_up(num_tokens, kRowsPerHeadItem)) * op.num_heads);
      break;
    case OCTAVO_NORM_RESIDUAL:
      add_phase(PhaseKind::kNormResidual, op, num_tokens, static_cast<int>(divide_up(num_tokens, kRowsPerItem)));
      break;
    case OCTAVO_LINEAR:
    case OCTAVO_LINEAR_RESIDUAL:
      if (is_quantized(op.linear)) {
        add_prepared_gemm(op, num_tokens);
      } else {
        add_multiply_ranks(op, false);
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
  if (prepares_for_itself(op, num_rows)) {
    const int first = static_cast<int>(phases_.size());
    add_multiply_ranks(op, true);
    add_gemm(PhaseKind::kPrepareGemm, op, num_rows);
    for (size_t phase = first; phase < phases_.size(); ++phase) phases_[phase].prepared_by = first;
  } else {
    add_prepare(op, num_rows);
    add_multiply_ranks(op, false);
    add_gemm(PhaseKind::kGemm, op, num_rows);
  }
}

// The most ranks that an adapter of one of its rows adds to `op`.
int64_t StepJob::ranks_of(const OctavoOp& op) const {
  int32_t most = 0;
  const std::vector<int>& rows = adapter_rows_of(op);
  const int32_t* const ids = step_of(op).adapter_ids;
  for (size_t i = 0; i < rows.size(); ++i)
    if (i == 0 || ids[rows[i]] != ids[rows[i - 1]])
      most = std::max(most, step_.adapters[ids[rows[i]]][&op - program_.ops_.data()].num_ranks);
  return most;
}

// Nothing, where no adapter adds to `op`.
void StepJob::add_multiply_ranks(const OctavoOp& op, bool reads_private_rows) {
  if (adapters_.empty() || op.kind == OCTAVO_LOGITS) return;
  const int64_t stride = ranks_of(op), num_rows = static_cast<int64_t>(adapter_rows_of(op).size());
  if (stride == 0) return;
  const int64_t op_number = &op - program_.ops_.data(), num_threads = program_.threads_.num_threads();
  LineVector<Activation>& products = program_.adapter_products_;
  if (static_cast<int64_t>(products.size()) < step_of(op).num_tokens * stride) products.resize(step_of(op).num_tokens * stride);
  const bool are_few = num_rows < kFewestAdapterRows * num_threads;
  adapters_[op_number] = {step_of(op).adapter_ids, step_.adapters, op_number, nullptr, stride};
  const int64_t rows_per_item = are_few ? 1 : kRowsPerItem;
  const int64_t parts = are_few ? divide_up(stride, kRanksPerItem) : 1;
  add_phase(PhaseKind::kMultiplyRanks, op, static_cast<int>(num_rows), static_cast<int>(divide_up(num_rows, rows_per_item) * parts));
  phases_.back().rows_per_item = static_cast<int>(rows_per_item);
  phases_.back().reads_private_rows = reads_private_rows;
}

// Items are in the order of the rows, and of the ranks of each where they are dealt out as well.
void StepJob::run_multiply_ranks(int index, int item, int thread) {
  const Phase& phase = phases_[index];
  const OctavoOp& op = *phase.op;
  const AdapterRows& adapters = adapters_[&op - program_.ops_.data()];
  const std::vector<int>& rows = adapter_rows_of(op);
  const int num_parts = items_per_phase_[index] / static_cast<int>(divide_up(phase.num_rows, phase.rows_per_item));
  const int begin = item / num_parts * phase.rows_per_item, end = std::min(begin + phase.rows_per_item, phase.num_rows);
  const int first_rank = item % num_parts * kRanksPerItem;
  const int last_rank = num_parts == 1 ? std::numeric_limits<int>::max() : first_rank + kRanksPerItem;
  const Activation* input = program_.prepared_.normed.data();
  int64_t stride = program_.normed_stride_;
  if (reads_activations(op)) {
    input = row<Activation>(op.input, 0);
    stride = program_.buffers_[op.input].stride;
  } else if (phase.reads_private_rows) {
    input = private_rows(index, 0, thread).normed.data();
  }
  const Activation* x[kRowsPerItem];
  Activation* products[kRowsPerItem];
  for (int i = begin, next = begin; i < end; i = next) {
    const OctavoAdapterLayer* const layer = adapters.layer_of(rows[i]);
    for (; next < end && adapters.layer_of(rows[next]) == layer; ++next) {
      x[next - i] = input + rows[next] * stride;
      products[next - i] = program_.adapter_products_.data() + rows[next] * adapters.stride;
    }
    const OctavoAdapterLayer* const after = next < phase.num_rows ? adapters.layer_of(rows[next]) : nullptr;
    if (after != nullptr && after != layer && num_parts == 1) fetch_ranks(*after);
    if (layer != nullptr) multiply_ranks(*layer, x, next - i, first_rank, last_rank, products);
  }
}

// Whether each thread takes less time for all rows than for its share of them and one more wait.
bool StepJob::prepares_for_itself(const OctavoOp& op, int num_rows) const {
  if (num_rows > kPrivateRows) return false;
  const double threads = program_.threads_.num_threads();
  const double ns_of_element =
      (op.norm.weight != nullptr ? kNsOfNorm : 0.0) + (is_quantized(op.linear) ? kNsOfQuantising : 0.0);
  const double ns_of_others = ns_of_element * op.linear.in_features * num_rows * (threads - 1) / threads;
  return ns_of_others <= kNsOfWait + kNsOfWaitPerThread * threads;
}

// Few rows are dealt out one by one, so that many threads have some.
void StepJob::add_prepare(const OctavoOp& op, int num_rows) {
  const int64_t share = divide_up(num_rows, program_.threads_.num_threads());
  const int rows_per_item = static_cast<int>(std::clamp<int64_t>(share, 1, kRowsPerItem));
  add_phase(PhaseKind::kPrepare, op, num_rows, static_cast<int>(divide_up(num_rows, rows_per_item)));
  phases_.back().rows_per_item = rows_per_item;
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
  if (reads_activations(op)) {
    gemm.input = row<Activation>(op.input, 0);
    gemm.input_stride = program_.buffers_[op.input].stride;
  } else {
    gemm.input = program_.prepared_.normed.data();
    gemm.input_stride = program_.normed_stride_;
  }
  if (is_quantized(op.linear))
    gemm.quantized_input = {program_.prepared_.quantized.data(), program_.quantized_stride_};
  if (!phases_.empty() && phases_.back().kind == PhaseKind::kMultiplyRanks)
    gemm.adapters = &adapters_[&op - program_.ops_.data()];
  if (op.kind == OCTAVO_NORM_EXPERTS_RESIDUAL) {  // the router
    gemm.output = program_.experts_.logits();
    gemm.output_stride = gemm.num_columns = static_cast<int>(ExpertsWork::logits_stride(op));
  } else if (op.kind == OCTAVO_LOGITS) {
    gemm.output = logits_;
    gemm.soft_cap = op.soft_cap;
    gemm.output_stride = gemm.num_columns = op.linear.out_features;
    const bool fill_lines = reinterpret_cast<uintptr_t>(logits_) % kLineBytes == 0 && gemm.output_stride % kLanes == 0;
    gemm.skips_caches = num_rows > kRowsOfLogitsInCache && fill_lines;
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
  add_prepare(op, num_rows);
  add_gemm(PhaseKind::kGemm, op, num_rows);
  if (num_rows <= kRowsChosenByOneThread) {
    add_phase(PhaseKind::kChooseAndSort, op, num_rows, 1);
  } else {
    add_phase(PhaseKind::kChoose, op, num_rows, static_cast<int>(divide_up(num_rows, kRowsPerItem)));
    add_phase(PhaseKind::kSort, op, num_rows, 1);
  }
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
      run_gemm(index, phase.gemm, begin, end, thread);
      break;
    case PhaseKind::kPrepareGemm:
      run_private_gemm(index, begin, end, thread);
      break;
    case PhaseKind::kRowwise:
      for (int item = begin; item < end; ++item) run_rowwise_item(index, item, thread);
      break;
    case PhaseKind::kMultiplyRanks:
      for (int item = begin; item < end; ++item) run_multiply_ranks(index, item, thread);
      program_.threads_.moved(thread);
      break;
    default:
      for (int item = begin; item < end; ++item) {
        run_item(index, item);
        program_.threads_.moved(thread);
      }
  }
}

void StepJob::run_item(int index, int item) {
  const Phase& phase = phases_[index];
  const OctavoOp& op = *phase.op;
  const int begin = item * phase.rows_per_item;
  const int end = std::min(begin + phase.rows_per_item, phase.num_rows);
  switch (phase.kind) {
    case PhaseKind::kEmbed:
      for (int t = begin; t < end; ++t) embed_token(op, step_.token_ids[t], row<float>(op.output, t));
      break;
    case PhaseKind::kPrepare:
      prepare_rows(phase, begin, end, program_.prepared_);
      break;
    case PhaseKind::kGemm:
    case PhaseKind::kPrepareGemm:
    case PhaseKind::kMultiplyRanks:
    case PhaseKind::kRowwise:  // see run_items
      break;
    case PhaseKind::kRotary:
      run_rotary(op, input_row(op, begin), begin, end, 0, op.num_kv_heads);
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
      program_.experts_.choose(op, begin, end);
      break;
    case PhaseKind::kSort:
      program_.experts_.sort(op, phase.num_rows);
      break;
    case PhaseKind::kChooseAndSort:
      program_.experts_.choose(op, 0, phase.num_rows);
      program_.experts_.sort(op, phase.num_rows);
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
    case PhaseKind::kNormResidual:
      for (int t = begin; t < end; ++t) add_norm_row(op.norm, row<float>(op.input, t), row<float>(op.output, t));
      break;
    case PhaseKind::kRotateQueries:
      for (int t = begin; t < end; ++t)
        rotate_queries(op, row<float>(op.input, t), step_.positions[t], row<Activation>(op.output, t));
      break;
    case PhaseKind::kWriteLatent:
      for (int t = begin; t < end; ++t)
        write_latent(op, row<float>(op.input, t), step_.positions[t],
                     layer_pages(op, step_.slot_mapping[t] / kBlockTokens), step_.slot_mapping[t] % kBlockTokens);
      break;
    case PhaseKind::kHeadLinear:
      run_head_linear(op, phase.num_rows, item);
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
    program_.threads_.moved(thread);
  }
}

// One part. What it takes of the one before or passes to the one after lies in the thread's own memory.
void StepJob::run_rows(const Phase& part, int begin, int end, PrivateRows& rows, bool takes, bool passes,
                       ReadAhead* ahead) const {
  const OctavoOp& op = *part.op;
  if (part.kind == PhaseKind::kEmbed) {  // which reads no row
    for (int t = begin; t < end; ++t) embed_token(op, step_.token_ids[t], row<float>(op.output, t));
    return;
  }
  const char* const input = takes ? rows.passed.data() : input_row(op, begin);
  switch (part.kind) {
    case PhaseKind::kPrepare: {
      const int64_t row_bytes = input_row(op, begin + 1) - input_row(op, begin);
      for (int64_t r = 0; r < end - begin; ++r) prepare_row(op, input + r * row_bytes, rows.prepared, r);
      break;
    }
    case PhaseKind::kRotary:
      run_rotary(op, input, begin, end, 0, op.num_kv_heads);
      break;
    case PhaseKind::kNormResidual: {
      const float* rows_to_norm = reinterpret_cast<const float*>(input);
      for (int t = begin; t < end; ++t, rows_to_norm += program_.buffers_[op.input].stride)
        add_norm_row(op.norm, rows_to_norm, row<float>(op.output, t));
      break;
    }
    default: {
      Gemm gemm = part.gemm;
      gemm.num_rows = end - begin;
      gemm.input = rows.prepared.normed.data();
      if (reads_activations(op)) gemm.input = reinterpret_cast<const Activation*>(input);
      if (is_quantized(op.linear)) gemm.quantized_input.data = rows.prepared.quantized.data();
      gemm.output = passes ? rows.passed.data() : output_row(op, begin);
      run_gemm_blocks(gemm, 0, part.gemm_items.num_blocks, ahead);
    }
  }
}

// All rows of the operation, which this thread prepares for itself where it has not yet. `item` is the first that it runs then.
PreparedRows& StepJob::private_rows(int index, int item, int thread) {
  const int prepared_by = phases_[index].prepared_by;
  PreparedRows& rows = program_.private_rows_[thread].prepared;
  if (of_threads_[thread].private_phase != prepared_by) {
    const Phase& phase = phases_[index].kind == PhaseKind::kPrepareGemm ? phases_[index] : phases_[index + 1];
    // This waits for rows that another thread has just written; the weights set out meanwhile.
    const MemoryRange weights = weights_of_gemm_item(phase.gemm, phase.gemm_items, item);
    for (size_t i = 0; i < std::min(weights.size, kBytesFetchedBeforeRows); i += 64) prefetch_l2(weights.begin + i);
    prepare_rows(phase, 0, phase.num_rows, rows);
    of_threads_[thread].private_phase = prepared_by;
  }
  return rows;
}

void StepJob::run_private_gemm(int index, int begin, int end, int thread) {
  const Phase& phase = phases_[index];
  PreparedRows& rows = private_rows(index, begin, thread);
  Gemm gemm = phase.gemm;
  gemm.input = rows.normed.data();
  if (is_quantized(*gemm.linear)) gemm.quantized_input.data = rows.quantized.data();
  run_gemm(index, gemm, begin, end, thread);
}

void StepJob::run_gemm(int index, Gemm gemm, int begin, int end, int thread) {
  gemm.best = best_[thread].data();
  const GemmItems& items = phases_[index].gemm_items;
  while (begin < end) {  // one run of items of the same rows after the other, as run_gemm_items would
    const int next = std::min(end, (begin / items.num_block_items + 1) * items.num_block_items);
    run_gemm_items(gemm, items, begin, next, ahead_of(index, thread));
    program_.threads_.moved(thread);
    begin = next;
  }
  if (gemm.skips_caches) order_stores();
}

void StepJob::write_best_tokens(int32_t* tokens) const {
  for (int r = 0; r < step_.num_logits_rows; ++r) {
    RowBest best;
    for (const LineVector<RowBest>& of_thread : best_) best.merge(of_thread[r]);
    tokens[r] = best.token();
  }
}

// What a thread has still to fetch for the attention after a phase.
ReadAhead* StepJob::ahead_of(int index, int thread) {
  const OctavoOp* op = phases_[index].ahead;
  if (op == nullptr) return nullptr;
  OfThread& own = of_threads_[thread];
  if (own.ahead != op) {
    own.ahead = op;
    own.pages = PagesAhead(plan_of(*op), *op, attention_data(*op), thread, program_.threads_.num_threads());
  }
  return &own.pages;
}

bf16* StepJob::layer_pages(const OctavoOp& op, int64_t block) const {
  const int64_t layer_size = op.num_kv_heads * pages_size(op);
  return cache_.data + (block * program_.info_.num_layers + op.layer) * layer_size;
}

// Tokens [begin, end), whose queries, keys and values begin at `qkv`.
void StepJob::run_rotary(const OctavoOp& op, const char* qkv, int begin, int end, int first_kv_head, int num_kv_heads) const {
  const float* input = reinterpret_cast<const float*>(qkv);
  for (int t = begin; t < end; ++t, input += program_.buffers_[op.input].stride) {
    const int32_t slot = step_.slot_mapping[t];
    rotary_write_kv(op, input, step_.positions[t], first_kv_head, num_kv_heads, layer_pages(op, slot / kBlockTokens),
                    slot % kBlockTokens, row<Activation>(op.output, t));
  }
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
  const OctavoOp& rotary = *(&op - 1);
  run_rotary(rotary, input_row(rotary, item.first_token), item.first_token, item.first_token + item.num_tokens,
             unit % op.num_kv_heads, 1);
  run_attention(phase, unit);
}

void StepJob::run_attention(int phase, int unit) {
  const OctavoOp& op = *phases_[phase].op;
  plan_of(op).run_unit(op, unit, items_per_phase_[phase], attention_data(op));
}

// One head of some rows: the product, and behind it what is kept.
void StepJob::run_head_linear(const OctavoOp& op, int num_rows, int item) const {
  const int head = item % op.num_heads, begin = item / op.num_heads * kRowsPerHeadItem;
  const int kept = op.head_dim - op.linear.in_features;
  const int64_t num_blocks = divide_up(op.linear.out_features, kBlockColumns);
  OctavoLinear linear = op.linear;
  linear.weight += head * num_blocks * block_bytes(linear.format, linear.in_features);
  Gemm gemm{};
  gemm.input = row<Activation>(op.input, begin) + head * op.head_dim;
  gemm.input_stride = program_.buffers_[op.input].stride;
  gemm.num_rows = std::min(kRowsPerHeadItem, num_rows - begin);
  gemm.linear = &linear;
  gemm.epilogue = Epilogue::kStoreActivations;
  gemm.num_columns = linear.out_features;
  gemm.output_stride = program_.buffers_[op.output].stride;
  Activation* const output = row<Activation>(op.output, begin) + head * (linear.out_features + kept);
  gemm.output = output;
  run_gemm_blocks(gemm, 0, num_blocks);
  for (int64_t r = 0; r < gemm.num_rows; ++r)
    std::copy_n(gemm.input + r * gemm.input_stride + linear.in_features, kept,
                output + r * gemm.output_stride + linear.out_features);
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
  return {layer_pages(op, 0), layer_pages(op, 1) - layer_pages(op, 0),
          {row<Activation>(op.input, 0), program_.buffers_[op.input].stride, row<Activation>(op.output, 0),
           program_.buffers_[op.output].stride, op.sinks}};
}

}  // namespace octavo
