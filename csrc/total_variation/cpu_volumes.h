// Total variation of volumes: the sums over the differences along each axis in one read, the gradient in one more.
#pragma once

#include "core/cpu/scratch.h"
#include "core/sums.h"
#include "total_variation/cpu_volume_rows.h"

namespace kdkernels::cpu::KDKERNELS_CAPABILITY {

template <PairNorm norm, class V, class T>
void volume_item_sums(const VolumeCall& call, int64_t number) {
  using S = Scalar<V>;
  const VolumeItem<V, T> item(call, number);
  math::BlockedSum<V> sums[3];
  Bits<V> pairs[3] = {};
  S threshold[3], scale[3];
  for (int axis = 0; axis < 3; ++axis) {
    threshold[axis] = S(call.threshold[axis]);
    scale[axis] = S(call.scale[axis]);
  }
  const S eps = S(call.eps);
  for (int64_t slice = item.first_slice; slice < item.last_slice; ++slice) {
    for (int64_t row = item.first_row; row < item.last_row; row += call.joined) {
      const VolumeRows<T> strip = item.strip(slice, row, math::minimum(item.last_row, row + call.joined));
      int vectors = 0;
      const auto close = [&] {
        for (auto& sum : sums) sum.close_block();
      };
      item.for_each_vector(strip, [&](int64_t i, auto edge_type) KDKERNELS_INLINE_LAMBDA {
        constexpr bool edge = decltype(edge_type)::value;
        const V here = edge ? window_of_row<V>(strip.here, i, 0, strip.length) : load<V>(strip.here + i);
        V squares{};
        Bits<V> present{};
        item.template for_each_neighbour<1, edge>(
            strip, i, here, [&](int axis, V difference, Bits<V> counts) KDKERNELS_INLINE_LAMBDA {
              if constexpr (norm == PairNorm::isotropic) {
                squares = squares + difference * difference * scale[axis];
                present = present | counts;
              } else {
                sums[axis].add(math::pair_term<norm>(difference, threshold[axis]));
                if (edge && strip.mask != nullptr) pairs[axis] = pairs[axis] + select(counts, Bits<V>{} + 1, Bits<V>{});
              }
            });
        if constexpr (norm == PairNorm::isotropic) {
          sums[0].add(select(present, math::square_root(squares + eps), V{}));
        }
        if (++vectors % math::BlockedSum<V>::block == 0) close();
      });
      close();
    }
  }
  VolumeSums& out = call.partial[number];
  out = VolumeSums();
  for (int axis = 0; axis < 3; ++axis) {
    out.terms[axis] = double(sum_lanes(sums[axis].sum()));
    for (int l = 0; l < lanes<V>; ++l) out.pairs[axis] += lane(pairs[axis], l);
  }
}

template <class V, class T>
KDKERNELS_INLINE void write_numbers(T* destination, V value, int64_t count) {
  if (count >= lanes<V>) {
    store(destination, value);
  } else {
    store_part(destination, value, count);
  }
}

template <class V, class T>
T* output_of(const VolumeItem<V, T>& item, int64_t slice, int64_t row) {
  const VolumeTensor& output = item.call.output;
  return static_cast<T*>(output.data) + output.offset(item.image, item.plane) + slice * output.slice_stride +
         row * output.row_stride;
}

template <PairNorm norm, class V, class T>
void volume_item_gradients(const VolumeCall& call, int64_t number) {
  using S = Scalar<V>;
  const VolumeItem<V, T> item(call, number);
  S coefficient[3], threshold[3];
  for (int axis = 0; axis < 3; ++axis) {
    coefficient[axis] = S(call.coefficients[item.image].axis[axis]);
    threshold[axis] = S(call.threshold[axis]);
  }
  for (int64_t slice = item.first_slice; slice < item.last_slice; ++slice) {
    for (int64_t row = item.first_row; row < item.last_row; row += call.joined) {
      const VolumeRows<T> strip = item.strip(slice, row, math::minimum(item.last_row, row + call.joined));
      T* const destination = output_of(item, slice, row);
      item.for_each_vector(strip, [&](int64_t i, auto edge_type) KDKERNELS_INLINE_LAMBDA {
        constexpr bool edge = decltype(edge_type)::value;
        const V here = edge ? window_of_row<V>(strip.here, i, 0, strip.length) : load<V>(strip.here + i);
        V slopes[3] = {};
        const auto add = [&](int axis, V difference, Bits<V>) KDKERNELS_INLINE_LAMBDA {
          slopes[axis] = slopes[axis] + math::pair_slope<norm>(difference, threshold[axis]);
        };
        item.template for_each_neighbour<1, edge>(strip, i, here, add);
        item.template for_each_neighbour<-1, edge>(strip, i, here, add);
        const V gradient = slopes[0] * coefficient[0] + slopes[1] * coefficient[1] + slopes[2] * coefficient[2];
        write_numbers(destination + i, gradient, strip.length - i);
      });
    }
  }
}

// 1 / length of the gradient at each number of some rows, 0 where there is none
template <class V, class T>
void inverse_lengths(const VolumeItem<V, T>& item, int64_t slice, int64_t first, int64_t last, Scalar<V>* out) {
  using S = Scalar<V>;
  S scale[3];
  for (int axis = 0; axis < 3; ++axis) scale[axis] = S(item.call.scale[axis]);
  const S eps = S(item.call.eps);
  for (int64_t row = first; row < last; row += item.call.joined) {
    const VolumeRows<T> strip = item.strip(slice, row, math::minimum(last, row + item.call.joined));
    S* const destination = out + (row - first) * item.call.length;
    item.for_each_vector(strip, [&](int64_t i, auto edge_type) KDKERNELS_INLINE_LAMBDA {
      constexpr bool edge = decltype(edge_type)::value;
      const V here = edge ? window_of_row<V>(strip.here, i, 0, strip.length) : load<V>(strip.here + i);
      V squares{};
      Bits<V> present{};
      item.template for_each_neighbour<1, edge>(strip, i, here,
                                                [&](int axis, V difference, Bits<V> counts) KDKERNELS_INLINE_LAMBDA {
                                                  squares = squares + difference * difference * scale[axis];
                                                  present = present | counts;
                                                });
      const V length = select(present, math::square_root(squares + eps), V{});
      const auto zero = length == S(0);
      write_numbers(destination + i, select(zero, V{}, S(1) / select(zero, splat<V>(1), length)), strip.length - i);
    });
  }
}

template <class V, class T>
void isotropic_volume_gradients(const VolumeCall& call, int64_t number) {
  using S = Scalar<V>;
  const VolumeItem<V, T> item(call, number);
  S scale[3];
  for (int axis = 0; axis < 3; ++axis) scale[axis] = S(call.scale[axis]);
  const S coefficient = S(call.coefficients[item.image].axis[0]);
  // The inverse lengths of the tile in this slice and the one before: the row above, then the rows
  const int64_t above = item.first_row > 0 ? item.first_row - 1 : item.first_row;
  const int64_t numbers = (call.tile + 1) * call.length + 2 * lanes<V>, offset = (item.first_row - above) * call.length;
  const Scratch<S> memory(2 * numbers);
  const auto inverses = [&](int64_t slice) { return memory.get() + slice % 2 * numbers; };
  if (item.first_slice > 0) {
    inverse_lengths(item, item.first_slice - 1, above, item.last_row, inverses(item.first_slice - 1));
  }
  for (int64_t slice = item.first_slice; slice < item.last_slice; ++slice) {
    inverse_lengths(item, slice, above, item.last_row, inverses(slice));
    for (int64_t row = item.first_row; row < item.last_row; row += call.joined) {
      const VolumeRows<T> strip = item.strip(slice, row, math::minimum(item.last_row, row + call.joined));
      const int64_t place = offset + (row - item.first_row) * call.length;
      const S *const here_inverse = inverses(slice) + place, *const front_inverse = inverses(slice + 1) + place;
      T* const destination = output_of(item, slice, row);
      item.for_each_vector(strip, [&](int64_t i, auto edge_type) KDKERNELS_INLINE_LAMBDA {
        constexpr bool edge = decltype(edge_type)::value;
        const V here = edge ? window_of_row<V>(strip.here, i, 0, strip.length) : load<V>(strip.here + i);
        const V inverse = edge ? window_of_row<V>(here_inverse, i, 0, strip.length) : load<V>(here_inverse + i);
        V gradient{};
        item.template for_each_neighbour<1, edge>(strip, i, here,
                                                  [&](int axis, V difference, Bits<V>) KDKERNELS_INLINE_LAMBDA {
                                                    gradient = gradient + difference * scale[axis] * inverse;
                                                  });
        item.template for_each_neighbour<-1, edge>(
            strip, i, here, [&](int axis, V difference, Bits<V> counts) KDKERNELS_INLINE_LAMBDA {
              const S* const inverse_row =
                  axis == 0 ? front_inverse : here_inverse - (axis == 1 ? call.length : item.step);
              V others;
              if constexpr (edge) {
                others = select(counts,
                                window_of_row<V>(inverse_row, i,
                                                 axis == 0   ? 0
                                                 : axis == 1 ? strip.above_begin
                                                             : item.step,
                                                 strip.length),
                                V{});
              } else {
                others = load<V>(inverse_row + i);
              }
              gradient = gradient + difference * scale[axis] * others;
            });
        write_numbers(destination + i, gradient * coefficient, strip.length - i);
      });
    }
  }
}

template <class Body>
KDKERNELS_INLINE void for_each_volume_item(const VolumeCall& call, int64_t begin, int64_t end, const Body& body) {
  with_vectors<KDKERNELS_VECTOR_BYTES>(call.storage, [&](auto vector, auto type) {
    for (int64_t item = begin; item < end; ++item) body(vector, type, item);
  });
}

void volume_sums(const VolumeCall& call, int64_t begin, int64_t end) {
  for_each_volume_item(call, begin, end, [&](auto vector, auto type, int64_t item) {
    using V = decltype(vector);
    using T = decltype(type);
    const auto sums = call.norm == PairNorm::absolute ? volume_item_sums<PairNorm::absolute, V, T>
                      : call.norm == PairNorm::huber  ? volume_item_sums<PairNorm::huber, V, T>
                      : call.norm == PairNorm::square ? volume_item_sums<PairNorm::square, V, T>
                                                      : volume_item_sums<PairNorm::isotropic, V, T>;
    sums(call, item);
  });
}
void volume_gradients(const VolumeCall& call, int64_t begin, int64_t end) {
  for_each_volume_item(call, begin, end, [&](auto vector, auto type, int64_t item) {
    using V = decltype(vector);
    using T = decltype(type);
    const auto gradients = call.norm == PairNorm::absolute ? volume_item_gradients<PairNorm::absolute, V, T>
                           : call.norm == PairNorm::huber  ? volume_item_gradients<PairNorm::huber, V, T>
                           : call.norm == PairNorm::square ? volume_item_gradients<PairNorm::square, V, T>
                                                           : isotropic_volume_gradients<V, T>;
    gradients(call, item);
  });
}

}  // namespace kdkernels::cpu::KDKERNELS_CAPABILITY
