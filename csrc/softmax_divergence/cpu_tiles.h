// Tiles of logits: how they are read from memory into the arrays of a group, and their gradients written back.
#pragma once

#include "softmax_divergence/cpu_group.h"
#include "softmax_divergence/math.h"

namespace kdkernels::cpu::KDKERNELS_CAPABILITY {

// The place of an operand of a tile in memory
struct Place {
  char* data;
  int64_t class_stride, position_stride;  // in numbers
  int64_t size;                           // of a number, in bytes
  bool changed = false;                   // whether logits are changed after they are read
};

// Neighbouring positions of one run
struct Tile {
  int64_t first, count;  // positions
  int64_t classes;
  Place place[operands];
};

template <bool classes_in_lanes, class V>
KDKERNELS_INLINE int64_t vectors_of(int64_t classes) {
  return classes_in_lanes ? (classes + lanes<V> - 1) / lanes<V> : classes;
}

// Whether rows are read and written where they lie, without a copy: those stored in the type that is computed in.
template <bool classes_in_lanes, class S>
KDKERNELS_INLINE bool in_place(const Place& place) {
  return classes_in_lanes && place.class_stride == 1 && place.size == sizeof(S) && !place.changed;
}

// Lanes that hold no class get -inf, which has no mass; lanes that hold no position get 0.
template <bool classes_in_lanes, class V, class T>
KDKERNELS_INLINE void read_tile(const Tile& tile, bool teacher, const Place& place, Scalar<V>* scratch) {
  using S = Scalar<V>;
  const T* source = reinterpret_cast<const T*>(place.data);
  const int64_t n = vectors_of<classes_in_lanes, V>(tile.classes), stride = place.class_stride;
  const int64_t between = Strip<V>::arrays * n;
  V* const first = reinterpret_cast<V*>(scratch) + (teacher ? n : 0);
  if (classes_in_lanes) {
    for (int64_t k = 0; k < tile.count; ++k, source += place.position_stride) {
      V* const row = first + k * between;
      if (stride == 1) {
        const int64_t full = tile.classes / lanes<V>, rest = tile.classes - full * lanes<V>;
        if (!in_place<classes_in_lanes, S>(place)) {
          for (int64_t i = 0; i < full; ++i) row[i] = load<V>(source + i * lanes<V>);
        }
        if (rest > 0) {
          // What follows a row in memory is more of the tensor, except after the last row.
          const T* const end = source + full * lanes<V>;
          const bool more = k + 1 < tile.count && place.position_stride >= lanes<V>;
          row[full] =
              more ? keep_lanes(load<V>(end), rest, -math::infinity<V>) : load_part<V>(end, rest, -math::infinity<V>);
        }
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

// Replaces a teacher's probabilities, or their logarithms, by the logits that give them at the temperature.
template <bool classes_in_lanes, class V>
[[gnu::noinline]] void probabilities_to_logits(const SoftmaxCall& call, const Tile& tile, Scalar<V>* scratch) {
  const int64_t n = vectors_of<classes_in_lanes, V>(tile.classes);
  const int64_t strips = classes_in_lanes ? tile.count : (tile.count + lanes<V> - 1) / lanes<V>;
  const bool logarithms = call.target_type == TargetType::log_probs;
  const Scalar<V> temperature = Scalar<V>(call.temperature);
  const V none = splat<V>(-math::infinity<V>), nan = splat<V>(std::numeric_limits<Scalar<V>>::quiet_NaN());
  for (int64_t k = 0; k < strips; ++k) {
    V* const target = reinterpret_cast<V*>(scratch) + k * Strip<V>::arrays * n + n;
    for (int64_t i = 0; i < n; ++i) {
      const V x = target[i];
      const V log = logarithms ? x : select(x > Scalar<V>(0), math::log_positive(x), nan);
      // Lanes without a class hold -inf, which stands for no probability.
      const auto nothing = logarithms ? Bits<V>(x == none) : Bits<V>((x == Scalar<V>(0)) | (x == none));
      target[i] = select(nothing, none, log * temperature);
    }
  }
}

template <bool classes_in_lanes, class V>
KDKERNELS_INLINE void read_logits(const SoftmaxCall& call, const Tile& tile, Scalar<V>* scratch) {
  for (int o = student; o <= teacher; ++o) {
    with_storage(call.operand[o].storage, [&](auto storage) {
      read_tile<classes_in_lanes, V, decltype(storage)>(tile, o == teacher, tile.place[o], scratch);
    });
  }
  if (call.target_type != TargetType::logits) probabilities_to_logits<classes_in_lanes, V>(call, tile, scratch);
}

template <bool classes_in_lanes, class V, class T>
KDKERNELS_INLINE void write_tile(const Tile& tile, bool teacher, const Place& place, const Scalar<V>* scratch) {
  using S = Scalar<V>;
  T* destination = reinterpret_cast<T*>(place.data);
  const int64_t n = vectors_of<classes_in_lanes, V>(tile.classes), stride = place.class_stride;
  const int64_t between = Strip<V>::arrays * n;
  const V* const first = reinterpret_cast<const V*>(scratch) + (teacher ? n : 0);
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

// Sets where the strips of a group that begins at position `start` of a tile are read and written.
template <bool classes_in_lanes, class V>
KDKERNELS_INLINE void place_side(const Tile& tile, int64_t start, Group<classes_in_lanes, V>& group, bool teacher) {
  using S = Scalar<V>;
  Side<V>& side = teacher ? group.teacher : group.student;
  const Place& logits = tile.place[teacher ? OperandIndex::teacher : OperandIndex::student];
  const Place& gradient = tile.place[teacher ? teacher_gradient : student_gradient];
  const bool logits_in_place = in_place<classes_in_lanes, S>(logits);
  const bool gradient_in_place = in_place<classes_in_lanes, S>(gradient);
  side.whole = gradient_in_place ? group.whole : group.vectors;
  side.rest = gradient_in_place ? tile.classes - group.whole * lanes<V> : 0;
  for (int k = 0; k < group.strips; ++k) {
    const Strip<V> strip = group.strip(k);
    S* const scratch = reinterpret_cast<S*>(teacher ? strip.target : strip.input);
    const auto at = [&](const Place& place) {
      return reinterpret_cast<S*>(place.data) + (start + k) * place.position_stride;
    };
    side.logits[k] = logits_in_place ? at(logits) : scratch;
    side.gradient[k] = gradient_in_place ? at(gradient) : scratch;
  }
}

// The group of positions that begins at position `start` of a tile whose logits were read
template <bool classes_in_lanes, class V>
KDKERNELS_INLINE Group<classes_in_lanes, V> group_at(const Tile& tile, int64_t start, V* memory) {
  const int64_t rest = tile.count - start;
  Group<classes_in_lanes, V> group;
  group.memory = memory;
  group.vectors = vectors_of<classes_in_lanes, V>(tile.classes);
  group.whole = classes_in_lanes ? tile.classes / lanes<V> : group.vectors;
  group.strips = !classes_in_lanes ? 1 : int(rest < lanes<V> ? rest : lanes<V>);
  place_side(tile, start, group, false);
  place_side(tile, start, group, true);
  return group;
}

}  // namespace kdkernels::cpu::KDKERNELS_CAPABILITY
