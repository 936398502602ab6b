// SPDX-License-Identifier: Apache-2.0
// exp and tanh of vectors of floats, in GCC's portable vector types.
#pragma once

#include <cstdint>
#include <cstring>

#include "simd.h"

namespace fastgrpo {

template <int W>
struct Vec {
  typedef float F __attribute__((vector_size(W * 4)));
  typedef int32_t I __attribute__((vector_size(W * 4)));
  typedef uint16_t H __attribute__((vector_size(W * 2)));
};

template <class F>
FG_INLINE F load(const float* from) {
  F x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

template <int W>
FG_INLINE typename Vec<W>::F power_of_two(typename Vec<W>::I n) {
  const typename Vec<W>::I bits = (n + 127) << 23;
  return (typename Vec<W>::F)bits;
}

// e^x with an error below 1.1 ulp, subnormal results included; 0 at -inf, inf from 88.73 on, NaN for
// NaN. x = n ln 2 + r; the power of two is applied in two factors, since 2^n alone can be too small.
template <int W>
FG_INLINE typename Vec<W>::F exp(typename Vec<W>::F x) {
  using F = typename Vec<W>::F;
  using I = typename Vec<W>::I;
  x = x < -104.0f ? F{} - 104.0f : x;
  x = x > 89.0f ? F{} + 89.0f : x;
  const float round = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer below
  const F shifted = x * 1.44269504f + round;
  const F n = shifted - round;
  const F r = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in two parts
  F p = r * 1.3951717e-3f + 8.3695988e-3f;
  p = p * r + 4.1666187e-2f;
  p = p * r + 1.6666513e-1f;
  p = p * r + 0.5f;
  const F y = (p * r * r + r) + 1.0f;
  const I whole = (I)shifted - 0x4b400000;  // the bits of `round`
  const I half = whole >> 1;
  return y * power_of_two<W>(half) * power_of_two<W>(whole - half);
}

// tanh with a relative error below 3e-7: a polynomial near 0, where 1 - 2 / (e^2x + 1) cancels.
template <int W>
FG_INLINE typename Vec<W>::F tanh(typename Vec<W>::F x) {
  using F = typename Vec<W>::F;
  using I = typename Vec<W>::I;
  const F size = (F)((I)x & 0x7fffffff);
  const F u = x * x;
  F p = u * -5.7170274e-3f + 2.0650571e-2f;
  p = p * u - 5.3743493e-2f;
  p = p * u + 1.3331491e-1f;
  p = p * u - 3.3333284e-1f;
  const F near = x + x * u * p;
  const F far = 1.0f - 2.0f / (exp<W>(size + size) + 1.0f);
  const F signed_far = (F)((I)far | ((I)x & (I{} + INT32_MIN)));
  return size < 0.625f ? near : signed_far;
}

// Nearest bfloat16, ties to even; NaN stays NaN.
template <int W>
FG_INLINE typename Vec<W>::H to_bfloat16(typename Vec<W>::F x) {
  using I = typename Vec<W>::I;
  const I bits = (I)x;
  const I rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const I result = x == x ? rounded : I{} + 0x7fc0;
  return __builtin_convertvector(result & 0xffff, typename Vec<W>::H);
}

}  // namespace fastgrpo
