// SPDX-License-Identifier: Apache-2.0
// One source, three instruction sets, chosen when the program runs: a body is a lambda that takes a
// Level and is inlined into one function per set. Nothing is built for the builder's own machine.
#pragma once

#include <atomic>

#define FG_INLINE inline __attribute__((always_inline))

namespace fastgrpo {

template <int Width>
struct Level {
  static constexpr int width = Width;  // floats per vector
};

#if defined(__x86_64__)
#if defined(__clang__)
#define FG_AVX512 __attribute__((target("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma")))
#else
#define FG_AVX512 \
  __attribute__((target("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma,prefer-vector-width=512")))
#endif
template <class Body>
FG_AVX512 void run_avx512(const Body& body) {
  body(Level<16>{});
}
template <class Body>
__attribute__((target("avx2,fma"))) void run_avx2(const Body& body) {
  body(Level<8>{});
}
#endif
template <class Body>
void run_base(const Body& body) {
  body(Level<4>{});
}

// 2 AVX-512, 1 AVX2 with FMA, 0 what every machine of this architecture has.
inline int isa_of_this_machine() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
  return wide ? 2 : 1;
#else
  return 0;
#endif
}

// The level in use; tests lower it, so that one machine tests all three.
inline std::atomic<int>& isa_level() {
  static std::atomic<int> level{isa_of_this_machine()};
  return level;
}

template <class Body>
void run_best(const Body& body) {
#if defined(__x86_64__)
  const int level = isa_level();
  if (level == 2) return run_avx512(body);
  if (level == 1) return run_avx2(body);
#endif
  run_base(body);
}

}  // namespace fastgrpo
