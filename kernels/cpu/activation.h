// Activation functions on vectors.
#pragma once

#include "simd.h"

namespace octavo {

// x / (1 + e^-y). The power is capped where the quotient is below any bf16 number anyway.
inline Vec times_sigmoid(Vec x, Vec y) {
  const Vec log2_e = broadcast(1.44269504f);
  const Vec power = minimum(-y * log2_e, broadcast(126.0f));
  return x / (broadcast(1.0f) + exp2(power));
}

inline Vec silu(Vec x) { return times_sigmoid(x, x); }

// cap * tanh(x * scale / cap), as 2 sigmoid(2 y) - 1 = tanh(y).
inline Vec soft_capped(Vec x, float scale, float cap) {
  return times_sigmoid(broadcast(2.0f * cap), x * broadcast(2.0f * scale / cap)) - broadcast(cap);
}

// 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), with 0.5 (1 + tanh(y)) = sigmoid(2 y).
inline Vec gelu_tanh(Vec x) {
  const Vec cubic = multiply_add(broadcast(0.044715f) * x * x, x, x);
  return times_sigmoid(x, broadcast(1.59576912f) * cubic);
}

// Of a gated layer: what a gate makes of `up`.
inline Vec gated_silu(Vec gate, Vec up) { return silu(gate) * up; }
inline Vec gated_gelu_tanh(Vec gate, Vec up) { return gelu_tanh(gate) * up; }
inline Vec swigluoai(Vec gate, Vec up) {
  const Vec limit = broadcast(7.0f), clamped = minimum(gate, limit);
  return times_sigmoid(clamped, broadcast(1.702f) * clamped) * (maximum(minimum(up, limit), -limit) + broadcast(1.0f));
}

}  // namespace octavo
