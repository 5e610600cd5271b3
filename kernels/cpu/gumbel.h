// The noise that draws a token. It is specified to the bit, so that every device and every
// instruction set draws the same token: only multiplication, addition, division and integer
// operations, each rounded to float32, and no fused multiply-add.
#pragma once

#include <cstdint>

#include "simd.h"

namespace octavo {

// Noise is computed for this many tokens at a time, one vector lane for every four of them.
constexpr int kNoiseTokens = 4 * kLanes;
constexpr float kLargestNoise = 23.0f;  // -ln(2^-33) is 22.87

struct NoiseKey {
  uint64_t seed;
  uint32_t position;
  uint32_t candidate_index;
};

// Philox4x32-10: of lane i, noise word j belongs to token 4 (first_counter + i) + j.
inline void philox(const NoiseKey& noise_key, UintVec counter, UintVec (&words)[4]) {
  UintVec c0 = counter, c1 = noise_key.position - UintVec{}, c2 = noise_key.candidate_index - UintVec{}, c3 = {};
  uint32_t k0 = static_cast<uint32_t>(noise_key.seed), k1 = static_cast<uint32_t>(noise_key.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    UintVec high0, low0, high2, low2;
    multiply_wide(c0, 0xd2511f53u, high0, low0);
    multiply_wide(c2, 0xcd9e8d57u, high2, low2);
    c0 = high2 ^ c1 ^ k0;
    c1 = low2;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9e3779b9u;
    k1 += 0xbb67ae85u;
  }
  words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

// ln(2^exponent * (1 + f)), as in FreeBSD's logf.
inline Vec log_of_parts(Vec f, Vec exponent) {
  const Vec s = f / (broadcast(2.0f) + f);
  const Vec z = s * s;
  const Vec w = z * z;
  const Vec odd = w * (broadcast(0xccce13.0p-25f) + w * broadcast(0xf89e26.0p-26f));
  const Vec even = z * (broadcast(0xaaaaaa.0p-24f) + w * broadcast(0x91e9ee.0p-25f));
  const Vec rest = even + odd;
  const Vec half_square = broadcast(0.5f) * f * f;
  return s * (half_square + rest) + exponent * broadcast(9.0580006145e-06f) - half_square + f +
         exponent * broadcast(6.9313812256e-01f);
}

// x = 2^exponent * (1 + f) with 1 + f around 1.
inline void split(Vec x, Vec& f, Vec& exponent) {
  const IntVec e = (bits(x) - 0x3f3504f3) >> 23;
  f = from_bits(bits(x) - (e << 23)) - broadcast(1.0f);
  exponent = __builtin_convertvector(e, Vec);
}

// Standard Gumbel noise -ln(-ln(1 - w)) from 32 random bits.
inline Vec gumbel(UintVec random) {
  Vec w = maximum(__builtin_convertvector(random, Vec), broadcast(0.5f)) * broadcast(0x1p-32f);
  w = minimum(w, broadcast(1.0f - 0x1p-24f));
  Vec f, exponent;
  split(broadcast(1.0f) - w, f, exponent);
  // Small w are taken as they are: 1 - w would lose their last bits.
  const auto is_small = w < broadcast(0.29289323f);
  f = is_small ? -w : f;
  exponent = is_small ? Vec{} : exponent;
  split(-log_of_parts(f, exponent), f, exponent);
  return -log_of_parts(f, exponent);
}

}  // namespace octavo
