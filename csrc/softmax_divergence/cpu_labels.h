// The cross-entropy of smoothed labels, of probabilities as labels, and with class weights. With u_c the label of class
// c times its weight, A = sum u, z relative to the maximum and S = sum e^z, it is A ln S - sum u z, and its derivative
// by z_c is A e^z_c / S - u_c.
#pragma once

#include "softmax_divergence/cpu_group.h"
#include "softmax_divergence/math.h"

namespace kdkernels::cpu::KDKERNELS_CAPABILITY {

// The weight of the classes of vector i: of its lanes, or of the one class that it holds
template <bool classes_in_lanes, class V>
KDKERNELS_INLINE V class_weights(const SoftmaxCall& call, int64_t i, int64_t whole) {
  const auto* const weights = static_cast<const Scalar<V>*>(call.class_weight);
  if constexpr (!classes_in_lanes) {
    return splat<V>(weights == nullptr ? 1 : weights[i]);
  } else {
    const int64_t rest = call.classes - i * lanes<V>;
    if (weights == nullptr) return i < whole ? splat<V>(1) : keep_lanes(splat<V>(1), rest, 0);
    return i < whole ? load<V>(weights + i * lanes<V>) : load_part<V>(weights + i * lanes<V>, rest, 0);
  }
}

template <class S>
KDKERNELS_INLINE S class_weight(const SoftmaxCall& call, int64_t c) {
  return call.class_weight == nullptr ? S(1) : static_cast<const S*>(call.class_weight)[c];
}

// Reads labels that are probabilities into the slopes of the strips, which are not in use yet.
template <bool classes_in_lanes, class V>
KDKERNELS_INLINE void read_label_probabilities(Group<classes_in_lanes, V>& group, const SoftmaxCall& call,
                                               int64_t first, int count) {
  using S = Scalar<V>;
  const int64_t stride = call.label_class_stride;
  with_storage(call.label_storage, [&](auto storage) {
    const auto* const labels = static_cast<const decltype(storage)*>(call.label_probabilities);
    for (int k = 0; k < group.strips; ++k) group.strip(k).slope[group.vectors - 1] = V{};
    if (!classes_in_lanes) {
      for (int64_t i = 0; i < group.vectors; ++i) group.strip(0).slope[i] = V{};
    }
    for (int l = 0; l < count; ++l) {
      const int64_t position = first + l, run = position / stride;
      const auto* const row = labels + run * call.classes * stride + position % stride;
      V* const slope = group.strip(classes_in_lanes ? l : 0).slope;
      S* const flat = reinterpret_cast<S*>(slope) + (classes_in_lanes ? 0 : l);
      int64_t c = 0;
      if (classes_in_lanes && stride == 1) {
        for (int64_t i = 0; i < group.whole; ++i) slope[i] = load<V>(row + i * lanes<V>);
        c = group.whole * lanes<V>;
      }
      for (; c < call.classes; ++c) flat[c * (classes_in_lanes ? 1 : lanes<V>)] = load_one<S>(row + c * stride);
    }
  });
}

// Calls body(k, u) for each strip k with a function u(i) that gives the labels times their weights, but for the share
// of a label that is a class.
template <bool classes_in_lanes, class V, class Body>
KDKERNELS_INLINE void for_each_strip_of_labels(const Group<classes_in_lanes, V>& group, const SoftmaxCall& call,
                                               const Body& body) {
  using S = Scalar<V>;
  const S uniform = S(call.label_smoothing / double(call.classes)), rest = S(1 - call.label_smoothing);
  for (int k = 0; k < group.strips; ++k) {
    const V* const probabilities = group.strip(k).slope;
    if (call.label_probabilities != nullptr) {
      body(k, [&](int64_t i) {
        return (probabilities[i] * rest + uniform) * class_weights<classes_in_lanes, V>(call, i, group.whole);
      });
    } else {
      body(k, [&](int64_t i) { return class_weights<classes_in_lanes, V>(call, i, group.whole) * uniform; });
    }
  }
}

// Finds A and sum u z before the logits are overwritten; the latter is kept in label_logit, and A in cross_entropy.
template <bool classes_in_lanes, class V>
[[gnu::noinline]] void begin_general_labels(Group<classes_in_lanes, V>& group, const SoftmaxCall& call, int64_t first,
                                            int count) {
  using S = Scalar<V>;
  if (call.label_probabilities != nullptr) read_label_probabilities(group, call, first, count);
  V total{}, mean{};
  if (call.label_probabilities != nullptr || call.label_smoothing != 0) {
    for_each_strip_of_labels(group, call, [&](int k, const auto& labels) {
      const auto logits = group.reader(group.student, k);
      const V largest = group.spread(group.max_s, k);
      V sums[2];
      for_each_with_sums(group.vectors, sums, [&](int64_t i, auto& sum) {
        const V label = labels(i);
        sum[0].add(label);
        sum[1].add(select(label == S(0), V{}, label * (logits(i) - largest)));
      });
      group.gather_sum(total, k, sums[0]);
      group.gather_sum(mean, k, sums[1]);
    });
  }
  for_each_label(group, [&](int l, int k, int64_t at) {
    const S weight = S(1 - call.label_smoothing) * class_weight<S>(call, lane(group.label, l));
    const S logit = group.student.logits[k][at] - lane(group.max_s, l);
    set_lane(group.label_numerator, l, logit);
    set_lane(total, l, lane(total, l) + weight);
    if (weight != 0) set_lane(mean, l, lane(mean, l) + weight * logit);
  });
  group.label_numerator = math::exp_nonpositive(group.label_numerator);
  group.cross_entropy = total;
  group.label_logit = mean;
}

// Computes the cross-entropy, and prepares its gradient.
template <bool classes_in_lanes, class V>
[[gnu::noinline]] void finish_general_labels(Group<classes_in_lanes, V>& group, const SoftmaxCall& call) {
  using S = Scalar<V>;
  // find_numerators left out the label's numerator.
  V others = group.hard_others;
  for_each_label(group, [&](int l, int k, int64_t at) {
    S* const hard = reinterpret_cast<S*>(group.strip(k).hard) + at;
    *hard = lane(group.label_numerator, l);
    set_lane(others, l, lane(others, l) + *hard);
  });
  const V total = group.cross_entropy;
  group.cross_entropy = total * math::log_positive(others) - group.label_logit;
  const V share = total / others;
  for_each_strip_of_labels(group, call, [&](int k, const auto& labels) {
    V* const hard = group.strip(k).hard;
    const V share_here = group.spread(share, k);
    for (int64_t i = 0; i < group.vectors; ++i) hard[i] = hard[i] * share_here - labels(i);
  });
  for_each_label(group, [&](int l, int k, int64_t at) {
    S* const hard = reinterpret_cast<S*>(group.strip(k).hard) + at;
    *hard -= S(1 - call.label_smoothing) * class_weight<S>(call, lane(group.label, l));
  });
}

}  // namespace kdkernels::cpu::KDKERNELS_CAPABILITY
