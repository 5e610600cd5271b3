// The parts of the C interface that need no kernel.
#include "abi.h"
#include "gemm_part.h"
#include "handles.h"
#include "simd.h"

int32_t octavo_abi_revision(void) { return OCTAVO_ABI_REVISION; }

int32_t octavo_activation_bytes(void) { return sizeof(octavo::Activation); }

int32_t octavo_rows_at_once(int32_t format) {
  return octavo::is_quantized(format) ? octavo::kMaxQuantizedRows : octavo::kRowsPerTile;
}

int32_t octavo_reads_compressed(void) { return octavo::kHasLookUp; }

OctavoPool* octavo_pool_create(int32_t num_threads) { return new OctavoPool(num_threads); }

void octavo_pool_destroy(OctavoPool* pool) {
  if (!pool->threads.is_forked()) delete pool;
}

uint64_t octavo_pool_progress(const OctavoPool* pool) { return pool->threads.progress(); }

OctavoArena* octavo_arena_create(void) { return new OctavoArena; }
void octavo_arena_destroy(OctavoArena* arena) { delete arena; }
void* octavo_arena_allocate(OctavoArena* arena, size_t num_bytes) { return arena->memory.allocate(num_bytes); }
int32_t octavo_arena_touch(OctavoArena* arena, OctavoPool* pool) { return arena->memory.touch(pool->threads); }
