// Linear layers over bf16 weights, in the tile registers of AMX.
#include "aligned.h"
#include "amx_steps.h"
#include "gemm_part.h"

#if defined(OCTAVO_AMX)
namespace octavo {
namespace {

// The next block's weights, fetched while this one is multiplied: a part by each tile of rows.
class AmxFetch {
 public:
  // One line in `distance` bytes is asked for.
  AmxFetch(const uint8_t* next, int64_t bytes_per_step, int64_t distance)
      : next_(reinterpret_cast<const char*>(next)), bytes_per_step_(bytes_per_step), distance_(distance) {}

  void fetch_step() {
    for (int64_t line = 0; line < bytes_per_step_; line += distance_) prefetch_l2(next_ + line);
    next_ += bytes_per_step_;
  }

 private:
  const char* next_;
  const int64_t bytes_per_step_;
  const int64_t distance_;
};

// Where one tile reads a block, one line in so many bytes is asked for, and the processor fetches those between by itself. Each one
// that is asked for has one of few places in which a core waits for memory, and tiles that are loaded from the second cache need
// these, too.
constexpr int64_t kFetchedBytes = 3 * kLineBytes;

// Weights that whole tiles of rows read, and then the rest of the rows once more: from the second cache, not from memory.
constexpr int64_t kBytesReadTwice = 512 << 10;

// Add the products of a step, of one group of rows or two. Rows are `stride` activations apart.
template <bool kHasSecond, class Steps>
inline void multiply_amx_step(const Activation* input, int64_t stride, Steps& steps) {
  constexpr int64_t kPairBytes = kBlockColumns * 2 * sizeof(bf16);
  const int64_t row_bytes = stride * sizeof(Activation);
  const bf16* const weight = steps.now();
  amx_load<4, Steps::kKeepsInput>(input, row_bytes);
  steps.template work<0>();
  amx_load<6, Steps::kKeepsWeight>(weight, kPairBytes);
  amx_multiply<0, 4, 6>();
  steps.template work<1>();
  amx_load<7, Steps::kKeepsWeight>(weight + kAmxColumns * 2, kPairBytes);
  amx_multiply<1, 4, 7>();
  steps.template work<2>();
  if constexpr (kHasSecond) {
    amx_load<5, Steps::kKeepsInput>(input + kAmxRows * stride, row_bytes);
    amx_multiply<2, 5, 6>();
    amx_multiply<3, 5, 7>();
  }
  steps.template work<3>();
  steps.advance();
}

// Hands over sums while the next ones are computed: other units of the processor do that.
class AmxSums {
 public:
  AmxSums(const Gemm& gemm, int num_rows) : gemm_(gemm), num_rows_(num_rows), next_(num_rows) {}

  // Sums of rows from `first_row` on and a block, [num_rows, kBlockColumns], are about to be stored. Those before have been
  // handed over.
  float* start(int64_t first_row, int64_t block) {
    finish(num_rows_);
    first_row_ = first_row;
    block_ = block;
    next_ = 0;
    return sums_;
  }

  // Hand over at most `num_rows` rows more.
  void finish(int num_rows) {
    num_rows = std::min(num_rows, num_rows_ - next_);
    if (num_rows > 0) finish_rows(gemm_, first_row_ + next_, num_rows, block_, sums_ + next_ * kBlockColumns);
    next_ += num_rows;
  }

