// SPDX-License-Identifier: Apache-2.0
// The scores of one sample's pairs, and which of them may be matched.
#pragma once

#include "lanes.h"

namespace fastgrpo {

constexpr double kScoreLimit = 1e100;  // beyond it sums of scores lose all meaning

template <class Score>
struct Pairs {
  const Score* scores;   // (rows, cols), row-major
  const uint8_t* mask;   // the same shape, or null
  double threshold;      // -infinity for none
  int rows, cols;

  FG_HD double score(int64_t pair) const { return double(scores[pair]); }
  FG_HD bool allowed(int64_t pair) const {
    const double s = score(pair);
    return s <= kScoreLimit && s >= -kScoreLimit && s >= threshold && (!mask || mask[pair]);
  }
};

}  // namespace fastgrpo
