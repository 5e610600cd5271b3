// What this machine can do at most: the measure that benchmarks hold the kernels against.
#include <algorithm>
#include <atomic>
#include <vector>

#include "amx.h"
#include "guard.h"
#include "handles.h"
#include "simd.h"

namespace octavo {
namespace {

constexpr int64_t kBytesPerItem = 256 << 10;
constexpr int kStreams = 4;  // vectors read side by side
constexpr int64_t kQuadsPerItem = 1 << 16;
// At least the latency of the instruction times its rate, and few enough for registers.
constexpr int kDotSums = kAccumulators >= 16 ? 16 : 8;

// Keeps the compiler from leaving out what is computed for its own sake.
std::atomic<float> result_nobody_wants;

void read_bytes(const char* begin, int64_t size) {
  Vec sums[kStreams] = {};
  for (int64_t i = 0; i < size; i += kStreams * static_cast<int64_t>(sizeof(Vec)))
    for (int s = 0; s < kStreams; ++s)
      sums[s] = sums[s] + load(reinterpret_cast<const float*>(begin + i) + s * kLanes);
  result_nobody_wants.store(sum_lanes(sums[0] + sums[1] + sums[2] + sums[3]), std::memory_order_relaxed);
}

#if defined(OCTAVO_AMX)
constexpr int64_t kDotsPerItem = 1 << 12;
constexpr int64_t kOperationsPerDot = kAmxRows * kAmxColumns * kAmxInputs * 2;

void multiply_pairs(int64_t num_dots) {
  alignas(64) bf16 ones[kAmxRows * kAmxInputs];
  std::fill_n(ones, kAmxRows * kAmxInputs, float_to_bf16(1.0f));
  const AmxShapes shapes(kAmxRows, kAmxRows);
  amx_load<4>(ones, kAmxInputs * sizeof(bf16));
  amx_load<5>(ones, kAmxInputs * sizeof(bf16));
  amx_load<6>(ones, kAmxInputs * sizeof(bf16));
  amx_load<7>(ones, kAmxInputs * sizeof(bf16));
  for (int64_t i = 0; i < num_dots; i += 4) {
    amx_multiply<0, 4, 6>();
    amx_multiply<1, 4, 7>();
    amx_multiply<2, 5, 6>();
    amx_multiply<3, 5, 7>();
  }
}
#else
constexpr int64_t kDotsPerItem = 1 << 16;
constexpr int64_t kOperationsPerDot = kLanes * 4;  // a pair takes two multiplications and two additions

void multiply_pairs(int64_t num_dots) {
  bf16 ones[2 * kLanes];
  std::fill_n(ones, 2 * kLanes, float_to_bf16(1.0f));
  const Pairs a = load_pairs(ones), b = load_pairs(ones);
  Vec sums[kDotSums] = {};
  for (int64_t i = 0; i < num_dots; i += kDotSums) {
#pragma GCC unroll 16
    for (int s = 0; s < kDotSums; ++s) {
      sums[s] = dot_pairs(sums[s], a, b);
      keep(sums[s]);
    }
  }
  Vec total = {};
#pragma GCC unroll 16
  for (int s = 0; s < kDotSums; ++s) total = total + sums[s];  // unrolled, so that the sums stay in registers
  result_nobody_wants.store(sum_lanes(total), std::memory_order_relaxed);
}
#endif

void multiply_quads(int64_t num_dots) {
  const std::vector<uint8_t> bytes(sizeof(IntVec), 1);
  const ByteActivation ones[4] = {1, 1, 1, 1};
  const Quads a = load_quads(bytes.data());
  const ByteActivation* source = ones;
  QuadActivations b = broadcast_quad(source);
  IntVec sums[kDotSums] = {};
  for (int64_t i = 0; i < num_dots; i += kDotSums) {
#pragma GCC unroll 16
    for (int s = 0; s < kDotSums; ++s) {
      if constexpr (sizeof(ByteActivation) > 1) {  // several instructions: the compiler would take products out of the loop
        keep_in_register(source);
        b = broadcast_quad(source);
      }
      sums[s] = dot_quads(sums[s], a, b);
      keep(sums[s]);
    }
  }
  IntVec total = {};
#pragma GCC unroll 16
  for (int s = 0; s < kDotSums; ++s) total = total + sums[s];
  result_nobody_wants.store(static_cast<float>(sum_lanes(total)), std::memory_order_relaxed);
}

}  // namespace
}  // namespace octavo

using namespace octavo;

int64_t octavo_measure_read(OctavoPool* pool, const void* data, int64_t num_bytes) {
  return guarded<int64_t>(OCTAVO_FAILED, [&] {
    const int num_items = static_cast<int>(num_bytes / kBytesPerItem);
    pool->threads.for_each(num_items, [&](int64_t item, int) {
      read_bytes(static_cast<const char*>(data) + item * kBytesPerItem, kBytesPerItem);
    });
    return num_items * kBytesPerItem;
  });
}

int64_t octavo_measure_dot(OctavoPool* pool, int32_t num_items) {
  return guarded<int64_t>(OCTAVO_FAILED, [&] {
    pool->threads.for_each(num_items, [&](int64_t, int) { multiply_pairs(kDotsPerItem); });
    return num_items * kDotsPerItem * kOperationsPerDot;
  });
}

int64_t octavo_measure_integer_dot(OctavoPool* pool, int32_t num_items) {
  return guarded<int64_t>(OCTAVO_FAILED, [&] {
    pool->threads.for_each(num_items, [&](int64_t, int) { multiply_quads(kQuadsPerItem); });
    return num_items * kQuadsPerItem * kLanes * 8;  // a quad takes four multiplications and four additions
  });
}
