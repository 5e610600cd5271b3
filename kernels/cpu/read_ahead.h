// What is fetched while other things are computed.
#pragma once

namespace octavo {

// What an operation after this one reads. Threads that multiply fetch it by the way: while they
// compute, the memory has time left.
class ReadAhead {
 public:
  virtual ~ReadAhead() = default;
  bool is_done() const { return next_line == end; }

  // The present piece of memory, in whole cache lines. Once it is fetched, `advance` goes to the next.
  const char* next_line = nullptr;
  const char* end = nullptr;
  virtual void advance() = 0;
};

}  // namespace octavo
