// Divergences between softmax distributions: tiles of logits are read from memory, computed strip by strip in cache,
// and written back.
#pragma once

#include "scratch.h"
#include "softmax_strip.h"

namespace kdkernels::cpu::KDKERNELS_CAPABILITY {

// Neighbouring positions of one run. In scratch they are a row of strips, each a position (classes in the lanes) or
// lanes<V> positions.
template <class S>
struct Tile {
  S* scratch;
  int64_t run, first, count;
  int64_t classes;
};

template <bool classes_in_lanes, class V>
KDKERNELS_INLINE int64_t vectors_of(int64_t classes) {
  return classes_in_lanes ? (classes + lanes<V> - 1) / lanes<V> : classes;
}

// Where an operand of a tile lies
struct Place {
  void* data;
  int64_t class_stride, position_stride;
};

// Lanes that hold no class get -inf, which has no mass; lanes that hold no position get 0.
template <bool classes_in_lanes, class V, class T>
KDKERNELS_INLINE void read_tile(const Tile<Scalar<V>>& tile, bool teacher, const Place& place) {
  using S = Scalar<V>;
  const T* source = static_cast<const T*>(place.data);
  const int64_t n = vectors_of<classes_in_lanes, V>(tile.classes), stride = place.class_stride;
  const int64_t between = Strip<V>::arrays * n;
  V* const first = reinterpret_cast<V*>(tile.scratch) + (teacher ? n : 0);
  if (classes_in_lanes) {
    for (int64_t k = 0; k < tile.count; ++k, source += place.position_stride) {
      V* const row = first + k * between;
      if (stride == 1) {
        const int64_t full = tile.classes / lanes<V>, rest = tile.classes - full * lanes<V>;
        for (int64_t i = 0; i < full; ++i) row[i] = load<V>(source + i * lanes<V>);
        if (rest > 0) row[full] = load_part<V>(source + full * lanes<V>, rest, -math::infinity<V>);
      } else {
        row[n - 1] = splat<V>(-math::infinity<V>);
        S* const flat = reinterpret_cast<S*>(row);
        for (int64_t c = 0; c < tile.classes; ++c) flat[c] = load_one<S>(source + c * stride);
      }
    }
  } else {
    const int64_t full = place.position_stride == 1 ? tile.count / lanes<V> : 0;
    for (int64_t c = 0; c < tile.classes; ++c) {
      for (int64_t k = 0; k < full; ++k) first[k * between + c] = load<V>(source + c * stride + k * lanes<V>);
    }
    if (tile.count % lanes<V> != 0) {
      V* const last = first + tile.count / lanes<V> * between;
      for (int64_t c = 0; c < n; ++c) last[c] = V{};
    }
    for (int64_t l = full * lanes<V>; l < tile.count; ++l) {
      S* const flat = reinterpret_cast<S*>(first + l / lanes<V> * between) + l % lanes<V>;
      const T* const position = source + l * place.position_stride;
      for (int64_t c = 0; c < tile.classes; ++c) flat[c * lanes<V>] = load_one<S>(position + c * stride);
    }
  }
}

template <bool classes_in_lanes, class V, class T>
KDKERNELS_INLINE void write_tile(const Tile<Scalar<V>>& tile, bool teacher, const Place& place) {
  using S = Scalar<V>;
  T* destination = static_cast<T*>(place.data);
  const int64_t n = vectors_of<classes_in_lanes, V>(tile.classes), stride = place.class_stride;
  const int64_t between = Strip<V>::arrays * n;
  const V* const first = reinterpret_cast<const V*>(tile.scratch) + (teacher ? n : 0);
  if (classes_in_lanes) {
    for (int64_t k = 0; k < tile.count; ++k, destination += place.position_stride) {
      const V* const row = first + k * between;
      if (stride == 1) {
        const int64_t full = tile.classes / lanes<V>, rest = tile.classes - full * lanes<V>;
        for (int64_t i = 0; i < full; ++i) store(destination + i * lanes<V>, row[i]);
        if (rest > 0) store_part(destination + full * lanes<V>, row[full], rest);
      } else {
        const S* const flat = reinterpret_cast<const S*>(row);
        for (int64_t c = 0; c < tile.classes; ++c) store<S>(destination + c * stride, flat[c]);
      }
    }
  } else {
    const int64_t full = place.position_stride == 1 ? tile.count / lanes<V> : 0;
    for (int64_t c = 0; c < tile.classes; ++c) {
      for (int64_t k = 0; k < full; ++k) store(destination + c * stride + k * lanes<V>, first[k * between + c]);
    }
    for (int64_t l = full * lanes<V>; l < tile.count; ++l) {
      const S* const flat = reinterpret_cast<const S*>(first + l / lanes<V> * between) + l % lanes<V>;
      T* const position = destination + l * place.position_stride;
      for (int64_t c = 0; c < tile.classes; ++c) store<S>(position + c * stride, flat[c * lanes<V>]);
    }
  }
}

KDKERNELS_INLINE bool is_ignored(const SoftmaxCall& call, int64_t position) {
  return call.labels != nullptr && call.labels[position] == call.ignored_label;
}

template <class S>
KDKERNELS_INLINE S scale_of(const SoftmaxCall& call, int64_t position, double weight) {
  const S* grad_output = static_cast<const S*>(call.grad_output);
  const double grad = grad_output == nullptr ? 1.0 : double(grad_output[position * call.grad_stride]);
  return S(grad * weight * call.normalizer);
}

template <bool classes_in_lanes, class V>
KDKERNELS_INLINE void clear_position(const Strip<V>& strip, int64_t l) {
  for (int64_t i = 0; i < strip.n; ++i) {
    if (classes_in_lanes) {
      strip.input[i] = strip.target[i] = V{};
    } else {
      reinterpret_cast<Scalar<V>*>(strip.input + i)[l] = reinterpret_cast<Scalar<V>*>(strip.target + i)[l] = 0;
    }
  }
}

template <bool classes_in_lanes, Divergence divergence, class V>
KDKERNELS_INLINE double compute_tile(const SoftmaxCall& call, const StripOptions<Scalar<V>>& options,
                                     const Tile<Scalar<V>>& tile) {
  using S = Scalar<V>;
  constexpr int64_t in_strip = classes_in_lanes ? 1 : lanes<V>;
  const bool labels = options.labels;
  const int64_t n = vectors_of<classes_in_lanes, V>(tile.classes);
  double total = 0;
  for (int64_t start = 0; start < tile.count; start += in_strip) {
    Strip<V> strip(reinterpret_cast<V*>(tile.scratch) + start / in_strip * Strip<V>::arrays * n, n);
    const int64_t position = tile.run * call.inner + tile.first + start;
    const int64_t count = tile.count - start < in_strip ? tile.count - start : in_strip;
    S scale[in_strip] = {}, hard_scale[in_strip] = {};
    int64_t label_at[in_strip];
    bool ignored[in_strip] = {};
    for (int64_t l = 0; l < in_strip; ++l) {
      label_at[l] = -1;
      ignored[l] = l >= count || is_ignored(call, position + l);
      if (ignored[l]) continue;
      scale[l] = scale_of<S>(call, position + l, call.divergence_weight);
      if (labels) {
        hard_scale[l] = scale_of<S>(call, position + l, call.label_weight);
        label_at[l] = classes_in_lanes ? call.labels[position + l] : call.labels[position + l] * lanes<V> + l;
      }
    }
    // What an ignored position holds must not matter, even if it is NaN.
    for (int64_t l = 0; l < count; ++l) {
      if (ignored[l]) clear_position<classes_in_lanes>(strip, l);
    }
    strip.label_at = label_at;
    const auto spread = [](const S* values) {
      if constexpr (classes_in_lanes) {
        return splat<V>(values[0]);
      } else {
        return load<V>(values);
      }
    };
    const StripResult<V> result =
        process_strip<classes_in_lanes, divergence>(strip, options, spread(scale), spread(hard_scale));
    for (int64_t l = 0; l < count; ++l) {
      double loss = 0;
      if (!ignored[l]) {
        if (options.divergence) loss += call.divergence_weight * double(lane(result.divergence, int(l)));
        if (labels) loss += call.label_weight * double(lane(result.cross_entropy, int(l)));
      }
      if (call.position_loss != nullptr) static_cast<S*>(call.position_loss)[position + l] = S(loss);
      total += loss;
    }
  }
  return total;
}

KDKERNELS_INLINE Place place_of(const SoftmaxOperand& operand, const SoftmaxCall& call, int64_t run, int64_t first) {
  int64_t element = first * operand.inner_stride;
  for (int d = call.outer_dims - 1; d >= 0; --d) {
    element += run % call.outer_size[d] * operand.outer_stride[d];
    run /= call.outer_size[d];
  }
  return {static_cast<char*>(operand.data) + element * size_of(operand.storage), operand.class_stride,
          operand.inner_stride};
}

template <bool classes_in_lanes, Divergence divergence, class S>
double compute_tiles(const SoftmaxCall& call, int64_t begin, int64_t end) {
  using V = Vector<S, KDKERNELS_VECTOR_BYTES>;
  StripOptions<S> options;
  options.inverse_temperature = S(1 / call.temperature);
  options.beta = S(call.beta);
  options.reverse = call.reverse;
  options.labels = call.labels != nullptr && call.label_weight != 0;
  options.divergence = call.divergence_weight != 0;
  options.want_input_gradient = call.operand[student_gradient].data != nullptr;
  options.want_target_gradient = call.operand[teacher_gradient].data != nullptr;

  const int64_t strips = classes_in_lanes ? call.tile : (call.tile + lanes<V> - 1) / lanes<V>;
  const Scratch<S> scratch(strips * Strip<V>::arrays * vectors_of<classes_in_lanes, V>(call.classes) * lanes<V>);
  double total = 0;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t run = item / call.tiles_in_run, first = item % call.tiles_in_run * call.tile;
    const int64_t rest = call.inner - first;
    const Tile<S> tile{scratch.get(), run, first, rest < call.tile ? rest : call.tile, call.classes};
    for (int o = student; o <= teacher; ++o) {
      const Place place = place_of(call.operand[o], call, run, first);
      with_storage(call.operand[o].storage,
                   [&](auto storage) { read_tile<classes_in_lanes, V, decltype(storage)>(tile, o == teacher, place); });
    }
    total += compute_tile<classes_in_lanes, divergence, V>(call, options, tile);
    for (int o = student_gradient; o <= teacher_gradient; ++o) {
      if (call.operand[o].data == nullptr) continue;
      const Place place = place_of(call.operand[o], call, run, first);
      with_storage(call.operand[o].storage, [&](auto storage) {
        write_tile<classes_in_lanes, V, decltype(storage)>(tile, o == teacher_gradient, place);
      });
    }
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
    default:
      return compute_tiles<classes_in_lanes, Divergence::clamped_js, S>(call, begin, end);
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
