// A group of at most lanes<V> positions. What is known of a position is a number in its lane of a vector. The logits
// lie in scratch memory as vectors, and stay in cache for all the passes that a divergence needs; main memory is read
// once before them and written once after. Either a vector holds one class of all positions, and the group is one strip
// of vectors; or it holds classes of one position, and each position is a strip of its own. Each pass goes over all
// strips: while one strip waits for a result the next one keeps the processor busy, and what is done once per position
// is done for all positions at once.
#pragma once

#include "core/sums.h"
#include "softmax_divergence/plan.h"

namespace kdkernels::cpu::KDKERNELS_CAPABILITY {

template <class V>
struct Strip {
  static constexpr int arrays = 5;
  V *input, *target;  // logits on entry, unless they are read where they lie; then numerators of the softmax
  V* log_ratio;       // T ln(p / q) without what the sums add to it; then derivatives
  V* slope;           // more derivatives
  V* hard;            // the part of the gradient that comes from the hard labels
};

// Where the logits of one side are read and its gradients written, strip by strip: in scratch memory or in the tensors
template <class V>
struct Side {
  const Scalar<V>* logits[lanes<V>];
  Scalar<V>* gradient[lanes<V>];
  // The number of gradient vectors that are written whole, and of numbers in the last one
  int64_t whole, rest;
};

template <bool classes_in_lanes, class V>
struct Group {
  V* memory;
  int64_t vectors;  // in each array of a strip
  int64_t whole;    // of them, those in which every lane holds a class; the last vector of logits lies in scratch
  int strips;
  Side<V> student, teacher;

  Bits<V> label = Bits<V>{} - 1;         // -1 for none
  V divergence_share{}, label_share{};   // what the results are multiplied with in the loss
  V scale{}, hard_scale{};               // what the gradients are multiplied with
  V divergence{}, cross_entropy{};       // the results
  V max_s{}, max_t{}, sum_s{}, sum_t{};  // of the logits, and of the numerators
  V hard_others{};                       // of the numerators at T = 1, without the label's
  V label_logit{}, label_numerator{};
  V mass{}, log_mass{};  // sum of the probabilities that a teacher is given by
  V entropy{};           // of the teacher; it and the agreement are found where parts are asked for
  V agreement{};

  KDKERNELS_INLINE Strip<V> strip(int k) const {
    V* const first = memory + k * Strip<V>::arrays * vectors;
    return {first, first + vectors, first + 2 * vectors, first + 3 * vectors, first + 4 * vectors};
  }
  // A function that loads vector i of the logits of one side of strip k
  KDKERNELS_INLINE auto reader(const Side<V>& side, int k) const {
    const Scalar<V>* const logits = side.logits[k];
    const Strip<V> here = strip(k);
    const auto* const last = reinterpret_cast<const Scalar<V>*>((&side == &student ? here.input : here.target) + whole);
    return [logits, last, whole = whole](int64_t i) { return load<V>(i < whole ? logits + i * lanes<V> : last); };
  }
  // Numbers by position, as the lanes of strip k need them
  template <class W>
  KDKERNELS_INLINE static W spread(const W& by_position, int k) {
    return classes_in_lanes ? splat<W>(lane(by_position, k)) : by_position;
  }
  KDKERNELS_INLINE static void gather_sum(V& by_position, int k, const V& lanes_of_strip) {
    if constexpr (classes_in_lanes) {
      set_lane(by_position, k, sum_lanes(lanes_of_strip));
    } else {
      by_position = lanes_of_strip;
    }
  }
  KDKERNELS_INLINE static void gather_maximum(V& by_position, int k, const V& lanes_of_strip) {
    if constexpr (classes_in_lanes) {
      set_lane(by_position, k, max_lanes(lanes_of_strip));
    } else {
      by_position = lanes_of_strip;
    }
  }
};

// Calls body(lane, strip, index of the label in the arrays of the strip) for every position with a label.
template <bool classes_in_lanes, class V, class Body>
KDKERNELS_INLINE void for_each_label(const Group<classes_in_lanes, V>& group, const Body& body) {
  for (int l = 0; l < lanes<V>; ++l) {
    const int64_t c = lane(group.label, l);
    if (c >= 0) body(l, classes_in_lanes ? l : 0, classes_in_lanes ? c : c * lanes<V> + l);
  }
}

// For every i < n calls each step (i, slot) and finally body(i, slot, sums); `totals` is what was added to the sums. A
// step is done for `slots` numbers i, each with a slot of its own, before the next step begins.
constexpr int64_t slots = 16;
template <class V, int count, class Body, class... Steps>
KDKERNELS_INLINE void for_each_in_steps(int64_t n, V (&totals)[count], const Body& body, const Steps&... steps) {
  math::BlockedSum<V> sums[count];
  static_assert(slots == math::BlockedSum<V>::block, "the numbers of all slots are a block of a sum");
  [[maybe_unused]] const auto for_slots = [](int64_t begin, int64_t length, const auto& step) {
    for (int64_t slot = 0; slot < length; ++slot) step(begin + slot, slot);
  };
  for (int64_t begin = 0; begin < n; begin += slots) {
    const int64_t length = n - begin < slots ? n - begin : slots;
    (for_slots(begin, length, steps), ...);
    for (int64_t slot = 0; slot < length; ++slot) body(begin + slot, slot, sums);
    for (int s = 0; s < count; ++s) sums[s].close_block();
  }
  for (int s = 0; s < count; ++s) totals[s] = sums[s].sum();
}
// The same without steps before body(i, sums)
template <class V, int count, class Body>
KDKERNELS_INLINE void for_each_with_sums(int64_t n, V (&totals)[count], const Body& body) {
  for_each_in_steps(n, totals, [&](int64_t i, int64_t, auto& sums) { body(i, sums); });
}

}  // namespace kdkernels::cpu::KDKERNELS_CAPABILITY
