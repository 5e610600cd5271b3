#include "adapters.h"

#include <algorithm>
#include <numeric>

namespace octavo {
namespace {

constexpr int kRanksAtOnce = 8;  // of a row: their sums do not wait for each other
constexpr int kVectors = kStripeColumns / kLanes;
constexpr int kChains = 2;  // of sums of a stripe, for even and odd ranks

// Sums over the inputs, in each lane of some of them.
template <int kRanks>
void sum_products(const bf16* a, int64_t stride, const Activation* x, Vec (&sums)[kRanks]) {
#if defined(OCTAVO_AVX512_BF16) || defined(OCTAVO_NEON_BF16)
  for (int64_t i = 0; i < stride; i += 2 * kLanes) {
    const Pairs pairs = load_pairs(x + i);
    for (int rank = 0; rank < kRanks; ++rank) sums[rank] = dot_pairs(sums[rank], pairs, load_pairs(a + rank * stride + i));
  }
#else
  for (int64_t i = 0; i < stride; i += kLanes) {
    const Vec value = load_activation(x + i);
    for (int rank = 0; rank < kRanks; ++rank) sums[rank] = multiply_add(value, load_bf16(a + rank * stride + i), sums[rank]);
  }
#endif
}

template <int kRanks>
void multiply_some_ranks(const OctavoAdapterLayer& layer, const Activation* x, int first, float* products) {
  Vec sums[kRanks] = {};
  sum_products<kRanks>(layer.a + int64_t{first} * layer.a_stride, layer.a_stride, x, sums);
  for (int rank = 0; rank < kRanks; ++rank) products[first + rank] = sum_lanes(sums[rank]) * layer.scales[first + rank];
}

// sums = B times the products, added to what is there if `kAdds`.
template <bool kAdds>
void multiply_stripe(const OctavoAdapterStripe& stripe, const float* products, float* sums) {
  Vec chains[kChains][kVectors];
  clear(chains);
  products += stripe.first_rank;
  const bf16* b = stripe.b;
  int rank = 0;
  for (; rank + kChains <= stripe.num_ranks; rank += kChains) {
    for (int chain = 0; chain < kChains; ++chain, b += kStripeColumns) {
      const Vec product = broadcast(products[rank + chain]);
      for (int v = 0; v < kVectors; ++v)
        chains[chain][v] = multiply_add(product, load_bf16(b + v * kLanes), chains[chain][v]);
    }
  }
  if (rank < stripe.num_ranks) {
    const Vec product = broadcast(products[rank]);
    for (int v = 0; v < kVectors; ++v) chains[0][v] = multiply_add(product, load_bf16(b + v * kLanes), chains[0][v]);
  }
  for (int v = 0; v < kVectors; ++v) {
    float* const sum = sums + v * kLanes;
    const Vec total = chains[0][v] + chains[1][v];
    store(sum, kAdds ? load(sum) + total : total);
  }
}

// Those of the next block: neighbouring rows have B of other adapters, so the processor cannot know what comes.
void fetch(const OctavoAdapterStripe& stripe) {
  const char* const b = reinterpret_cast<const char*>(stripe.b);
  for (int64_t at = 0; at < int64_t{stripe.num_ranks} * kStripeColumns * 2; at += kLineBytes) prefetch_l2(b + at);
}

}  // namespace

void multiply_ranks(const OctavoAdapterLayer& layer, const Activation* x, int begin, int end, float* products) {
  end = std::min(end, layer.num_ranks);
  for (; begin + kRanksAtOnce <= end; begin += kRanksAtOnce) multiply_some_ranks<kRanksAtOnce>(layer, x, begin, products);
  for (; begin < end; ++begin) multiply_some_ranks<1>(layer, x, begin, products);
}

void multiply_products(const OctavoAdapterLayer& layer, const float* products, float* sums) {
  for (int64_t stripe = 0; stripe < 2 * int64_t{layer.num_blocks}; ++stripe)
    multiply_stripe<false>(layer.stripes[stripe], products, sums + stripe * kStripeColumns);
}

void add_adapters(const AdapterRows& rows, int64_t row, int num_rows, int64_t block, float* sums,
                  int64_t stride) {
  const OctavoAdapterLayer* before = nullptr;
  for (int r = 0; r < num_rows; ++r, sums += stride) {
    const OctavoAdapterLayer* const layer = rows.layer_of(row + r);
    if (layer == nullptr) continue;
    if (rows.sums != nullptr) {
      const float* const added = rows.sums + (row + r) * rows.sums_stride + block * 2 * kStripeColumns;
      for (int i = 0; i < 2 * kStripeColumns; i += kLanes) store(sums + i, load(sums + i) + load(added + i));
      continue;
    }
    const OctavoAdapterStripe* const stripes = layer->stripes + 2 * block;
    for (int half = 0; half < 2; ++half) {
      // Also without ranks: a sum of -0 becomes 0 here as it does above.
      multiply_stripe<true>(stripes[half], rows.products + (row + r) * rows.stride, sums + half * kStripeColumns);
      if (layer != before && block + 1 < layer->num_blocks) fetch(stripes[half + 2]);
    }
    before = layer;
  }
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
