// Packed weights in a file: read by all threads, and checked while the bytes are in the cache.
#include <cerrno>
#include <cstring>
#include <unistd.h>

#include <algorithm>
#include <atomic>

#include "abi.h"
#include "guard.h"
#include "handles.h"
#include "simd.h"

namespace octavo {
namespace {

constexpr int kSums = 16;

// Every step is a bijection of a sum for a given word, so one changed word always changes the result.
uint64_t checksum(const char* data, size_t size) {
  uint32_t sums[kSums];
  for (int i = 0; i < kSums; ++i) sums[i] = static_cast<uint32_t>(i);
  const auto add = [&](const char* block) {
    uint32_t words[kSums];
    std::memcpy(words, block, sizeof words);
    for (int i = 0; i < kSums; ++i) {
      const uint32_t mixed = (sums[i] ^ words[i]) * 0x9e3779b1u;
      sums[i] = (mixed << 13) | (mixed >> 19);
    }
  };
  size_t at = 0;
  for (; at + sizeof sums <= size; at += sizeof sums) add(data + at);
  char rest[sizeof sums] = {};
  std::memcpy(rest, data + at, size - at);
  add(rest);
  uint64_t result = size;
  for (uint32_t sum : sums) {
    result = (result ^ sum) * 0x9e3779b97f4a7c15u;
    result ^= result >> 32;
  }
  return result;
}

// Read all of [offset, offset + size); 0, or an errno. EIO where the file ends too early.
int read_all(int file, int64_t offset, size_t size, char* target) {
  while (size > 0) {
    const ssize_t count = pread(file, target, size, offset);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return count < 0 ? errno : EIO;
    offset += count;
    target += count;
    size -= static_cast<size_t>(count);
  }
  return 0;
}

}  // namespace
}  // namespace octavo

using namespace octavo;

int32_t octavo_read_file(OctavoPool* pool, int32_t file, int64_t offset, size_t size, void* memory,
                         uint64_t* checksums) {
  std::atomic<int> failure{0};
  const int num_chunks = static_cast<int>(divide_up(size, OCTAVO_CHUNK_BYTES));
  const auto read_chunk = [&](int64_t chunk, int) {
    const int64_t start = chunk * OCTAVO_CHUNK_BYTES;
    const size_t length = std::min<size_t>(OCTAVO_CHUNK_BYTES, size - start);
    char* target = static_cast<char*>(memory) + start;
    if (const int error = read_all(file, offset + start, length, target)) failure = error;
    checksums[chunk] = checksum(target, length);
  };
  return guarded<int32_t>(OCTAVO_FAILED, [&] {
    pool->threads.for_each(num_chunks, read_chunk);
    return failure.load();
  });
}

void octavo_checksums(const void* memory, size_t size, uint64_t* checksums) {
  for (size_t start = 0; start < size; start += OCTAVO_CHUNK_BYTES)
    *checksums++ = checksum(static_cast<const char*>(memory) + start, std::min<size_t>(OCTAVO_CHUNK_BYTES, size - start));
}
