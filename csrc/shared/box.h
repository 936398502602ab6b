// SPDX-License-Identifier: Apache-2.0
// Overlap of two boxes (x1, y1, x2, y2): the arithmetic of fastgrpo/reference/box_iou.py, operation
// by operation, so that values agree bit for bit (compile without fused multiply-add).
#pragma once

#include <cfloat>

#include "lanes.h"

namespace fastgrpo {

enum Kind { kIou, kGiou, kDiou, kCiou };
enum Convention { kContinuous, kPixel, kVlmR1 };

template <class T>
struct Limits;
template <>
struct Limits<float> {
  static constexpr float coordinate = 4.6116858809884324e18f;  // sqrt(FLT_MAX) / 4
  static constexpr float tiny = FLT_MIN;
};
template <>
struct Limits<double> {
  static constexpr double coordinate = 3.351951982485649e153;   // sqrt(DBL_MAX) / 4
  static constexpr double tiny = DBL_MIN;
};

template <class T>
struct Box {
  T x1, y1, x2, y2;
};

template <class T>
FG_HD bool is_box(const Box<T>& b) {
  const T big = Limits<T>::coordinate;  // comparisons are false for NaN
  return (b.x1 >= -big) & (b.y1 >= -big) & (b.x2 <= big) & (b.y2 <= big) & (b.x1 <= b.x2) &
         (b.y1 <= b.y2);
}

template <class T>
FG_HD T least(T a, T b) {
  return a < b ? a : b;
}
template <class T>
FG_HD T most(T a, T b) {
  return a > b ? a : b;
}

template <class T>
FG_HD T ratio(T numerator, T denominator) {
  const bool normal = denominator >= Limits<T>::tiny;
  return (normal ? numerator : T(0)) / (normal ? denominator : T(1));
}

// atan(width / height), for CIoU; of a valid box.
template <int convention, class T>
FG_HD T aspect(const Box<T>& box) {
  const T extra = convention == kPixel ? T(1) : T(0);
  const T w = box.x2 - box.x1 + extra, h = box.y2 - box.y1 + extra;
  const T scale = most(w, h);
  const bool normal = scale >= Limits<T>::tiny;
  const T unit = normal ? scale : T(1);
  return T(atan2((normal ? w : T(0)) / unit, (normal ? h : T(1)) / unit));
}

// The aspects of both boxes matter for CIoU only.
template <int kind, int convention, class T>
FG_HD T overlap(const Box<T>& a0, const Box<T>& b0, T a_aspect = T(0), T b_aspect = T(0)) {
  const bool valid = is_box(a0) & is_box(b0);
  const Box<T> unit{T(0), T(0), T(1), T(1)};
  const Box<T> a{valid ? a0.x1 : unit.x1, valid ? a0.y1 : unit.y1, valid ? a0.x2 : unit.x2,
                 valid ? a0.y2 : unit.y2};
  const Box<T> b{valid ? b0.x1 : unit.x1, valid ? b0.y1 : unit.y1, valid ? b0.x2 : unit.x2,
                 valid ? b0.y2 : unit.y2};
  const T extra = convention == kPixel ? T(1) : T(0);
  const T aw = a.x2 - a.x1 + extra, ah = a.y2 - a.y1 + extra;
  const T bw = b.x2 - b.x1 + extra, bh = b.y2 - b.y1 + extra;
  const T left = most(a.x1, b.x1), top = most(a.y1, b.y1);
  const T right = least(a.x2, b.x2), bottom = least(a.y2, b.y2);
  T inter;
  if (convention == kVlmR1) {
    const T iw = right - T(1) - left, ih = bottom - T(1) - top;
    const bool some = (iw > T(0)) & (ih > T(0));
    const T area = (iw + T(1)) * (ih + T(1));
    inter = some ? area : T(0);
  } else {
    inter = most(right - left + extra, T(0)) * most(bottom - top + extra, T(0));
  }
  const T join = aw * ah + bw * bh - inter;
  const T iou = ratio(inter, join);
  T value = iou;
  if (kind != kIou) {
    const T hull_w = most(a.x2, b.x2) - least(a.x1, b.x1) + extra;
    const T hull_h = most(a.y2, b.y2) - least(a.y1, b.y1) + extra;
    if (kind == kGiou) {
      const T hull = hull_w * hull_h;
      value = iou - ratio(most(hull - join, T(0)), hull);
    } else {
      const T dx = (a.x1 + a.x2 - b.x1 - b.x2) / T(2), dy = (a.y1 + a.y2 - b.y1 - b.y2) / T(2);
      value = iou - ratio(dx * dx + dy * dy, hull_w * hull_w + hull_h * hull_h);
    }
    if (kind == kCiou) {
      const T angle = a_aspect - b_aspect;
      const T v = T(0.40528473456935109) * angle * angle;  // 4 / pi^2
      value = value - ratio(v, T(1) - iou + v) * v;
    }
  }
  const T low = kind == kIou ? T(0) : kind == kCiou ? T(-1.5) : T(-1);
  return valid ? least(most(value, low), T(1)) : low;
}

}  // namespace fastgrpo
