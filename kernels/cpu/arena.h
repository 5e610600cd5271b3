// Memory for weights, activations and the KV cache.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "thread_pool.h"

namespace octavo {

// Hands out zeroed memory from large mappings that ask for huge pages: a decode step streams all
// weights, and small pages would cost it a tenth of its time in address translation.
class Arena {
 public:
  // See octavo_arena_create.
  explicit Arena(uint64_t nodes) : nodes_(nodes) {}
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // Null when the system gives no memory.
  void* allocate(size_t num_bytes);

  // Have the system give the memory of one more huge page for each thread, which the first write to it
  // would wait for. Changes nothing in it; nobody may write there meanwhile. Returns whether more is left.
  bool touch(ThreadPool& threads);

 private:
  struct Mapping {
    char* data;
    size_t size;
    size_t used;
    size_t touched;  // in whole huge pages, so maybe more than is used
  };
  bool add_mapping(size_t num_bytes);
  const uint64_t nodes_;
  std::vector<Mapping> mappings_;
};

}  // namespace octavo
