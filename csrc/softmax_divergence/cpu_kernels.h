// Divergences between softmax distributions: tiles of logits are read from memory, processed group by group in cache,
// and their gradients written back.
#pragma once

#include "core/cpu/scratch.h"
#include "softmax_divergence/cpu_other.h"
#include "softmax_divergence/cpu_passes.h"
#include "softmax_divergence/cpu_temperature.h"
#include "softmax_divergence/cpu_tiles.h"

namespace kdkernels::cpu::KDKERNELS_CAPABILITY {

// How much a position counts in the two terms of the loss
struct PositionWeights {
  double divergence, labels;
};

template <class S>
KDKERNELS_INLINE PositionWeights weights_of(const SoftmaxCall& call, int64_t position) {
  const auto* const weights = static_cast<const S*>(call.position_weight);
  const double weight = weights == nullptr ? 1.0 : double(weights[position]);
  const bool ignored = call.labels != nullptr && call.labels[position] == call.ignored_label;
  return {ignored && call.ignored_by_divergence ? 0.0 : weight, ignored ? 0.0 : weight};
}

// The incoming gradient of a position
template <class S>
KDKERNELS_INLINE S grad_of(const SoftmaxCall& call, int64_t position) {
  const S* const grad_output = static_cast<const S*>(call.grad_output);
  return grad_output == nullptr ? S(1) : grad_output[position * call.grad_stride];
}

// The product with the share of a position in the loss, 0 where that is 0
template <class V>
KDKERNELS_INLINE V product(const V& share, const V& value) {
  return select(share == Scalar<V>(0), V{}, share * value);
}

// The logits of a position that does not count must not matter, even if they are NaN.
template <bool classes_in_lanes, class V>
KDKERNELS_INLINE void clear_position(Group<classes_in_lanes, V>& group, int l) {
  const int k = classes_in_lanes ? l : 0;
  const Strip<V> strip = group.strip(k);
  for (int64_t i = 0; i < group.vectors; ++i) {
    if constexpr (classes_in_lanes) {
      strip.input[i] = strip.target[i] = V{};
    } else {
      set_lane(strip.input[i], l, 0);
      set_lane(strip.target[i], l, 0);
    }
  }
  group.student.logits[k] = reinterpret_cast<const Scalar<V>*>(strip.input);
  group.teacher.logits[k] = reinterpret_cast<const Scalar<V>*>(strip.target);
}

// Sets the labels and scales of a group of `count` positions from `position` on.
template <bool classes_in_lanes, class V>
KDKERNELS_INLINE void prepare_group(const SoftmaxCall& call, Group<classes_in_lanes, V>& group, int64_t position,
                                    int count) {
  using S = Scalar<V>;
  const double of_divergence = call.divergence_weight * call.divergence_normalizer;
  const double of_labels = call.label_weight * call.label_normalizer;
  group.divergence_share = splat<V>(S(of_divergence));
  group.label_share = splat<V>(S(of_labels));
  const bool weighted = call.position_weight != nullptr;
  for (int l = 0; l < count && (weighted || call.labels != nullptr); ++l) {
    const PositionWeights weights = weights_of<S>(call, position + l);
    if (weights.labels != 0) {
      if (call.labels != nullptr) set_lane(group.label, l, call.labels[position + l]);
    } else if (weights.divergence == 0) {
      clear_position(group, l);
    }
    if (!weighted && weights.labels != 0) continue;
    set_lane(group.divergence_share, l, of_divergence * weights.divergence);
    set_lane(group.label_share, l, of_labels * weights.labels);
  }
  V grad = splat<V>(grad_of<S>(call, 0));
  for (int l = 0; l < count && call.grad_stride != 0; ++l) set_lane(grad, l, grad_of<S>(call, position + l));
  group.scale = product(group.divergence_share, grad);
  group.hard_scale = product(group.label_share, grad);
}

// Writes the parts of the loss, and the sums of the teacher's probabilities, if they are asked for.
template <bool classes_in_lanes, class V>
[[gnu::noinline]] void write_parts(const SoftmaxCall& call, const Group<classes_in_lanes, V>& group,
                                   const SoftmaxOptions<Scalar<V>>& options, int64_t position, int count) {
  using S = Scalar<V>;
  const V logsumexp_s = group.max_s * options.inverse_temperature + math::log_positive(group.sum_s);
  const V logsumexp_t = group.max_t * options.inverse_temperature + math::log_positive(group.sum_t);
  for (int l = 0; l < count; ++l) {
    const PositionWeights weights = weights_of<S>(call, position + l);
    const bool counted = weights.divergence != 0 || weights.labels != 0;
    if (call.masses != nullptr) static_cast<S*>(call.masses)[position + l] = counted ? lane(group.mass, l) : S(1);
    if (!options.parts) continue;
    const bool no_mass = options.probabilities && lane(group.mass, l) == 0;
    const S values[] = {weights.labels != 0 && options.labels ? lane(group.cross_entropy, l) : S(0),
                        weights.divergence != 0 && options.divergence ? lane(group.divergence, l) : S(0),
                        lane(logsumexp_s, l),
                        no_mass ? -math::infinity<V> : lane(logsumexp_t, l),
                        lane(group.entropy, l),
                        lane(group.agreement, l)};
    S* part = static_cast<S*>(call.parts) + position + l;
    for (const S value : values) {
      *part = counted ? value : S(0);
      part += call.positions;
    }
  }
}

// Returns the sum of the losses of a group, and writes what is asked for of each position.
template <bool classes_in_lanes, class V>
KDKERNELS_INLINE double losses_of(const SoftmaxCall& call, const Group<classes_in_lanes, V>& group,
                                  const SoftmaxOptions<Scalar<V>>& options, int64_t position, int count) {
  const V losses = product(group.divergence_share, group.divergence) + product(group.label_share, group.cross_entropy);
  double total = 0;
  for (int l = 0; l < count; ++l) total += double(lane(losses, l));
  if (call.position_loss != nullptr) {
    auto* const loss = static_cast<Scalar<V>*>(call.position_loss) + position;
    for (int l = 0; l < count; ++l) loss[l] = lane(losses, l);
  }
  if (options.parts || call.masses != nullptr) write_parts(call, group, options, position, count);
  return total;
}

// Prefetches what the strips of the next tile will read and write where each of their classes is a short piece of
// memory far from the next one. Whole rows are prefetched by the hardware.
template <bool classes_in_lanes, class V>
struct FetchAhead {
  const Tile& tile;
  int64_t first_strip;

