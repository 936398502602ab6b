// SPDX-License-Identifier: Apache-2.0
// KL of two streams of logits and its gradients over them; formulas in fastgrpo_kernels/linear_kl.py.
#include <cmath>

#include "../params.h"
#include "parallel.h"
#include "vmath.h"

namespace fastgrpo {

// Vectors summed in single precision before they join a double.
constexpr int kBlock = 64;

template <int W>
using Floats = typename Vec<W>::F;

// e^x - 1 - x for |x| < 1, by its series: the next term is below 5e-9 of the value.
template <int W>
FG_INLINE Floats<W> excess(Floats<W> x) {
  Floats<W> sum = x * 2.5052108e-8f + 2.7557319e-7f;
  for (float c : {2.7557319e-6f, 2.4801587e-5f, 1.9841270e-4f, 1.3888889e-3f, 8.3333333e-3f,
                  4.1666667e-2f, 0.16666667f, 0.5f}) {
    sum = sum * x + c;
  }
  return x * x * sum;
}

// Columns [j, j + W) of a row; -inf beyond its end, where p and q are then 0.
template <int W>
FG_INLINE Floats<W> columns(const float* row, int64_t j, int64_t vocab) {
  if (vocab - j >= W) return load<Floats<W>>(row + j);
  Floats<W> z = Floats<W>{} - INFINITY;
  std::memcpy(&z, row + j, (vocab - j) * 4);
  return z;
}

template <int W>
FG_INLINE void put(float* row, int64_t j, int64_t vocab, Floats<W> z) {
  std::memcpy(row + j, &z, std::min<int64_t>(W, vocab - j) * 4);
}

// sum over j of term(j), in a fixed order.
template <int W, class Term>
FG_INLINE double sum_of(int64_t vocab, const Term& term) {
  double sum = 0.0;
  for (int64_t j = 0; j < vocab;) {
    Floats<W> part{};
    for (int k = 0; k < kBlock && j < vocab; ++k, j += W) part = part + term(j);
    for (int i = 0; i < W; ++i) sum += part[i];
  }
  return sum;
}

struct Normaliser {
  float top;
  double log;  // of the sum of exp(z - top)
};

template <int W>
FG_INLINE Normaliser normaliser(const float* row, int64_t vocab) {
  Floats<W> most = Floats<W>{} - 3e38f;  // finite: -inf alone would make -inf - -inf
  for (int64_t j = 0; j < vocab; j += W) {
    const Floats<W> z = columns<W>(row, j, vocab);
    most = z > most ? z : most;
  }
  float top = most[0];
  for (int i = 1; i < W; ++i) top = std::max(top, most[i]);
  const double sum =
      sum_of<W>(vocab, [&](int64_t j) __attribute__((always_inline)) {
        return exp<W>(columns<W>(row, j, vocab) - top);
      });
  return {top, std::log(sum)};
}

template <int W>
struct Terms {
  Floats<W> p, q, x;  // x = log q - log p, 0 where p is 0
  typename Vec<W>::I near;
  Floats<W> beyond;  // e^x - 1 - x where x is near 0
};

template <int W>
FG_INLINE void one_row(const KlParams& p, int64_t i) {
  using F = Floats<W>;
  float* row_p = p.z_p + i * p.stride_p;
  float* row_q = p.z_q + i * p.stride_q;
  const Normaliser a = normaliser<W>(row_p, p.vocab), b = normaliser<W>(row_q, p.vocab);
  const float log_p = float(a.log), log_q = float(b.log);
  // log q - log p = (z_q - z_p) - shift, which does not cancel when p is close to q.
  const float shift = float((double(b.top) - a.top) + (b.log - a.log));
  const auto terms = [&](int64_t j) __attribute__((always_inline)) {
    const F z_p = columns<W>(row_p, j, p.vocab), z_q = columns<W>(row_q, j, p.vocab);
    Terms<W> t;
    t.p = exp<W>((z_p - a.top) - log_p);
    t.q = exp<W>((z_q - b.top) - log_q);
    const auto possible = t.p != 0.0f;  // true of NaN
    t.x = possible ? (z_q - z_p) - shift : F{};
    t.near = possible & (t.x < 1.0f) & (t.x > -1.0f);
    t.beyond = excess<W>(t.near ? t.x : F{});
    return t;
  };
  const float kl = float(sum_of<W>(p.vocab, [&](int64_t j) __attribute__((always_inline)) {
    const Terms<W> t = terms(j);
    const F far = t.q - t.p - (t.p != 0.0f ? t.p * t.x : F{});
    return t.near ? t.p * t.beyond : far;
  }));
  p.kl[i] = kl;
  if (!p.gradients) return;
  for (int64_t j = 0; j < p.vocab; j += W) {
    const Terms<W> t = terms(j);
    put<W>(row_p, j, p.vocab, t.p != 0.0f ? t.p * (-t.x - kl) : F{});
    put<W>(row_q, j, p.vocab, t.near ? t.p * (t.beyond + t.x) : t.q - t.p);
  }
}

void kl_of_logits(const KlParams& p, int threads) {
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, p.vocab));
  parallel_for(p.rows, grain, threads, [&](int64_t begin, int64_t end) {
    run_best([&](auto level) __attribute__((always_inline)) {
      for (int64_t i = begin; i < end; ++i) one_row<decltype(level)::width>(p, i);
    });
  });
}

}  // namespace fastgrpo
