// Exceptions end here: a caller in C can take none.
#pragma once

#include "abi.h"

namespace octavo {

// Keep what the exception that is being handled says, for octavo_last_error in this thread.
void keep_error() noexcept;

// What `body` returns, or `failure` where it throws.
template <class Result, class Body>
Result guarded(Result failure, const Body& body) noexcept {
  try {
    return body();
  } catch (...) {
    keep_error();
    return failure;
  }
}

// Run what returns nothing.
template <class Body>
int32_t guarded(const Body& body) noexcept {
  return guarded<int32_t>(OCTAVO_FAILED, [&] {
    body();
    return 0;
  });
}

}  // namespace octavo
