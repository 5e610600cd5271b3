// Low-rank adapters (LoRA): what the adapter of a row adds to a linear layer, scale * B (A x).
#pragma once

#include <cstdint>
#include <vector>

#include "abi.h"
#include "aligned.h"
#include "simd.h"

namespace octavo {

constexpr int kStripeColumns = 16;

// What adapters add to the rows of one operation: B of a row's adapter times `products`, after these are there. A row's sums are
// chains of its own, so its bits depend on no other row and no other adapter.
struct AdapterRows {
  const int32_t* adapter_ids;                  // [num_rows], 0 for none
  const OctavoAdapterLayer* const* adapters;   // by id
  int64_t op;                                  // number of the operation
  const float* products;                       // [num_rows, stride]: scale * A x
  int64_t stride;
  const float* sums;    // [num_rows, sums_stride]: B times the products, where that is computed before; else null
  int64_t sums_stride;  // the columns of all blocks

  // The layer of a row's adapter, null if it adds nothing.
  const OctavoAdapterLayer* layer_of(int64_t row) const {
    const int32_t id = adapter_ids[row];
    if (id == 0 || adapters[id][op].num_ranks == 0) return nullptr;
    return &adapters[id][op];
  }
};

// products[i] = scale * A[i] x for ranks [begin, end) of a row of activations.
void multiply_ranks(const OctavoAdapterLayer& layer, const Activation* x, int begin, int end, float* products);

// sums = B times the products, for all blocks of a row: all of B in one stream, which the processor fetches by itself.
void multiply_products(const OctavoAdapterLayer& layer, const float* products, float* sums);

// Add what adapters add to the sums of some rows and one block, from row `row` on; those of a row lie `stride` apart.
void add_adapters(const AdapterRows& rows, int64_t row, int num_rows, int64_t block, float* sums, int64_t stride);

// The rows of a step that have adapters, those of one adapter behind each other.
std::vector<int> rows_by_adapter(const OctavoStep& step);

}  // namespace octavo
