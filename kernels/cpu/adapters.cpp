#include "adapters.h"

#include <algorithm>
#include <numeric>

namespace octavo {
namespace {

constexpr int kInputsTogether = 32, kRanksTogether = 8;  // of A, so that it is read from one end to the other
constexpr int kVectors = kStripeColumns / kLanes;

// products[first ...] of a row, whose ranks lie together: 32 inputs of one, then of the next.
template <int kRanks>
void multiply_some_ranks(const OctavoAdapterLayer& layer, const Activation* x, int first, Activation* products) {
  constexpr int kRounded = kRanks > kLanes ? kRanks : kLanes;
  Vec sums[kRanks] = {};
  const bf16* a = layer.a + int64_t{first} * layer.a_stride;
  for (int64_t i = 0; i < layer.a_stride; i += kInputsTogether, a += kRanks * kInputsTogether) {
#if defined(OCTAVO_AVX512_BF16) || defined(OCTAVO_NEON_BF16)
    for (int part = 0; part < kInputsTogether; part += 2 * kLanes) {
      const Pairs pairs = load_pairs(x + i + part);
      for (int rank = 0; rank < kRanks; ++rank)
        sums[rank] = dot_pairs(sums[rank], pairs, load_pairs(a + rank * kInputsTogether + part));
    }
#else
    for (int part = 0; part < kInputsTogether; part += kLanes) {
      const Vec value = load_activation(x + i + part);
      for (int rank = 0; rank < kRanks; ++rank)
        sums[rank] = multiply_add(value, load_bf16(a + rank * kInputsTogether + part), sums[rank]);
    }
#endif
  }
  alignas(64) float scaled[kRounded] = {};
  alignas(64) Activation rounded[kRounded];
  for (int rank = 0; rank < kRanks; ++rank) scaled[rank] = sum_lanes(sums[rank]) * layer.scales[first + rank];
  for (int i = 0; i < kRanks; i += kLanes) store_activation(rounded + i, load(scaled + i));
  std::copy_n(rounded, kRanks, products + first);
}

// Sums go on as they began: each is one chain, over the inputs and then over the ranks.
void add_stripe(const OctavoAdapterStripe& stripe, const Activation* products, float* sums) {
  Vec chains[kVectors];
  for (int v = 0; v < kVectors; ++v) chains[v] = load(sums + v * kLanes);
  products += stripe.first_rank;
  const bf16* b = stripe.b;
  for (int pair = 0; pair < stripe.num_pairs; ++pair, b += 2 * kStripeColumns) {
    const Pairs both = broadcast_pair(products + 2 * pair);
    for (int v = 0; v < kVectors; ++v) chains[v] = dot_pairs(chains[v], both, load_pairs(b + v * 2 * kLanes));
  }
  for (int v = 0; v < kVectors; ++v) store(sums + v * kLanes, chains[v]);
}

}  // namespace

void multiply_ranks(const OctavoAdapterLayer& layer, const Activation* x, int begin, int end, Activation* products) {
  static_assert(kRanksTogether == 8);
  end = std::min(end, layer.num_ranks);
  for (; begin + kRanksTogether <= end; begin += kRanksTogether) multiply_some_ranks<kRanksTogether>(layer, x, begin, products);
  if (end - begin == 6) multiply_some_ranks<6>(layer, x, begin, products);
  if (end - begin == 4) multiply_some_ranks<4>(layer, x, begin, products);
  if (end - begin == 2) multiply_some_ranks<2>(layer, x, begin, products);
}

void add_adapters(const AdapterRows& rows, int64_t row, int num_rows, int64_t block, float* sums,
                  int64_t stride) {
  for (int64_t r = row; r < row + num_rows; ++r, sums += stride) {
    const OctavoAdapterLayer* const layer = rows.layer_of(r);
    if (layer == nullptr) continue;
    for (int half = 0; half < 2; ++half)
      add_stripe(layer->stripes[2 * block + half], rows.products + r * rows.stride, sums + half * kStripeColumns);
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
