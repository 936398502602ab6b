// SPDX-License-Identifier: Apache-2.0
// The streaming pass of the one-pass loss; formulas in fastgrpo/ops/linear/offset_exp.py.
#include <cmath>

#include "../params.h"
#include "parallel.h"
#include "vmath.h"

namespace fastgrpo {

// Vectors summed in single precision before they join a double: keeps the error of S near one ulp.
constexpr int kBlock = 64;

struct Sums {
  double exps = 0.0, moment = 0.0;
};

template <int W>
FG_INLINE typename Vec<W>::F transform(const OffsetExpParams& p, typename Vec<W>::F z,
                                       typename Vec<W>::F bias) {
  if (p.bias) z = z + bias;
  z = z * p.logit_scale;
  return p.softcap == 0.0f ? z : tanh<W>(z / p.softcap) * p.softcap;
}

template <int W>
FG_INLINE double total(typename Vec<W>::F x) {
  double sum = 0.0;
  for (int i = 0; i < W; ++i) sum += x[i];
  return sum;
}

// Exponentials of columns [begin, end) of a row, written in place, or as bfloat16 to the front half
// of the row: going forward a store never passes a value that is still to be read.
template <int W>
FG_INLINE void exponentials(const OffsetExpParams& p, float* row, float target, float inv_temperature,
                            int64_t begin, int64_t end, Sums& sums) {
  using F = typename Vec<W>::F;
  using H = typename Vec<W>::H;
  uint16_t* half_row = reinterpret_cast<uint16_t*>(row);
  for (int64_t j = begin; j < end;) {
    F sum{}, moment{};
    for (int k = 0; k < kBlock && j < end; ++k, j += W) {
      const int64_t count = end - j < W ? end - j : W;
      F z{}, bias{};
      if (count == W) {
        z = load<F>(row + j);
        if (p.bias) bias = load<F>(p.bias + j);
      } else {
        std::memcpy(&z, row + j, count * 4);
        if (p.bias) std::memcpy(&bias, p.bias + j, count * 4);
      }
      const F d = (transform<W>(p, z, bias) - target) * inv_temperature;
      F e = exp<W>(d);
      if (count < W) {
        for (int64_t i = count; i < W; ++i) e[i] = 0.0f;
      }
      sum = sum + e;
      if (p.moment) moment = moment + (e > 0.0f ? e * d : F{});  // 0 * -inf counts as 0
      if (p.bfloat16) {
        const H h = to_bfloat16<W>(e);
        std::memcpy(half_row + j, &h, count * 2);
      } else {
        std::memcpy(row + j, &e, count * 4);
      }
    }
    sums.exps += total<W>(sum);
    sums.moment += total<W>(moment);
  }
}

// f(z) of one logit, by the arithmetic of the whole row.
template <int W>
FG_INLINE float transform_one(const OffsetExpParams& p, float z, float bias) {
  return transform<W>(p, typename Vec<W>::F{z}, typename Vec<W>::F{bias})[0];
}

template <int W>
FG_INLINE void one_row(const OffsetExpParams& p, int64_t i) {
  float* row = p.logits + i * p.stride;
  const int64_t y = p.targets[i];
  const bool here = y >= 0 && y < p.vocab;  // else another shard holds the target, or nobody
  float target = NAN;
  if (p.given_target_logit) target = p.given_target_logit[i];
  else if (here) target = transform_one<W>(p, row[y], p.bias ? p.bias[y] : 0.0f);
  const float inv_temperature = p.inv_temperature ? p.inv_temperature[i] : 1.0f;
  Sums sums;
  exponentials<W>(p, row, target, inv_temperature, 0, here ? y : p.vocab, sums);
  if (here) exponentials<W>(p, row, target, inv_temperature, y + 1, p.vocab, sums);
  const float sum = float(sums.exps);
  if (here && p.bfloat16) {
    const uint16_t h = to_bfloat16<W>(typename Vec<W>::F{-sum})[0];
    std::memcpy(reinterpret_cast<uint16_t*>(row) + y, &h, 2);
  } else if (here) {
    row[y] = -sum;
  }
  p.sum_exp[i] = sum;
  p.target_logit[i] = target;
  if (p.moment) p.moment[i] = float(sums.moment);
  p.overflow[i] = !(sums.exps < std::exp(76.0)) || !std::isfinite(target);
}

void offset_exp(const OffsetExpParams& p, int threads) {
  const int64_t grain = std::max<int64_t>(1, 65536 / std::max<int64_t>(1, p.vocab));
  parallel_for(p.rows, grain, threads, [&](int64_t begin, int64_t end) {
    run_best([&](auto level) __attribute__((always_inline)) {
      for (int64_t i = begin; i < end; ++i) one_row<decltype(level)::width>(p, i);
    });
  });
}

}  // namespace fastgrpo
