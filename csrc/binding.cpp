// SPDX-License-Identifier: Apache-2.0
// Python bindings of the CPU kernels: NumPy views in (of PyTorch's memory), checked against the
// shapes the kernels trust. Results are written into arrays of the caller.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <string>

#include "cpu/simd.h"
#include "params.h"

namespace py = pybind11;
using namespace fastgrpo;

template <class T>
using Array = py::array_t<T, py::array::c_style>;
template <class T>
using Maybe = std::optional<Array<T>>;

static void check(bool fits, const char* name, const char* wanted) {
  if (!fits) throw py::value_error(std::string(name) + ": expected " + wanted);
}

template <class T>
static const T* pointer(const Array<T>& array, int64_t size, const char* name) {
  check(array.size() == size, name, ("as many elements as the other arguments imply, " +
                                     std::to_string(size)).c_str());
  return array.data();
}

template <class T>
static const T* pointer(const Maybe<T>& array, int64_t size, const char* name) {
  return array ? pointer(*array, size, name) : nullptr;
}

template <class T>
static T* output(Array<T>& array, int64_t size, const char* name) {
  check(array.size() == size && array.writeable(), name, "a writeable array of the result's size");
  return array.mutable_data();
}

// Starts of samples: (samples + 1), from 0, never falling.
static const int64_t* starts(const Array<int64_t>& array, int64_t samples, int64_t total,
                             const char* name) {
  const int64_t* start = pointer(array, samples + 1, name);
  bool fits = start[0] == 0 && start[samples] == total;
  for (int64_t k = 0; k < samples; ++k) {
    fits &= start[k] <= start[k + 1] && start[k + 1] - start[k] < INT32_MAX;
  }
  check(fits, name, "starts of samples: from 0, rising, to the number of elements");
  return start;
}

static void check_pairs(const int64_t* a, const int64_t* b, const int64_t* pairs, int64_t samples) {
  bool fits = true;
  for (int64_t k = 0; k < samples; ++k) {
    fits &= pairs[k + 1] - pairs[k] == (a[k + 1] - a[k]) * (b[k + 1] - b[k]);
  }
  check(fits, "offsets", "the running sum of rows times columns");
}

// Row stride, in floats, of a writeable (C, V) array whose rows are contiguous and apart.
static int64_t row_stride(const py::array_t<float>& array, const char* name) {
  check(array.ndim() == 2 && array.writeable(), name, "a writeable (C, V) array");
  const int64_t rows = array.shape(0), columns = array.shape(1);
  check(rows == 0 || columns <= 1 || array.strides(1) == 4, name, "a contiguous last dimension");
  check(rows <= 1 || (array.strides(0) % 4 == 0 && array.strides(0) >= 4 * columns), name,
        "rows that do not overlap");
  return rows > 1 ? array.strides(0) / 4 : columns;
}

static void bind_offset_exp(py::array_t<float> logits, Array<int64_t> targets,
                            Maybe<float> inv_temperature, Maybe<float> bias,
                            Maybe<float> given_target_logit, float logit_scale, float softcap,
                            bool bfloat16, Array<float> sum_exp, Array<float> target_logit,
                            Maybe<float> moment, Array<uint8_t> overflow, int threads) {
  OffsetExpParams p{};
  p.stride = row_stride(logits, "logits");
  const int64_t rows = p.rows = logits.shape(0), vocab = p.vocab = logits.shape(1);
  p.logits = logits.mutable_data();
  p.targets = pointer(targets, rows, "targets");
  p.inv_temperature = pointer(inv_temperature, rows, "inv_temperature");
  p.bias = pointer(bias, vocab, "bias");
  p.given_target_logit = pointer(given_target_logit, rows, "given_target_logit");
  p.logit_scale = logit_scale;
  p.softcap = softcap;
  p.bfloat16 = bfloat16;
  p.sum_exp = output(sum_exp, rows, "sum_exp");
  p.target_logit = output(target_logit, rows, "target_logit");
  p.moment = moment ? output(*moment, rows, "moment") : nullptr;
  p.overflow = output(overflow, rows, "overflow");
  py::gil_scoped_release release;
  offset_exp(p, threads);
}

static void bind_kl_of_logits(py::array_t<float> z_p, py::array_t<float> z_q, bool gradients,
                              Array<float> kl, int threads) {
  KlParams p{};
  p.stride_p = row_stride(z_p, "z_p");
  p.stride_q = row_stride(z_q, "z_q");
  p.rows = z_p.shape(0);
  p.vocab = z_p.shape(1);
  check(z_q.shape(0) == p.rows && z_q.shape(1) == p.vocab, "z_q", "the shape of z_p");
  p.z_p = z_p.mutable_data();
  p.z_q = z_q.mutable_data();
  p.gradients = gradients;
  p.kl = output(kl, p.rows, "kl");
  py::gil_scoped_release release;
  kl_of_logits(p, threads);
}

