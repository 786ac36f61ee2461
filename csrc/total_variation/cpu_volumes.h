// Total variation of volumes: the sums over the differences along each axis in one read, the gradient in one more.
//
// Most vectors of a row have neighbours on every side of the row and are read as they lie. The others, and all where
// there is a mask or several short rows are taken as one, are edges: their lanes are masked.
#pragma once

#include "core/cpu/scratch.h"
#include "core/sums.h"
#include "total_variation/cpu_volumes_plan.h"

namespace kdkernels::cpu::KDKERNELS_CAPABILITY {

// Numbers from i on of a row that has the numbers from `begin` to `end`; the others are 0.
template <class V, class T>
KDKERNELS_INLINE V window_of_row(const T* row, int64_t i, int64_t begin, int64_t end) {
  if (i >= begin && i + lanes<V> <= end) return load<V>(row + i);
  T numbers[lanes<V>] = {};
  for (int l = 0; l < lanes<V>; ++l) {
    if (i + l >= begin && i + l < end) numbers[l] = row[i + l];
  }
  return load<V>(numbers);
}

template <class V>
KDKERNELS_INLINE Bits<V> window_of_mask(const uint8_t* row, int64_t i, int64_t begin, int64_t end) {
  using Bytes = Like<V, uint8_t>;
  Bytes bytes{};
  if (i >= begin && i + lanes<V> <= end) {
    memcpy(&bytes, row + i, sizeof(bytes));
  } else {
    for (int l = 0; l < lanes<V>; ++l) {
      if (i + l >= begin && i + l < end) reinterpret_cast<uint8_t*>(&bytes)[l] = row[i + l];
    }
  }
  return convert<Bits<V>>(bytes) != Bits<V>{};
}

// Some neighbouring rows of a slice, as one row: where they and their neighbours lie, and which numbers have neighbours
template <class T>
struct VolumeRows {
  const T* here;
  const uint8_t* mask;
  int64_t length;
  int64_t above_begin, below_end;  // numbers before the first have no row above, those from the last on none below
  bool front, behind;              // whether there is a slice before and after
};

// An item, and what its rows have in common
template <class V, class T>
class VolumeItem {
  using Index = Scalar<Bits<V>>;

 public:
  VolumeItem(const VolumeCall& call, int64_t item)
      : call(call),
        step(call.step),
        slice(call.input.slice_stride),
        row(call.input.row_stride),
        columns_(call.joined > 1 ? 2 * (call.joined * call.length + lanes<V>) : 0) {
    const int64_t plane_number = item / (call.tiles * call.runs);
    image = plane_number / call.planes;
    plane = plane_number % call.planes;
    first_row = item / call.runs % call.tiles * call.tile;
    last_row = math::minimum(call.rows, first_row + call.tile);
    first_slice = item % call.runs * call.thickness;
    last_slice = math::minimum(call.slices, first_slice + call.thickness);
    data_ = static_cast<const T*>(call.input.data) + call.input.offset(image, plane);
    mask_ = static_cast<const uint8_t*>(call.mask.data);
    if (mask_ != nullptr) mask_ += call.mask.offset(image, plane);
    for (int64_t i = 0; i < (call.joined > 1 ? call.joined * call.length : 0); ++i) {
      const int64_t column = i % call.length;
      right_columns()[i] = Index(column < call.length - step ? -1 : 0);
      left_columns()[i] = Index(column >= step ? -1 : 0);
    }
  }

  // The rows from `first` to `last` of a slice
  VolumeRows<T> strip(int64_t slice_number, int64_t first, int64_t last) const {
    const int64_t length = (last - first) * call.length;
    return {data_ + slice_number * slice + first * row,
            mask_ == nullptr ? nullptr : mask_ + slice_number * call.mask.slice_stride + first * call.mask.row_stride,
            length,
            first > 0 ? 0 : call.length,
            last < call.rows ? length : length - call.length,
            slice_number > 0,
            slice_number + 1 < call.slices};
  }

  // Calls body(i, edge) for the vectors of a strip; `edge` says at compile time whether lanes may lack a neighbour.
  template <class Body>
  KDKERNELS_INLINE void for_each_vector(const VolumeRows<T>& strip, const Body& body) const {
    int64_t i = 0;
    if (call.joined == 1 && strip.mask == nullptr) {
      for (; i < step && i < strip.length; i += lanes<V>) body(i, std::true_type());
      for (; i + lanes<V> <= strip.length - step; i += lanes<V>) body(i, std::false_type());
    }
    for (; i < strip.length; i += lanes<V>) body(i, std::true_type());
  }

