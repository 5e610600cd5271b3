// A tile of keys and values, over which attention takes two products: queries and keys, weights and values.
#pragma once

#include <cstdint>

#include "attention.h"

namespace octavo {

constexpr int kTileKeys = kTilePages * kBlockTokens;

// The pages of a tile, and of what is read after it, to be fetched meanwhile.
struct Tile {
  const bf16* keys[kTilePages];
  const bf16* values[kTilePages];
  const bf16* next_keys[kTilePages];
  int num_pages;
};

}  // namespace octavo
