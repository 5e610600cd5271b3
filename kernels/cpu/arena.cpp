#include "arena.h"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "simd.h"

namespace octavo {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kMappingSize = size_t{64} << 20;
constexpr size_t kSmallPage = 4096;  // larger ones are touched more than once
constexpr size_t kAlignment = 64;
constexpr size_t kMostBytes = size_t{1} << 62;  // what is more cannot be rounded up

// All cores read all weights: on one node of memory, all would wait for its part of the bandwidth. What the user has
// said about places (numactl) holds; where the system refuses, memory is where it would have been.
void spread(void* memory, size_t size, uint64_t nodes) {
#if defined(SYS_mbind) && defined(SYS_get_mempolicy)
  constexpr int kDefault = 0, kInterleave = 3;  // MPOL_...
  int policy = kDefault;
  const unsigned long mask = nodes;
  if (nodes == 0 || syscall(SYS_get_mempolicy, &policy, nullptr, 0, nullptr, 0) != 0 || policy != kDefault) return;
  syscall(SYS_mbind, memory, size, kInterleave, &mask, 8 * sizeof mask + 1, 0);
#endif
}

}  // namespace

#if defined(__SANITIZE_ADDRESS__)
// Each piece is memory of its own, so that the sanitizer notices who reads or writes beside one.
Arena::~Arena() {
  for (const Mapping& piece : mappings_) std::free(piece.data);
}

void* Arena::allocate(size_t num_bytes) {
  void* memory = nullptr;
  if (num_bytes > kMostBytes || posix_memalign(&memory, kAlignment, std::max<size_t>(num_bytes, 1)) != 0) return nullptr;
  std::memset(memory, 0, num_bytes);
  mappings_.push_back({static_cast<char*>(memory), num_bytes, num_bytes, num_bytes});
  return memory;
}
#else
Arena::~Arena() {
  for (const Mapping& mapping : mappings_) munmap(mapping.data, mapping.size);
}

void* Arena::allocate(size_t num_bytes) {
  if (num_bytes > kMostBytes) return nullptr;
  const size_t size = round_up(num_bytes, kAlignment);
  if (mappings_.empty() || mappings_.back().size - mappings_.back().used < size) {
    if (!add_mapping(size)) return nullptr;
  }
  Mapping& mapping = mappings_.back();
  void* result = mapping.data + mapping.used;
  mapping.used += size;
  return result;
}
#endif

bool Arena::touch(ThreadPool& threads) {
  std::vector<char*> pages;
  const size_t num_pages = threads.num_threads();
  for (Mapping& mapping : mappings_) {
    for (; mapping.touched < mapping.used && pages.size() < num_pages; mapping.touched += kHugePage)
      pages.push_back(mapping.data + mapping.touched);
  }
  // A write, as a page that was only read would be the one of zeros that all share; and to each small page,
  // in case there was no huge one.
  threads.for_each(static_cast<int>(pages.size()), [&](int item, int) {
    volatile char* page = pages[item];
    for (size_t i = 0; i < kHugePage; i += kSmallPage) page[i] = page[i];
  });
  return std::any_of(mappings_.begin(), mappings_.end(), [](const Mapping& m) { return m.touched < m.used; });
}

bool Arena::add_mapping(size_t num_bytes) {
  // Map a huge page too much, and give back what lies before the first whole one.
  const size_t size = round_up(num_bytes > kMappingSize ? num_bytes : kMappingSize, kHugePage);
  void* address = mmap(nullptr, size + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (address == MAP_FAILED) return false;
  char* start = static_cast<char*>(address);
  const size_t skipped = (kHugePage - reinterpret_cast<size_t>(start) % kHugePage) % kHugePage;
  if (skipped > 0) munmap(start, skipped);
  munmap(start + skipped + size, kHugePage - skipped);
#if defined(MADV_HUGEPAGE)
  madvise(start + skipped, size, MADV_HUGEPAGE);
#endif
  spread(start + skipped, size, nodes_);
  mappings_.push_back({start + skipped, size, 0, 0});
  return true;
}

}  // namespace octavo