template <class T>
static void bind_pairwise(Array<T> a, Array<T> b, Array<int64_t> a_start, Array<int64_t> b_start,
                          Array<int64_t> offsets, int kind, int convention, Array<T> values,
                          int threads) {
  PairwiseParams<T> p{};
  p.samples = a_start.size() - 1;
  p.a = pointer(a, a.shape(0) * 4, "a");
  p.b = pointer(b, b.shape(0) * 4, "b");
  p.a_start = starts(a_start, p.samples, a.shape(0), "a_start");
  p.b_start = starts(b_start, p.samples, b.shape(0), "b_start");
  p.offsets = starts(offsets, p.samples, values.size(), "offsets");
  check_pairs(p.a_start, p.b_start, p.offsets, p.samples);
  p.kind = kind;
  p.convention = convention;
  p.values = output(values, values.size(), "values");
  py::gil_scoped_release release;
  pairwise_box_iou(p, threads);
}

template <class Score>
static void bind_match(Array<Score> scores, Maybe<uint8_t> mask, Array<int64_t> a_start,
                       Array<int64_t> b_start, Array<int64_t> offsets, int method, double threshold,
                       Array<int64_t> column, int threads) {
  MatchParams<Score> p{};
  p.samples = a_start.size() - 1;
  p.scores = scores.data();
  p.mask = pointer(mask, scores.size(), "mask");
  p.a_start = starts(a_start, p.samples, column.size(), "a_start");
  p.b_start = starts(b_start, p.samples, b_start.at(p.samples), "b_start");
  p.offsets = starts(offsets, p.samples, scores.size(), "offsets");
  check_pairs(p.a_start, p.b_start, p.offsets, p.samples);
  p.method = method;
  p.threshold = threshold;
  p.column = output(column, column.size(), "column");
  py::gil_scoped_release release;
  match_boxes(p, threads);
}

static void bind_average_precision(Array<double> boxes, Array<int64_t> labels, Array<double> scores,
                                   Array<double> gt_boxes, Array<int64_t> gt_labels,
                                   Array<int64_t> start, Array<int64_t> gt_start,
                                   Array<double> thresholds, int max_dets, bool ranged, double low,
                                   double high, Array<double> ap, int threads) {
  ApParams p{};
  p.samples = start.size() - 1;
  p.boxes = pointer(boxes, labels.size() * 4, "pred_boxes");
  p.labels = labels.data();
  p.scores = pointer(scores, labels.size(), "pred_scores");
  p.gt_boxes = pointer(gt_boxes, gt_labels.size() * 4, "gt_boxes");
  p.gt_labels = gt_labels.data();
  p.start = starts(start, p.samples, labels.size(), "pred_start");
  p.gt_start = starts(gt_start, p.samples, gt_labels.size(), "gt_start");
  p.thresholds = thresholds.data();
  p.num_thresholds = int(thresholds.size());
  p.max_dets = max_dets;
  p.ranged = ranged;
  p.low = low;
  p.high = high;
  p.ap = output(ap, p.samples * p.num_thresholds, "ap");
  py::gil_scoped_release release;
  average_precision(p, threads);
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of fastgrpo; called through fastgrpo_kernels._cpp";
  // noconvert: a wrong dtype is an error, not a copy whose result is lost.
  const auto array = [](const char* name) { return py::arg(name).noconvert(); };
  m.def(
      "limit_isa",
      [](int level) { return isa_level() = std::clamp(level, 0, isa_of_this_machine()); },
      py::arg("level"), "For tests: 0 base, 1 AVX2, 2 AVX-512; returns the level now in use.");
  m.def("offset_exp", &bind_offset_exp, array("logits"), array("targets"),
        array("inv_temperature"), array("bias"), array("given_target_logit"), py::arg("logit_scale"),
        py::arg("softcap"), py::arg("bfloat16"), array("sum_exp"), array("target_logit"),
        array("moment"), array("overflow"), py::arg("threads"));
  m.def("kl_of_logits", &bind_kl_of_logits, array("z_p"), array("z_q"), py::arg("gradients"),
        array("kl"), py::arg("threads"));
  m.def("pairwise_box_iou", &bind_pairwise<float>, array("a"), array("b"), array("a_start"),
        array("b_start"), array("offsets"), py::arg("kind"), py::arg("convention"),
        array("values"), py::arg("threads"));
  m.def("pairwise_box_iou", &bind_pairwise<double>, array("a"), array("b"), array("a_start"),
        array("b_start"), array("offsets"), py::arg("kind"), py::arg("convention"),
        array("values"), py::arg("threads"));
  m.def("match_boxes", &bind_match<float>, array("scores"), array("mask"), array("a_start"),
        array("b_start"), array("offsets"), py::arg("method"), py::arg("threshold"),
        array("column"), py::arg("threads"));
  m.def("match_boxes", &bind_match<double>, array("scores"), array("mask"), array("a_start"),
        array("b_start"), array("offsets"), py::arg("method"), py::arg("threshold"),
        array("column"), py::arg("threads"));
  m.def("average_precision", &bind_average_precision, array("pred_boxes"), array("pred_labels"),
        array("pred_scores"), array("gt_boxes"), array("gt_labels"), array("pred_start"),
        array("gt_start"), array("thresholds"), py::arg("max_dets"), py::arg("ranged"),
        py::arg("low"), py::arg("high"), array("ap"), py::arg("threads"));
}
