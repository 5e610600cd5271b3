// Activation functions as exact as float32 is.
#pragma once

#include "activation.h"
#include "encoder_abi.h"

namespace octavo {

// x / 2 (1 + erf(x / sqrt(2))): erf as a quotient of polynomials, absolute error below 5e-7.
inline Vec gelu(Vec x) {
  const Vec y = minimum(maximum(x * broadcast(0.70710678f), broadcast(-4.0f)), broadcast(4.0f));
  const Vec square = y * y;
  const Vec above = polynomial(square, -2.72614225801306e-10f, 2.77068142495902e-08f, -2.10102402082508e-06f,
                               -5.69250639462346e-05f, -7.34990630326855e-04f, -2.95459980854025e-03f,
                               -1.60960333262415e-02f);
  const Vec below = polynomial(square, -1.45660718464996e-05f, -2.13374055278905e-04f, -1.68282697438203e-03f,
                               -7.37332916720468e-03f, -1.42647390514189e-02f);
  const Vec half = broadcast(0.5f) * x;
  return multiply_add(half, y * above / below, half);
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
