// From a number of rows known at run time to code compiled for it.
#pragma once

#include <type_traits>
#include <utility>

#include "simd.h"

namespace octavo {

// Call `body(std::integral_constant<int, num_rows>)`; 1 <= num_rows <= kMaxRows.
template <class Body, int... kRows>
void dispatch_rows(int num_rows, const Body& body, std::integer_sequence<int, kRows...>) {
  (void)((num_rows == kRows + 1 && (body(std::integral_constant<int, kRows + 1>{}), true)) || ...);
}

template <int kMaxRows = kMaxTileRows, class Body>
void dispatch_rows(int num_rows, const Body& body) {
  dispatch_rows(num_rows, body, std::make_integer_sequence<int, kMaxRows>{});
}

}  // namespace octavo
