// Memory whose rows lie well in the caches.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

namespace octavo {

constexpr int64_t kLineBytes = 64;

// A vector that begins with a cache line.
template <class T>
struct LineAllocator {
  using value_type = T;
  LineAllocator() = default;
  template <class U>
  LineAllocator(const LineAllocator<U>&) {}  // NOLINT: as containers need it
  T* allocate(size_t size) { return static_cast<T*>(::operator new(size * sizeof(T), std::align_val_t{kLineBytes})); }
  void deallocate(T* memory, size_t) { ::operator delete(memory, std::align_val_t{kLineBytes}); }
  friend bool operator==(const LineAllocator&, const LineAllocator&) { return true; }
  friend bool operator!=(const LineAllocator&, const LineAllocator&) { return false; }
};
template <class T>
using LineVector = std::vector<T, LineAllocator<T>>;

// The distance of rows of so many elements, whole cache lines: an odd number of lines, so that the same columns of
// neighbouring rows do not compete for the same places in a cache.
template <class T>
constexpr int64_t row_stride(int64_t size) {
  constexpr int64_t kLine = kLineBytes / sizeof(T);
  return size / kLine % 2 == 0 ? size + kLine : size;
}

}  // namespace octavo
