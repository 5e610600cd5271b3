// Linear layers over bf16 weights, in the tile registers of AMX.
#include "aligned.h"
#include "gemm_part.h"

#if defined(OCTAVO_AMX)
namespace octavo {
namespace {

// The next block's weights, fetched while this one is multiplied: a part by each tile of rows.
struct AmxFetch {
  const char* next;
  int64_t bytes_per_step;  // of kAmxInputs inputs
};

// One line in so many bytes is asked for, and the processor fetches those between by itself. Each one that is asked for has one of
// few places in which a core waits for memory, and tiles that are loaded from the second cache need these, too.
constexpr int64_t kFetchedBytes = 3 * kLineBytes;

constexpr int64_t kMostInputsPerPiece = 20 * kAmxInputs;  // of a block: 40 KiB
constexpr int64_t kAmxStepBytes = kAmxInputs * kBlockColumns * sizeof(bf16);  // of a block

// What is left of a row of activations and of a block behind the last whole tile, with zeros to fill one.
struct AmxRest {
  alignas(64) Activation input[kRowsPerTile * kAmxInputs] = {};
  alignas(64) bf16 weight[kAmxInputs * kBlockColumns] = {};
};

// Which operand of a product is read again soon; the other one leaves it its place in the first cache.
enum class Reused { kInput, kWeight };

// Add the products of kAmxInputs inputs, of one group of rows or two. Rows are `stride` activations apart.
template <bool kHasSecond, Reused kReused>
inline void multiply_amx_step(const Activation* input, int64_t stride, const bf16* weight) {
  constexpr int64_t kPairBytes = kBlockColumns * 2 * sizeof(bf16);
  const int64_t row_bytes = stride * sizeof(Activation);
  amx_load<4, kReused == Reused::kInput>(input, row_bytes);
  amx_load<6, kReused == Reused::kWeight>(weight, kPairBytes);
  amx_multiply<0, 4, 6>();
  amx_load<7, kReused == Reused::kWeight>(weight + kAmxColumns * 2, kPairBytes);
  amx_multiply<1, 4, 7>();
  if constexpr (kHasSecond) {
    amx_load<5, kReused == Reused::kInput>(input + kAmxRows * stride, row_bytes);
    amx_multiply<2, 5, 6>();
    amx_multiply<3, 5, 7>();
  }
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
    const int end = std::min(next_ + num_rows, num_rows_);
    for (; next_ < end; ++next_) finish_block(gemm_, first_row_ + next_, block_, sums_ + next_ * kBlockColumns);
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

// Add the products of inputs [begin, end) of up to kRowsPerTile rows and a block: more than kAmxRows with a second group.
// Meanwhile the sums before are handed over.
template <bool kHasSecond, Reused kReused>
void multiply_amx(const Rows& input, int num_rows, const bf16* weight, int64_t begin, int64_t end, AmxFetch& soon,
                  AmxSums& sums) {
  const int64_t num_steps = divide_up(end - begin, kAmxInputs);
  const int rows_per_step = static_cast<int>(divide_up(num_rows, num_steps));
  for (int64_t i = begin; i < end; i += kAmxInputs) {
    constexpr int64_t kDistance = kReused == Reused::kInput ? kFetchedBytes : kLineBytes;
    for (int64_t line = 0; line < soon.bytes_per_step; line += kDistance) prefetch_l2(soon.next + line);
    soon.next += soon.bytes_per_step;
    if constexpr (kReused == Reused::kInput) {  // a tile alone waits for the next weights if these are not in the first cache
      const char* next = reinterpret_cast<const char*>(weight + (i + kAmxInputs) * kBlockColumns);
      for (int64_t line = 0; line < kAmxStepBytes; line += 64) prefetch(next + line);
    }
    if (i + kAmxInputs <= end) {
      multiply_amx_step<kHasSecond, kReused>(input.data + i, input.stride, weight + i * kBlockColumns);
    } else {
      AmxRest rest;
      for (int row = 0; row < num_rows; ++row)
        std::copy_n(input.data + row * input.stride + i, end - i, rest.input + row * kAmxInputs);
      std::copy_n(weight + i * kBlockColumns, round_up(end - i, 2) * kBlockColumns, rest.weight);
      multiply_amx_step<kHasSecond, kReused>(rest.input, kAmxInputs, rest.weight);
    }
    sums.finish(rows_per_step);
  }
}

// Rows [begin, end), in tiles of `rows_per_tile` each, of some blocks. Where there are several tiles, they pass by a piece of
// a block that the first cache has room for, and their sums are put aside before the next one.
template <bool kHasSecond, Reused kReused>
void run_amx_tiles(const Gemm& gemm, int64_t begin, int64_t end, int rows_per_tile, const BlockRange& blocks,
                   int64_t bytes_per_step) {
  const AmxShapes shapes(std::min(rows_per_tile, kAmxRows), std::max(rows_per_tile - kAmxRows, 0));
  AmxSums sums(gemm, rows_per_tile);
  alignas(64) float put_aside[kReused == Reused::kWeight ? kMostTilesPerItem * kRowsPerTile * kBlockColumns : 1];
  const int64_t in_features = gemm.linear->in_features;
  const int64_t num_pieces = kReused == Reused::kWeight ? divide_up(in_features, kMostInputsPerPiece) : 1;
  const int64_t piece_inputs = round_up(divide_up(in_features, num_pieces), kAmxInputs);
  const bool in_place = sums_grow_in_place(gemm, blocks.end);
  const bool starts_from_output = in_place && gemm.epilogue == Epilogue::kAddResidual;
  const int64_t stride = in_place ? gemm.output_stride : kBlockColumns;
  for (int64_t block = blocks.begin; block < blocks.end; ++block) {
    const bf16* weight = reinterpret_cast<const bf16*>(block_weights(*gemm.linear, block));
    AmxFetch soon{reinterpret_cast<const char*>(block_weights(*gemm.linear, block + 1)), bytes_per_step};
    for (int64_t input = 0; input < in_features; input += piece_inputs) {
      const int64_t input_end = std::min(input + piece_inputs, in_features);
      for (int64_t row = begin; row < end; row += rows_per_tile) {
        const Rows rows{gemm.input + row * gemm.input_stride, gemm.input_stride};
        float* const place = in_place ? reinterpret_cast<float*>(output_of(gemm, row, block))
                                      : put_aside + (row - begin) * kBlockColumns;
        if (input > 0 || starts_from_output) {
          load_amx_sums<kHasSecond>(place, stride);
        } else {
          clear_amx_sums<kHasSecond>();
        }
        multiply_amx<kHasSecond, kReused>(rows, rows_per_tile, weight, input, input_end, soon, sums);
        const bool is_ready = input_end == in_features && !in_place;
        store_amx_sums<kHasSecond>(is_ready ? sums.start(row, block) : place, stride);
      }
    }
  }
  sums.finish(rows_per_tile);
}

}  // namespace

// First the rows of whole tiles, which also fetch the next block, a part of it each; then the others.
void run_bf16_part(const Gemm& gemm, int64_t begin, int64_t end, const BlockRange& blocks, ReadAhead* /*ahead*/) {
  const int64_t num_whole = (end - begin) / kRowsPerTile;
  const int rest = static_cast<int>((end - begin) % kRowsPerTile);
  const int64_t middle = end - rest;
  const int64_t bytes_per_step = round_up(divide_up(kAmxStepBytes, std::max<int64_t>(num_whole, 1)), 64);
  if (num_whole > 1) {
    run_amx_tiles<true, Reused::kWeight>(gemm, begin, middle, kRowsPerTile, blocks, bytes_per_step);
  } else if (num_whole == 1) {
    run_amx_tiles<true, Reused::kInput>(gemm, begin, middle, kRowsPerTile, blocks, bytes_per_step);
  }
  if (rest == 0) return;
  const int64_t rest_bytes = num_whole > 0 ? 0 : bytes_per_step;
  if (rest > kAmxRows) {
    run_amx_tiles<true, Reused::kInput>(gemm, middle, end, rest, blocks, rest_bytes);
  } else {
    run_amx_tiles<false, Reused::kInput>(gemm, middle, end, rest, blocks, rest_bytes);
  }
}

}  // namespace octavo
#endif
