// Low-rank adapters (LoRA): what the adapter of a row adds to a linear layer, scale * B (A x).
#pragma once

#include <cstdint>
#include <vector>

#include "abi.h"
#include "aligned.h"
#include "read_ahead.h"
#include "simd.h"

namespace octavo {

constexpr int kStripeColumns = 16;

// What adapters add to the rows of one operation: B of a row's adapter times `products`, after these are there. A row's sums are
// chains of its own, so its bits depend on no other row and no other adapter.
struct AdapterRows {
  const int32_t* adapter_ids;                  // [num_rows], 0 for none
  const OctavoAdapterLayer* const* adapters;   // by id
  int64_t op;                                  // number of the operation
  const Activation* products;                  // [num_rows, stride]: scale * A x
  int64_t stride;

  // The layer of a row's adapter, null if it adds nothing.
  const OctavoAdapterLayer* layer_of(int64_t row) const {
    const int32_t id = adapter_ids[row];
    if (id == 0 || adapters[id][op].num_ranks == 0) return nullptr;
    return &adapters[id][op];
  }
};

// products[row][i] = scale * A[i] x[row] for ranks [begin, end) of rows of activations; both even.
void multiply_ranks(const OctavoAdapterLayer& layer, const Activation* const* x, int num_rows, int begin, int end,
                    Activation* const* products);

// The beginning of A, which is multiplied soon.
void fetch_ranks(const OctavoAdapterLayer& layer);

// Add what adapters add to the sums of some rows and one block, from row `row` on; those of a row lie `stride` apart.
void add_adapters(const AdapterRows& rows, int64_t row, int num_rows, int64_t block, float* sums, int64_t stride);

// B of the adapters of some rows, for a block: neighbouring rows have others, so the processor cannot know what comes. Then goes
// on with what else is to be fetched, which may be null.
class StripesAhead : public ReadAhead {
 public:
  StripesAhead(const AdapterRows& rows, ReadAhead* later) : rows_(rows), later_(later) {}
  ~StripesAhead() override { stop(); }
  void start(int64_t begin_row, int64_t end_row, int64_t block);
  void advance() override;

 private:
  void stop();

  const AdapterRows& rows_;
  ReadAhead* const later_;
  bool is_later_ = false;  // whether the present piece is one of `later_`
  int64_t row_ = 0;
  int64_t end_row_ = 0;
  int64_t block_ = 0;
  int next_stripe_ = 0;
  const OctavoAdapterLayer* layer_ = nullptr;  // of the row, or of one before it
};

// Fetch that at once, where nothing is computed meanwhile.
void fetch_stripes(const AdapterRows& rows, int64_t begin_row, int64_t end_row, int64_t block);

// The rows of a step that have adapters, those of one adapter behind each other.
std::vector<int> rows_by_adapter(const OctavoStep& step);

}  // namespace octavo
