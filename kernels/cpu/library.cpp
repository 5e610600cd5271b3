// The parts of the C interface that need no kernel.
#include <algorithm>
#include <cstring>
#include <exception>
#include <new>

#include "abi.h"
#include "gemm_part.h"
#include "guard.h"
#include "handles.h"
#include "simd.h"

namespace octavo {
namespace {

thread_local char last_error[256];
thread_local bool memory_was_refused;

}  // namespace

void keep_error() noexcept {
  const auto keep = [](bool is_memory, const char* text) {
    memory_was_refused = is_memory;
    std::strncpy(last_error, text, sizeof last_error - 1);
  };
  try {
    throw;
  } catch (const std::bad_alloc&) {
    keep(true, "the system refuses memory");
  } catch (const std::exception& error) {
    keep(false, error.what());
  } catch (...) {
    keep(false, "an unknown exception");
  }
}

}  // namespace octavo

using namespace octavo;

int32_t octavo_last_error(char* text, size_t size) {
  if (size > 0) {
    const size_t length = std::min(std::strlen(last_error), size - 1);
    std::memcpy(text, last_error, length);
    text[length] = 0;
  }
  return memory_was_refused;
}

int32_t octavo_abi_revision(void) { return OCTAVO_ABI_REVISION; }

int32_t octavo_activation_bytes(void) { return sizeof(octavo::Activation); }

int32_t octavo_rows_at_once(int32_t format) {
  return octavo::is_quantized(format) ? octavo::kMaxQuantizedRows : octavo::kRowsPerTile;
}

int32_t octavo_reads_compressed(void) { return octavo::kHasLookUp; }

OctavoPool* octavo_pool_create(int32_t num_threads) {
  return guarded<OctavoPool*>(nullptr, [&] { return new OctavoPool(num_threads); });
}

void octavo_pool_destroy(OctavoPool* pool) {
  if (!pool->threads.is_forked()) delete pool;
}

uint64_t octavo_pool_progress(const OctavoPool* pool) { return pool->threads.progress(); }

OctavoArena* octavo_arena_create(uint64_t nodes) {
  return guarded<OctavoArena*>(nullptr, [&] { return new OctavoArena{Arena(nodes)}; });
}
void octavo_arena_destroy(OctavoArena* arena) { delete arena; }
void* octavo_arena_allocate(OctavoArena* arena, size_t num_bytes) {
  return guarded<void*>(nullptr, [&] { return arena->memory.allocate(num_bytes); });
}
int32_t octavo_arena_touch(OctavoArena* arena, OctavoPool* pool) {
  return guarded<int32_t>(OCTAVO_FAILED, [&] { return arena->memory.touch(pool->threads); });
}
