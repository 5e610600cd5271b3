#include "adapters.h"

#include <algorithm>
#include <numeric>

namespace octavo {
namespace {

constexpr int kInputsTogether = 32, kRanksTogether = 8;  // of A, so that it is read from one end to the other
constexpr int kRowsTogether = kLanes == 16 ? 2 : 1;      // whose sums with these there are registers for
constexpr int kRowsAtOnce = 4;                           // that B of one adapter is loaded for
constexpr int64_t kWeightsAhead = 2 << 10;               // of A: it comes from memory, a piece for each row
constexpr int kVectors = kStripeColumns / kLanes;

// A pair of inputs as A holds it: where activations are bf16, neighbours; else two that lie half a piece apart, so that each half of
// the pairs meets a vector of activations as it is.
#if defined(OCTAVO_AVX512_BF16) || defined(OCTAVO_NEON_BF16)
inline Pairs load_inputs(const Activation* x, int part) { return load_pairs(x + 2 * part); }
#else
inline Pairs load_inputs(const Activation* x, int part) {
  return {load_activation(x + part), load_activation(x + kInputsTogether / 2 + part)};
}
#endif

// products[first ...] of rows of one adapter, whose ranks lie together: 32 inputs of one, then of the next.
template <int kRows, int kRanks>
void multiply_some_ranks(const OctavoAdapterLayer& layer, const Activation* const* x, int first, Activation* const* products) {
  constexpr int kRounded = kRanks > kLanes ? kRanks : kLanes;
  Vec sums[kRows][kRanks];
  clear(sums);
  const bf16* a = layer.a + int64_t{first} * layer.a_stride;
  const bf16* const end = layer.a + int64_t{layer.num_ranks} * layer.a_stride;
  for (int64_t i = 0; i < layer.a_stride; i += kInputsTogether, a += kRanks * kInputsTogether) {
    if (end - a > kWeightsAhead)
      for (int rank = 0; rank < kRanks; ++rank) prefetch_l2(a + kWeightsAhead + rank * kInputsTogether);
    for (int part = 0; part < kInputsTogether / 2; part += kLanes) {
      Pairs inputs[kRows];
      for (int row = 0; row < kRows; ++row) inputs[row] = load_inputs(x[row] + i, part);
      for (int rank = 0; rank < kRanks; ++rank) {
        const Pairs weights = load_pairs(a + rank * kInputsTogether + 2 * part);
        for (int row = 0; row < kRows; ++row) sums[row][rank] = dot_pairs(sums[row][rank], inputs[row], weights);
      }
    }
  }
  for (int row = 0; row < kRows; ++row) {
    alignas(64) float scaled[kRounded] = {};
    alignas(64) Activation rounded[kRounded];
    for (int rank = 0; rank < kRanks; ++rank) scaled[rank] = sum_lanes(sums[row][rank]) * layer.scales[first + rank];
    for (int i = 0; i < kRanks; i += kLanes) store_activation(rounded + i, load(scaled + i));
    std::copy_n(rounded, kRanks, products[row] + first);
  }
}

template <int kRows>
void multiply_ranks(const OctavoAdapterLayer& layer, const Activation* const* x, int begin, int end, Activation* const* products) {
  static_assert(kRanksTogether == 8);
  for (; begin + kRanksTogether <= end; begin += kRanksTogether)
    multiply_some_ranks<kRows, kRanksTogether>(layer, x, begin, products);
  if (end - begin == 6) multiply_some_ranks<kRows, 6>(layer, x, begin, products);
  if (end - begin == 4) multiply_some_ranks<kRows, 4>(layer, x, begin, products);
  if (end - begin == 2) multiply_some_ranks<kRows, 2>(layer, x, begin, products);
}

// Sums go on as they began: each is one chain, over the inputs and then over the ranks. The rows have one adapter.
template <int kRows>
void add_stripe(const OctavoAdapterStripe& stripe, const Activation* products, int64_t stride, float* sums, int64_t sums_stride) {
  Vec chains[kRows][kVectors];
  for (int row = 0; row < kRows; ++row)
    for (int v = 0; v < kVectors; ++v) chains[row][v] = load(sums + row * sums_stride + v * kLanes);
  products += stripe.first_rank;
  const bf16* b = stripe.b;
  for (int pair = 0; pair < stripe.num_pairs; ++pair, products += 2, b += 2 * kStripeColumns) {
    Pairs weights[kVectors];
    for (int v = 0; v < kVectors; ++v) weights[v] = load_pairs(b + v * 2 * kLanes);
    for (int row = 0; row < kRows; ++row) {
      const Pairs both = broadcast_pair(products + row * stride);
      for (int v = 0; v < kVectors; ++v) chains[row][v] = dot_pairs(chains[row][v], both, weights[v]);
    }
  }
  for (int row = 0; row < kRows; ++row)
    for (int v = 0; v < kVectors; ++v) store(sums + row * sums_stride + v * kLanes, chains[row][v]);
}

}  // namespace

void multiply_ranks(const OctavoAdapterLayer& layer, const Activation* const* x, int num_rows, int begin, int end,
                    Activation* const* products) {
  end = std::min(end, layer.num_ranks);
  int row = 0;
  for (; row + kRowsTogether <= num_rows; row += kRowsTogether)
    multiply_ranks<kRowsTogether>(layer, x + row, begin, end, products + row);
  for (; row < num_rows; ++row) multiply_ranks<1>(layer, x + row, begin, end, products + row);
}

void fetch_ranks(const OctavoAdapterLayer& layer) {
  const int64_t size = std::min<int64_t>(int64_t{layer.num_ranks} * layer.a_stride, kWeightsAhead);
  for (int64_t i = 0; i < size; i += kInputsTogether) prefetch_l2(layer.a + i);
}

void add_adapters(const AdapterRows& rows, int64_t row, int num_rows, int64_t block, float* sums,
                  int64_t stride) {
  const int64_t end = row + num_rows;
  while (row < end) {
    const OctavoAdapterLayer* const layer = rows.layer_of(row);
    int count = 1;
    while (count < kRowsAtOnce && row + count < end && rows.layer_of(row + count) == layer) ++count;
    if (count < kRowsAtOnce) count = 1;
    for (int half = 0; layer != nullptr && half < 2; ++half) {
      const OctavoAdapterStripe& stripe = layer->stripes[2 * block + half];
      const Activation* const products = rows.products + row * rows.stride;
      if (count == 1) {
        add_stripe<1>(stripe, products, rows.stride, sums + half * kStripeColumns, stride);
      } else {
        add_stripe<kRowsAtOnce>(stripe, products, rows.stride, sums + half * kStripeColumns, stride);
      }
    }
    row += count;
    sums += count * stride;
  }
}

void StripesAhead::start(int64_t begin, int64_t end_row, int64_t block) {
  stop();
  row_ = begin;
  end_row_ = end_row;
  next_stripe_ = 0;
  block_ = block;
  layer_ = nullptr;
  advance();
}

void StripesAhead::stop() {
  if (is_later_ && later_->end != nullptr) later_->next_line = next_line;
  is_later_ = false;
}

void StripesAhead::advance() {
  while (!is_later_ && row_ < end_row_) {
    if (next_stripe_ == 0) {
      const OctavoAdapterLayer* const layer = rows_.layer_of(row_);
      if (layer == nullptr || layer == layer_ || block_ >= layer->num_blocks) {
        ++row_;
        continue;
      }
      layer_ = layer;
      prefetch_l2(layer->stripes + 2 * (block_ + 1));  // what is asked for with the next block
    }
    const OctavoAdapterStripe& stripe = layer_->stripes[2 * block_ + next_stripe_];
    row_ += next_stripe_;
    next_stripe_ ^= 1;
    if (stripe.num_pairs == 0) continue;
    next_line = reinterpret_cast<const char*>(stripe.b);
    end = next_line + int64_t{stripe.num_pairs} * kStripeColumns * 2 * sizeof(bf16);
    return;
  }
  next_line = end = nullptr;
  if (later_ == nullptr) return;
  if (is_later_) {
    later_->next_line = later_->end;
    later_->advance();
  }
  is_later_ = true;
  next_line = later_->next_line;
  end = later_->end;
}

void fetch_stripes(const AdapterRows& rows, int64_t begin_row, int64_t end_row, int64_t block) {
  StripesAhead ahead(rows, nullptr);
  for (ahead.start(begin_row, end_row, block); !ahead.is_done(); ahead.advance())
    for (const char* line = ahead.next_line; line < ahead.end; line += kLineBytes) prefetch_l2(line);
}

std::vector<int> rows_by_adapter(const OctavoStep& step) {
  std::vector<int> rows(step.num_tokens);
  std::iota(rows.begin(), rows.end(), 0);
  const int32_t* const ids = step.adapter_ids;
  rows.erase(std::remove_if(rows.begin(), rows.end(), [&](int row) { return ids[row] == 0; }), rows.end());
  std::stable_sort(rows.begin(), rows.end(), [&](int one, int other) { return ids[one] < ids[other]; });
  return rows;
}

}  // namespace octavo