 private:
  const Gemm& gemm_;
  const int num_rows_;
  int next_;
  int64_t first_row_ = 0;
  int64_t block_ = 0;
  alignas(64) float sums_[kRowsPerTile * kBlockColumns];
};

// The sums of two groups of rows, or of the first one.
template <bool kHasSecond>
inline void clear_amx_sums() {
  amx_clear<0>();
  amx_clear<1>();
  if constexpr (!kHasSecond) return;
  amx_clear<2>();
  amx_clear<3>();
}

// Rows are `stride` numbers apart.
template <bool kHasSecond>
inline void load_amx_sums(const float* sums, int64_t stride) {
  amx_load<0>(sums, stride * sizeof(float));
  amx_load<1>(sums + kAmxColumns, stride * sizeof(float));
  if constexpr (!kHasSecond) return;
  amx_load<2>(sums + kAmxRows * stride, stride * sizeof(float));
  amx_load<3>(sums + kAmxRows * stride + kAmxColumns, stride * sizeof(float));
}

template <bool kHasSecond>
inline void store_amx_sums(float* sums, int64_t stride) {
  amx_store<0>(sums, stride * sizeof(float));
  amx_store<1>(sums + kAmxColumns, stride * sizeof(float));
  if constexpr (!kHasSecond) return;
  amx_store<2>(sums + kAmxRows * stride, stride * sizeof(float));
  amx_store<3>(sums + kAmxRows * stride + kAmxColumns, stride * sizeof(float));
}

// Whether sums can grow in their place: from zero, or from what they are added to.
bool sums_grow_in_place(const Gemm& gemm, int64_t end_block) {
  if (gemm.linear->bias != nullptr) return false;
  return gemm.epilogue == Epilogue::kAddResidual ||
         (gemm.epilogue == Epilogue::kStore && end_block * kBlockColumns <= gemm.num_columns);
}

// Add the products of some inputs of up to kRowsPerTile rows and a block: more than kAmxRows with a second group. Meanwhile the
// sums before are handed over.
template <bool kHasSecond, class Steps>
void multiply_amx(const Rows& input, int num_rows, int64_t num_inputs, Steps& steps, AmxFetch& soon, AmxSums& sums) {
  const int rows_per_step = static_cast<int>(divide_up(num_rows, divide_up(num_inputs, kAmxInputs)));
  for (int64_t i = 0; i < num_inputs; i += kAmxInputs) {
    soon.fetch_step();
    if (i + kAmxInputs <= num_inputs) {
      multiply_amx_step<kHasSecond>(input.data + i, input.stride, steps);
    } else {  // with zeros behind the last input
      alignas(64) Activation rest[kRowsPerTile * kAmxInputs] = {};
      for (int row = 0; row < num_rows; ++row)
        std::copy_n(input.data + row * input.stride + i, num_inputs - i, rest + row * kAmxInputs);
      multiply_amx_step<kHasSecond>(rest, kAmxInputs, steps);
    }
    sums.finish(rows_per_step);
  }
}

// Where the sums of a tile of rows and a block are.
struct SumsPlace {
  SumsPlace(const Gemm& gemm, const BlockRange& blocks)
      : grow_in_place(sums_grow_in_place(gemm, blocks.end)),
        start_from_output(grow_in_place && gemm.epilogue == Epilogue::kAddResidual) {}
  const bool grow_in_place;
  const bool start_from_output;
};

// The others grow as they would without adapters: a row that has none knows nothing of those beside it.
void add_adapters_in_place(const Gemm& gemm, int64_t row, int num_rows, int64_t block, float* output) {
  if (gemm.adapters != nullptr) add_adapters(*gemm.adapters, row, num_rows, block, output, gemm.output_stride);
}

// Up to kRowsPerTile rows from `row` on, of some blocks.
template <bool kHasSecond, class Weights>
void run_amx_tile(const Gemm& gemm, int64_t row, int num_rows, const BlockRange& blocks, int64_t bytes_per_step) {
  const AmxShapes shapes(std::min(num_rows, kAmxRows), std::max(num_rows - kAmxRows, 0));
  AmxSums sums(gemm, num_rows);
  const SumsPlace place(gemm, blocks);
  const Rows rows{gemm.input + row * gemm.input_stride, gemm.input_stride};
  Weights weights(*gemm.linear, blocks);
  auto steps = weights.steps();
  for (int64_t block = blocks.begin; block < blocks.end; ++block) {
    AmxFetch soon(block_weights(*gemm.linear, block + 1), bytes_per_step, kFetchedBytes);
    float* const output = reinterpret_cast<float*>(output_of(gemm, row, block));
    if (place.start_from_output) {
      load_amx_sums<kHasSecond>(output, gemm.output_stride);
    } else {
      clear_amx_sums<kHasSecond>();
    }
    if (gemm.adapters != nullptr) fetch_stripes(*gemm.adapters, row, row + num_rows, block + 1);
    multiply_amx<kHasSecond>(rows, num_rows, gemm.linear->in_features, steps, soon, sums);
    if (place.grow_in_place) {
      store_amx_sums<kHasSecond>(output, gemm.output_stride);
      add_adapters_in_place(gemm, row, num_rows, block, output);
    } else {
      store_amx_sums<kHasSecond>(sums.start(row, block), kBlockColumns);
    }
  }
  sums.finish(num_rows);
}

// Rows [begin, end), whole tiles, of some blocks. They pass by a piece of a block that the first cache has room for, and their
// sums are put aside before the next one.
template <class Weights>
void run_amx_tiles(const Gemm& gemm, int64_t begin, int64_t end, const BlockRange& blocks, int64_t bytes_per_step) {
  const AmxShapes shapes(kAmxRows, kAmxRows);
  AmxSums sums(gemm, kRowsPerTile);
  const SumsPlace place(gemm, blocks);
  alignas(64) float put_aside[kMostTilesPerItem * kRowsPerTile * kBlockColumns];
  const int64_t in_features = gemm.linear->in_features;
  const int64_t piece_inputs =
      round_up(divide_up(in_features, divide_up(in_features, kMostInputsPerPiece)), kAmxInputs);
  const int64_t stride = place.grow_in_place ? gemm.output_stride : kBlockColumns;
  Weights weights(*gemm.linear, blocks);
  for (int64_t block = blocks.begin; block < blocks.end; ++block) {
    AmxFetch soon(block_weights(*gemm.linear, block + 1), bytes_per_step, kLineBytes);
    for (int64_t input = 0; input < in_features; input += piece_inputs) {
      const int64_t num_inputs = std::min(piece_inputs, in_features - input);
      auto first_steps = weights.first_steps(num_inputs);
      for (int64_t row = begin; row < end; row += kRowsPerTile) {
        const Rows rows{gemm.input + row * gemm.input_stride + input, gemm.input_stride};
        float* const sums_so_far = place.grow_in_place ? reinterpret_cast<float*>(output_of(gemm, row, block))
                                                       : put_aside + (row - begin) * kBlockColumns;
        if (input > 0 || place.start_from_output) {
          load_amx_sums<true>(sums_so_far, stride);
        } else {
          clear_amx_sums<true>();
        }
        if (row == begin) {
          multiply_amx<true>(rows, kRowsPerTile, num_inputs, first_steps, soon, sums);
        } else {
          PlainSteps<Reader::kTiles> steps(weights.piece(), num_inputs);
          multiply_amx<true>(rows, kRowsPerTile, num_inputs, steps, soon, sums);
        }
        const bool is_ready = input + num_inputs == in_features && !place.grow_in_place;
        store_amx_sums<true>(is_ready ? sums.start(row, block) : sums_so_far, stride);
        if (place.grow_in_place && input + num_inputs == in_features)
          add_adapters_in_place(gemm, row, kRowsPerTile, block, sums_so_far);
      }
    }
  }
  sums.finish(kRowsPerTile);
}

// First the rows of whole tiles, which also fetch the next block, a part of it each; then the others.
template <class Weights>
void run_amx_part(const Gemm& gemm, int64_t begin, int64_t end, const BlockRange& blocks) {
  const OctavoLinear& linear = *gemm.linear;
  const int64_t num_whole = (end - begin) / kRowsPerTile;
  const int rest = static_cast<int>((end - begin) % kRowsPerTile);
  const int64_t middle = end - rest;
  const int64_t num_steps = divide_up(linear.in_features, kAmxInputs);
  const int64_t bytes_per_step = round_up(
      divide_up(block_bytes(linear.format, linear.in_features), num_steps * std::max<int64_t>(num_whole, 1)), kLineBytes);
  if (num_whole > 1) {
    run_amx_tiles<Weights>(gemm, begin, middle, blocks, bytes_per_step);
  } else if (num_whole == 1) {
    run_amx_tile<true, Weights>(gemm, begin, kRowsPerTile, blocks, bytes_per_step);
  }
  if (rest == 0) return;
  const int64_t rest_bytes = num_whole > 0 ? 0 : bytes_per_step;
  if (rest > kAmxRows) {
    run_amx_tile<true, Weights>(gemm, middle, rest, blocks, rest_bytes);
  } else {
    run_amx_tile<false, Weights>(gemm, middle, rest, blocks, rest_bytes);
  }
}

}  // namespace

void run_bf16_part(const Gemm& gemm, int64_t begin, int64_t end, const BlockRange& blocks, ReadAhead* /*ahead*/) {
  const OctavoLinear& linear = *gemm.linear;
  const bool reads_twice = end - begin > kRowsPerTile && (end - begin) % kRowsPerTile > 0;
  const int64_t blocks_at_once =
      reads_twice ? std::max<int64_t>(kBytesReadTwice / block_bytes(linear.format, linear.in_features), 1)
                  : blocks.end - blocks.begin;
  for (int64_t block = blocks.begin; block < blocks.end; block += blocks_at_once) {
    const BlockRange some{block, std::min(block + blocks_at_once, blocks.end)};
    if (linear.format == OCTAVO_WEIGHT_COMPRESSED) {
      run_amx_part<CompressedWeights>(gemm, begin, end, some);
    } else {
      run_amx_part<PlainWeights>(gemm, begin, end, some);
    }
  }
}

}  // namespace octavo
#endif