  KDKERNELS_INLINE void operator()(int k) const {
    const int64_t first = (first_strip + k) * lanes<V>;
    if (classes_in_lanes || first >= tile.count) return;
    for (const Place& place : tile.place) {
      if (place.data == nullptr || place.position_stride != 1) continue;
      const char* piece = place.data + first * place.size;
      for (int64_t c = 0; c < tile.classes; ++c) prefetch(piece + c * place.class_stride * place.size);
    }
  }
};

template <bool classes_in_lanes, Divergence divergence, class V>
KDKERNELS_INLINE double compute_tile(const SoftmaxCall& call, const SoftmaxOptions<Scalar<V>>& options,
                                     const Tile& tile, const Tile& next, Scalar<V>* scratch) {
  V* memory = reinterpret_cast<V*>(scratch);
  double total = 0;
  for (int64_t start = 0, strips = 0; start < tile.count; start += lanes<V>) {
    const int count = int(tile.count - start < lanes<V> ? tile.count - start : lanes<V>);
    Group<classes_in_lanes, V> group = group_at<classes_in_lanes, V>(tile, start, memory);
    prepare_group(call, group, tile.first + start, count);
    const FetchAhead<classes_in_lanes, V> ahead{next, strips};
    if constexpr (divergence == Divergence::other) {
      process_other(group, options, ahead);
    } else if (options.labels) {
      process_group<divergence, true>(group, options, tile.first + start, count, ahead);
    } else {
      process_group<divergence, false>(group, options, tile.first + start, count, ahead);
    }
    total += losses_of(call, group, options, tile.first + start, count);
    memory += group.strips * Strip<V>::arrays * group.vectors;
    strips += group.strips;
  }
  return total;
}

KDKERNELS_INLINE Place place_of(const SoftmaxOperand<max_dims>& operand, const SoftmaxCall& call, int64_t run,
                                int64_t first) {
  if (operand.data == nullptr) return {};
  int64_t element = first * operand.inner_stride;
  for (int d = call.outer_dims - 1; d >= 0; --d) {
    element += run % call.outer_size[d] * operand.outer_stride[d];
    run /= call.outer_size[d];
  }
  const int64_t size = size_of(operand.storage);
  return {static_cast<char*>(operand.data) + element * size, operand.class_stride, operand.inner_stride, size};
}

KDKERNELS_INLINE Tile tile_at(const SoftmaxCall& call, int64_t item) {
  const int64_t run = item / call.tiles_in_run, first = item % call.tiles_in_run * call.tile;
  const int64_t rest = call.inner - first;
  Tile tile{run * call.inner + first, rest < call.tile ? rest : call.tile, call.classes, {}};
  for (int o = 0; o < operands; ++o) tile.place[o] = place_of(call.operand[o], call, run, first);
  tile.place[student].changed = call.is_decoupled();
  tile.place[teacher].changed = call.target_type != TargetType::logits || call.is_decoupled();
  return tile;
}

template <bool classes_in_lanes, Divergence divergence, class S>
double compute_tiles(const SoftmaxCall& call, int64_t begin, int64_t end) {
  using V = Vector<S, KDKERNELS_VECTOR_BYTES>;
  SoftmaxOptions<S> options;
  options.inverse_temperature = S(1 / call.temperature);
  options.beta = S(call.beta);
  options.reverse = call.reverse;
  options.call = &call;
  options.general_labels = call.general_labels();
  options.parts = call.parts != nullptr;
  options.labels =
      (call.labels != nullptr || call.label_probabilities != nullptr) && (call.label_weight != 0 || options.parts);
  options.probabilities = call.target_type != TargetType::logits;
  options.divergence = call.divergence_weight != 0 || options.parts;
  options.want_input_gradient = call.operand[student_gradient].data != nullptr;
  options.want_target_gradient = call.operand[teacher_gradient].data != nullptr;

  const int64_t strips = classes_in_lanes ? call.tile : (call.tile + lanes<V> - 1) / lanes<V>;
  const Scratch<S> scratch(strips * Strip<V>::arrays * vectors_of<classes_in_lanes, V>(call.classes) * lanes<V>);
  double total = 0;
  Tile tile = tile_at(call, begin);
  for (int64_t item = begin; item < end; ++item) {
    const Tile next = item + 1 < end ? tile_at(call, item + 1) : Tile{};
    read_logits<classes_in_lanes, V>(call, tile, scratch.get());
    total += compute_tile<classes_in_lanes, divergence, V>(call, options, tile, next, scratch.get());
    for (int o = student_gradient; o <= teacher_gradient; ++o) {
      if (call.operand[o].data == nullptr || in_place<classes_in_lanes, S>(tile.place[o])) continue;
      with_storage(call.operand[o].storage, [&](auto storage) {
        write_tile<classes_in_lanes, V, decltype(storage)>(tile, o == teacher_gradient, tile.place[o], scratch.get());
      });
    }
    if constexpr (divergence != Divergence::other) {
      if (call.scalar_gradients != nullptr && options.divergence) {
        differentiate_by_scalars<classes_in_lanes, divergence, V>(call, options, tile, scratch.get());
      }
    }
    tile = next;
  }
  return total;
}

template <bool classes_in_lanes, class S>
double choose_divergence(const SoftmaxCall& call, int64_t begin, int64_t end) {
  switch (call.divergence) {
    case Divergence::kl:
      return compute_tiles<classes_in_lanes, Divergence::kl, S>(call, begin, end);
    case Divergence::js:
      return compute_tiles<classes_in_lanes, Divergence::js, S>(call, begin, end);
    case Divergence::clamped_js:
      return compute_tiles<classes_in_lanes, Divergence::clamped_js, S>(call, begin, end);
    default:
      return compute_tiles<classes_in_lanes, Divergence::other, S>(call, begin, end);
  }
}

double softmax_tiles(const SoftmaxCall& call, int64_t begin, int64_t end) {
  if (call.is_double) {
    return call.classes_in_lanes ? choose_divergence<true, double>(call, begin, end)
                                 : choose_divergence<false, double>(call, begin, end);
  }
  return call.classes_in_lanes ? choose_divergence<true, float>(call, begin, end)
                               : choose_divergence<false, float>(call, begin, end);
}

}  // namespace kdkernels::cpu::KDKERNELS_CAPABILITY
