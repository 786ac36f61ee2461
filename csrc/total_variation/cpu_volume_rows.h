// The rows of a volume and their neighbours.
//
// Most vectors of a row have neighbours on every side of the row and are read as they lie. The others, and all where
// there is a mask or several short rows are taken as one, are edges: their lanes are masked.
#pragma once

#include "core/cpu/scratch.h"
#include "total_variation/cpu_volume_plan.h"

// The bodies of the loops are called in several places, and the compiler would call them as functions.
#if defined(__GNUC__)
#define KDKERNELS_INLINE_LAMBDA __attribute__((always_inline))
#define KDKERNELS_OUT_OF_LINE __attribute__((noinline))
#else
#define KDKERNELS_INLINE_LAMBDA
#define KDKERNELS_OUT_OF_LINE
#endif

namespace kdkernels::cpu::KDKERNELS_CAPABILITY {

// Numbers from i on of a row that has the numbers from `begin` to `end`; the others are 0.
template <class V, class T>
KDKERNELS_OUT_OF_LINE V part_of_row(const T* row, int64_t i, int64_t begin, int64_t end) {
  T numbers[lanes<V>] = {};
  for (int l = 0; l < lanes<V>; ++l) {
    if (i + l >= begin && i + l < end) numbers[l] = row[i + l];
  }
  return load<V>(numbers);
}
template <class V, class T>
KDKERNELS_INLINE V window_of_row(const T* row, int64_t i, int64_t begin, int64_t end) {
  return i >= begin && i + lanes<V> <= end ? load<V>(row + i) : part_of_row<V>(row, i, begin, end);
}

// The same of a row of a mask, in bytes
template <class V>
KDKERNELS_OUT_OF_LINE Like<V, uint8_t> part_of_mask(const uint8_t* row, int64_t i, int64_t begin, int64_t end) {
  uint8_t numbers[lanes<V>] = {};
  for (int l = 0; l < lanes<V>; ++l) {
    if (i + l >= begin && i + l < end) numbers[l] = row[i + l];
  }
  Like<V, uint8_t> bytes;
  memcpy(&bytes, numbers, sizeof(bytes));
  return bytes;
}
template <class V>
KDKERNELS_INLINE Like<V, uint8_t> window_of_mask(const uint8_t* row, int64_t i, int64_t begin, int64_t end) {
  if (i < begin || i + lanes<V> > end) return part_of_mask<V>(row, i, begin, end);
  Like<V, uint8_t> bytes;
  memcpy(&bytes, row + i, sizeof(bytes));
  return bytes;
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
      const Bits<V> all = Bits<V>{} == Bits<V>{};
      if (across_slices) body(0, number - load<V>(strip.here + sign * slice + i), all);
      if (begin < end) body(1, number - load<V>(strip.here + sign * row + i), all);
      body(2, number - load<V>(strip.here + i + sign * step), all);
    } else {
      const int64_t length = strip.length;
      const Bits<V> here = lanes_within(i, 0, length);
      if (across_slices) {
        add<0>(strip, i, number, sign * slice, sign * call.mask.slice_stride, 0, length, here, body);
      }
      if (begin < end) {
        const Bits<V> counts = here & lanes_within(i, begin, end);
        add<1>(strip, i, number, sign * row, sign * call.mask.row_stride, begin, end, counts, body);
      }
      Bits<V> columns;
      if (call.joined > 1) {
        memcpy(&columns, (sign > 0 ? right_columns() : left_columns()) + i, sizeof(columns));
      } else {
        columns = sign > 0 ? lanes_within(i, 0, length - step) : lanes_within(i, step, length);
      }
      const int64_t first = sign > 0 ? -step : step, last = sign > 0 ? length - step : length;
      add<2>(strip, i, number, sign * step, sign * step, first, last, here & columns, body);
    }
  }

  const VolumeCall& call;
  int64_t image, plane, first_row, last_row, first_slice, last_slice;
  const int64_t step, slice, row;

 private:
  // The lanes whose numbers, from i on, lie between `begin` and `end`
  static KDKERNELS_INLINE Bits<V> lanes_within(int64_t i, int64_t begin, int64_t end) {
    if (i >= begin && i + lanes<V> <= end) return Bits<V>{} == Bits<V>{};
    const auto limit = [i](int64_t bound) {
      return Index(bound < i ? 0 : bound > i + lanes<V> ? lanes<V> : bound - i);
    };
    return (lane_numbers<V>() >= limit(begin)) & (lane_numbers<V>() < limit(end));
  }
  template <int axis, class Body>
  KDKERNELS_INLINE void add(const VolumeRows<T>& strip, int64_t i, V number, int64_t offset, int64_t mask_offset,
                            int64_t first, int64_t last, Bits<V> counts, const Body& body) const {
    if (strip.mask != nullptr) {
      const Like<V, uint8_t> both = window_of_mask<V>(strip.mask, i, 0, strip.length) &
                                    window_of_mask<V>(strip.mask + mask_offset, i, first, last);
      counts = counts & (convert<Bits<V>>(both) != Bits<V>{});
    }
    const V difference = number - window_of_row<V>(strip.here + offset, i, first, last);
    body(axis, select(counts, difference, V{}), counts);
  }
  Index* right_columns() const { return columns_.get(); }
  Index* left_columns() const { return columns_.get() + call.joined * call.length + lanes<V>; }

  const T* data_;
  const uint8_t* mask_;
  Scratch<Index> columns_;
};

}  // namespace kdkernels::cpu::KDKERNELS_CAPABILITY
