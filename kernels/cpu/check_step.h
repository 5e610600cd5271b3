// Whether a step's indices lie in the memory that they point into.
#pragma once

#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>

#include "abi.h"

namespace octavo {

// What is wrong with a step, in words, for whoever called.
class IndexError {
 public:
  IndexError(char* text, size_t size) : text_(text), size_(size) {}

  // Keep the sentence; always false, so that a check can return it.
  [[gnu::format(printf, 2, 3)]] bool operator()(const char* format, ...) const {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text_, size_, format, arguments);
    va_end(arguments);
    return false;
  }

 private:
  char* text_;
  size_t size_;
};

// False, with a sentence in `error`, where an index of the step is out of range. Positions lie below `max_positions`.
bool check_step(const OctavoStep& step, const OctavoCache& cache, const OctavoProgramInfo& info, int32_t max_positions,
                const IndexError& error);

}  // namespace octavo
