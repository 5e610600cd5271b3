// Activation functions as exact as float32 is.
#pragma once

#include "activation.h"
#include "encoder_abi.h"

namespace octavo {

// x / 2 (1 + erf(x / sqrt(2))): Abramowitz and Stegun 7.1.26, absolute error of erf below 1.5e-7.
inline Vec gelu(Vec x) {
  const Vec magnitude = maximum(x, -x) * broadcast(0.70710678f);
  const Vec t = broadcast(1.0f) / multiply_add(broadcast(0.3275911f), magnitude, broadcast(1.0f));
  Vec series = broadcast(1.061405429f);
  series = multiply_add(series, t, broadcast(-1.453152027f));
  series = multiply_add(series, t, broadcast(1.421413741f));
  series = multiply_add(series, t, broadcast(-0.284496736f));
  series = multiply_add(series, t, broadcast(0.254829592f));
  const Vec tail = series * t * exp2(magnitude * magnitude * broadcast(-1.44269504f));
  const Vec erf = broadcast(1.0f) - tail;
  const Vec signed_erf = x < Vec{} ? -erf : erf;
  return broadcast(0.5f) * x * (broadcast(1.0f) + signed_erf);
}

inline Vec activate(int32_t activation, Vec x) {
  switch (activation) {
    case OCTAVO_ENCODER_GELU:
      return gelu(x);
    case OCTAVO_ENCODER_GELU_TANH:
      return gelu_tanh(x);
    case OCTAVO_ENCODER_SILU:
      return silu(x);
    default:
      return x;
  }
}

}  // namespace octavo