  // Calls body(axis, difference, counts) for the neighbours of the numbers from i on in one direction of each axis:
  // those behind, below and to the right, or with sign = -1 the others. `counts` are the lanes that have a neighbour.
  template <int sign, bool edge, class Body>
  KDKERNELS_INLINE void for_each_neighbour(const VolumeRows<T>& strip, int64_t i, V number, const Body& body) const {
    const bool across_slices = sign > 0 ? strip.behind : strip.front;
    const int64_t begin = sign > 0 ? 0 : strip.above_begin, end = sign > 0 ? strip.below_end : strip.length;
    if constexpr (!edge) {
      if (across_slices) body(0, number - load<V>(strip.here + sign * slice + i), Bits<V>{} == Bits<V>{});
      if (begin < end) body(1, number - load<V>(strip.here + sign * row + i), Bits<V>{} == Bits<V>{});
      body(2, number - load<V>(strip.here + i + sign * step), Bits<V>{} == Bits<V>{});
    } else {
      const int64_t length = strip.length;
      const Bits<V> index = lane_numbers<V>();
      const Bits<V> inside = index < limit(length - i);
      const bool masked = strip.mask != nullptr;
      const Bits<V> here = masked ? Bits<V>(window_of_mask<V>(strip.mask, i, 0, length) & inside) : inside;
      const auto add = [&](int axis, int64_t offset, int64_t mask_offset, int64_t first, int64_t last, Bits<V> counts) {
        if (masked) counts = counts & window_of_mask<V>(strip.mask + mask_offset, i, first, last);
        const V difference = number - window_of_row<V>(strip.here + offset, i, first, last);
        body(axis, select(counts, difference, V{}), counts);
      };
      if (across_slices) add(0, sign * slice, sign * call.mask.slice_stride, 0, length, here);
      if (begin < end) {
        const Bits<V> rows = (index >= limit(begin - i)) & (index < limit(end - i));
        add(1, sign * row, sign * call.mask.row_stride, begin, end, here & rows);
      }
      Bits<V> columns;
      if (call.joined > 1) {
        memcpy(&columns, (sign > 0 ? right_columns() : left_columns()) + i, sizeof(columns));
      } else {
        columns = sign > 0 ? Bits<V>(index < limit(length - step - i)) : Bits<V>(index >= limit(step - i));
      }
      add(2, sign * step, sign * step, sign > 0 ? -step : step, sign > 0 ? length - step : length, here & columns);
    }
  }

  const VolumeCall& call;
  int64_t image, plane, first_row, last_row, first_slice, last_slice;
  const int64_t step, slice, row;

 private:
  // A number of lanes: all of them, or none, where it lies outside
  static KDKERNELS_INLINE Index limit(int64_t count) {
    return Index(count < 0 ? 0 : count > lanes<V> ? lanes<V> : count);
  }
  Index* right_columns() const { return columns_.get(); }
  Index* left_columns() const { return columns_.get() + call.joined * call.length + lanes<V>; }

  const T* data_;
  const uint8_t* mask_;
  Scratch<Index> columns_;
};

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
      item.for_each_vector(strip, [&](int64_t i, auto edge_type) {
        constexpr bool edge = decltype(edge_type)::value;
        const V here = edge ? window_of_row<V>(strip.here, i, 0, strip.length) : load<V>(strip.here + i);
        V squares{};
        Bits<V> present{};
        item.template for_each_neighbour<1, edge>(strip, i, here, [&](int axis, V difference, Bits<V> counts) {
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
      item.for_each_vector(strip, [&](int64_t i, auto edge_type) {
        constexpr bool edge = decltype(edge_type)::value;
        const V here = edge ? window_of_row<V>(strip.here, i, 0, strip.length) : load<V>(strip.here + i);
        V slopes[3] = {};
        const auto add = [&](int axis, V difference, Bits<V>) {
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
    item.for_each_vector(strip, [&](int64_t i, auto edge_type) {
      constexpr bool edge = decltype(edge_type)::value;
      const V here = edge ? window_of_row<V>(strip.here, i, 0, strip.length) : load<V>(strip.here + i);
      V squares{};
      Bits<V> present{};
      item.template for_each_neighbour<1, edge>(strip, i, here, [&](int axis, V difference, Bits<V> counts) {
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
      item.for_each_vector(strip, [&](int64_t i, auto edge_type) {
        constexpr bool edge = decltype(edge_type)::value;
        const V here = edge ? window_of_row<V>(strip.here, i, 0, strip.length) : load<V>(strip.here + i);
        const V inverse = edge ? window_of_row<V>(here_inverse, i, 0, strip.length) : load<V>(here_inverse + i);
        V gradient{};
        item.template for_each_neighbour<1, edge>(strip, i, here, [&](int axis, V difference, Bits<V>) {
          gradient = gradient + difference * scale[axis] * inverse;
        });
        item.template for_each_neighbour<-1, edge>(strip, i, here, [&](int axis, V difference, Bits<V> counts) {
          const S* const inverse_row = axis == 0 ? front_inverse : here_inverse - (axis == 1 ? call.length : item.step);
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
