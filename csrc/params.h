// SPDX-License-Identifier: Apache-2.0
// What the binding checks and fills in, and the kernels trust. Pointers are to contiguous memory.
#pragma once

#include <cstdint>

namespace fastgrpo {

struct OffsetExpParams {
  float* logits;  // (rows, vocab), row stride `stride` floats; E is written over it
  int64_t rows, vocab, stride;
  const int64_t* targets;           // (rows)
  const float* inv_temperature;     // (rows) or null
  const float* bias;                // (vocab) or null
  const float* given_target_logit;  // (rows) or null: f(z_y) where the vocabulary is sharded
  float logit_scale, softcap;       // softcap 0: none
  bool bfloat16;                    // E as bfloat16 in the first half of its row
  float* sum_exp;                   // (rows)
  float* target_logit;              // (rows)
  float* moment;                    // (rows) or null
  uint8_t* overflow;                // (rows)
};

struct KlParams {
  float *z_p, *z_q;  // (rows, vocab) logits; the gradients of kl go over them if wanted
  int64_t rows, vocab, stride_p, stride_q;
  bool gradients;
  float* kl;  // (rows)
};

template <class T>
struct PairwiseParams {
  const T *a, *b;                       // boxes
  const int64_t *a_start, *b_start;     // (samples + 1) first box of each sample
  const int64_t* offsets;               // (samples + 1) first value of each sample
  int64_t samples;
  int kind, convention;
  T* values;
};

enum MatchMethod { kOptimal, kGreedy, kGreedyRows };

template <class Score>
struct MatchParams {
  const Score* scores;
  const uint8_t* mask;                  // or null
  const int64_t *a_start, *b_start, *offsets;
  int64_t samples;
  int method;
  double threshold;  // -inf: none
  int64_t* column;   // (total rows)
};

struct ApParams {
  const double* boxes;
  const int64_t* labels;
  const double* scores;
  const double* gt_boxes;
  const int64_t* gt_labels;
  const int64_t *start, *gt_start;  // (samples + 1)
  int64_t samples;
  const double* thresholds;
  int num_thresholds, max_dets;
  bool ranged;
  double low, high;
  double* ap;  // (samples, num_thresholds)
};

// Every kernel computes the same whatever the number of threads.
void offset_exp(const OffsetExpParams& p, int threads);
void kl_of_logits(const KlParams& p, int threads);
template <class T>
void pairwise_box_iou(const PairwiseParams<T>& p, int threads);
template <class Score>
void match_boxes(const MatchParams<Score>& p, int threads);
void average_precision(const ApParams& p, int threads);

}  // namespace fastgrpo
