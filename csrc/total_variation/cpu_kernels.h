// Image priors: all sums over the differences of neighbouring pixels in one read, all gradients in one more.
//
// Rows are converted into scratch memory with room on both sides, so that every neighbour of every pixel can be loaded;
// lanes without such a neighbour occur at the ends of a row and are masked there.
#pragma once

#include "core/cpu/scratch.h"
#include "core/sums.h"
#include "total_variation/cpu_volumes.h"
#include "total_variation/math.h"
#include "total_variation/plan.h"

namespace kdkernels::cpu::KDKERNELS_CAPABILITY {

// The rows of one item and the one before and after it, in the type that is computed in
template <class V, class T>
class Rows {
  using S = Scalar<V>;

 public:
  Rows(const ImageCall& call, int64_t item)
      : call_(call),
        pad_((call.step + lanes<V> - 1) / lanes<V> * lanes<V>),
        width_(pad_ + (call.length + lanes<V> - 1) / lanes<V> * lanes<V> + pad_ + lanes<V>),
        scratch_(3 * width_) {
    for (int64_t i = 0; i < 3 * width_; ++i) scratch_.get()[i] = S(0);
    const int64_t plane = item / call.blocks;
    image = plane / call.planes;
    offset_ = plane % call.planes;
    first = item % call.blocks * call.block;
    last = first + call.block < call.rows ? first + call.block : call.rows;
  }

  // Reads a row; the last three are kept.
  void read(int64_t row) const {
    const T* const source = static_cast<const T*>(call_.input.data) + image * call_.input.image_stride +
                            offset_ * call_.input.plane_stride + row * call_.input.row_stride;
    S* const destination = scratch_.get() + row % 3 * width_ + pad_;
    int64_t i = 0;
    for (; i + lanes<V> <= call_.length; i += lanes<V>) store(destination + i, load<V>(source + i));
    if (i < call_.length) store(destination + i, load_part<V>(source + i, call_.length - i, S(0)));
  }
  const S* operator[](int64_t row) const { return scratch_.get() + row % 3 * width_ + pad_; }

  void write(int64_t row, int64_t i, V value) const {
    T* const destination = static_cast<T*>(call_.output.data) + image * call_.output.image_stride +
                           offset_ * call_.output.plane_stride + row * call_.output.row_stride + i;
    if (i + lanes<V> <= call_.length) {
      store(destination, value);
    } else {
      store_part(destination, value, call_.length - i);
    }
  }

  int64_t image, first, last;

 private:
  const ImageCall& call_;
  int64_t offset_;
  int64_t pad_, width_;
  Scratch<S> scratch_;
};

// The shape of a row. A copy stays in registers, while the compiler must assume that stores change the call itself.
struct RowShape {
  int64_t length, step;
};

// Which lanes, for the numbers from i on, have a pixel, a left neighbour and a right neighbour
template <class V>
struct Lanes {
  math::Bits<V> inside, left, right;

  KDKERNELS_INLINE Lanes(RowShape shape, int64_t i) {
    using Index = math::Scalar<math::Bits<V>>;
    math::Bits<V> index{};
    if constexpr (lanes<V> > 1) {
      for (int l = 0; l < lanes<V>; ++l) index[l] = Index(l);
    }
    index = index + Index(i);
    inside = index < Index(shape.length);
    left = index >= Index(shape.step);
    right = index < Index(shape.length - shape.step);
  }
};

// Calls body(i, edge) for the vectors of a row; `edge` says at compile time whether lanes may lack a neighbour.
template <class V, class Body>
KDKERNELS_INLINE void for_each_in_row(RowShape shape, const Body& body) {
  int64_t i = 0;
  for (; i < shape.step && i < shape.length; i += lanes<V>) body(i, std::true_type());
  for (; i + lanes<V> <= shape.length - shape.step; i += lanes<V>) body(i, std::false_type());
  for (; i < shape.length; i += lanes<V>) body(i, std::true_type());
}

template <bool edge, class V>
KDKERNELS_INLINE V masked(math::Bits<V> mask, V value) {
  if constexpr (edge) {
    return select(mask, value, V{});
  } else {
    return value;
  }
}

template <class V, class T, bool want_absolute, bool want_squares>
void block_sums(const ImageCall& call, int64_t item) {
  const Rows<V, T> rows(call, item);
  const RowShape shape{call.length, call.step};
  const bool vertical = call.directions >= 2, diagonal = call.directions == 4, want_pixels = call.pixels;
  math::BlockedSum<V> absolute[4], squares[4], pixels;
  const int64_t first = rows.first, last = rows.last, count = call.rows;
  rows.read(first);
  for (int64_t row = first; row < last; ++row) {
    const bool below = row + 1 < count;
    if (below) rows.read(row + 1);
    const bool down = below && vertical, diagonals = below && diagonal;
    const Scalar<V>*const here = rows[row], *const next = rows[row + 1];
    for_each_in_row<V>(shape, [&](int64_t i, auto edge_type) {
      constexpr bool edge = decltype(edge_type)::value;
      const Lanes<V> lane_masks(shape, edge ? i : 0);
      const V pixel = load<V>(here + i);
      const math::Differences<V> d(pixel, load<V>(here + i + shape.step), load<V>(next + i),
                                   load<V>(next + i + shape.step));
      const auto add = [&](int k, V difference) {
        if (want_absolute) absolute[k].add(math::absolute(difference));
        if (want_squares) squares[k].add(difference * difference);
      };
      add(0, masked<edge>(lane_masks.right, d.right));
      if (down) add(1, masked<edge>(lane_masks.inside, d.down));
      if (diagonals) {
        add(2, masked<edge>(lane_masks.right, d.rising));
        add(3, masked<edge>(lane_masks.right, d.falling));
      }
      if (want_pixels) pixels.add(pixel * pixel);  // there are zeros past the end of the row
    });
    for (int k = 0; k < 4; ++k) {
      absolute[k].close_block();
      squares[k].close_block();
    }
    pixels.close_block();
  }
  DifferenceSums& out = call.partial[item];
  out = DifferenceSums();
  for (int k = 0; k < call.directions; ++k) {
    out.absolute[k] = double(sum_lanes(absolute[k].sum()));
    out.squares[k] = double(sum_lanes(squares[k].sum()));
  }
  out.pixels = double(sum_lanes(pixels.sum()));
}

template <class V, class T, bool want_absolute, bool want_squares>
void block_gradients(const ImageCall& call, int64_t item) {
  using S = Scalar<V>;
  const Rows<V, T> rows(call, item);
  const RowShape shape{call.length, call.step};
  const math::DifferenceCoefficients<double>& by = call.coefficients[rows.image];
  S linear[4], absolute[4];
  for (int k = 0; k < 4; ++k) {
    linear[k] = S(by.linear[k]);
    absolute[k] = S(by.absolute[k]);
  }
  const bool vertical = call.directions >= 2, diagonal = call.directions == 4, want_pixels = call.pixels;
  const S by_pixel = want_pixels ? S(by.pixel) : S(0);
  const int64_t first = rows.first, last = rows.last, count = call.rows, step = shape.step;
  if (first > 0) rows.read(first - 1);
  rows.read(first);
  for (int64_t row = first; row < last; ++row) {
    const bool above = row > 0, below = row + 1 < count;
    if (below) rows.read(row + 1);
    const S *const up = rows[row + 2], *const here = rows[row],
                   *const down = rows[row + 1];  // row + 2 is in the place of row - 1
    for_each_in_row<V>(shape, [&](int64_t i, auto edge_type) {
      constexpr bool edge = decltype(edge_type)::value;
      const Lanes<V> lane_masks(shape, edge ? i : 0);
      const V pixel = load<V>(here + i);
      V gradient = want_pixels ? pixel * by_pixel : V{};
      const auto add = [&](int k, const S* neighbour, math::Bits<V> mask) {
        const V difference = pixel - load<V>(neighbour + i);
        V slope;
        if constexpr (want_squares && want_absolute) {
          slope = math::difference_gradient(difference, linear[k], absolute[k]);
        } else if constexpr (want_squares) {
          slope = difference * linear[k];
        } else {
          slope = math::sign(difference) * absolute[k];
        }
        gradient = gradient + masked<edge>(mask, slope);
      };
      add(0, here + step, lane_masks.right);
      add(0, here - step, lane_masks.left);
      if (vertical && below) add(1, down, lane_masks.inside);
      if (vertical && above) add(1, up, lane_masks.inside);
      if (diagonal && above) add(2, up + step, lane_masks.right);
      if (diagonal && below) add(2, down - step, lane_masks.left);
      if (diagonal && below) add(3, down + step, lane_masks.right);
      if (diagonal && above) add(3, up - step, lane_masks.left);
      rows.write(row, i, gradient);
    });
  }
}

template <class V>
KDKERNELS_INLINE math::IsotropicTerm<V> isotropic_term(const ImageCall& call, const Scalar<V>* here,
                                                       const Scalar<V>* next, bool below, int64_t i) {
  const Lanes<V> lane_masks({call.length, call.step}, i);
  const V pixel = load<V>(here + i);
  const V dx = masked<true>(lane_masks.right, pixel - load<V>(here + i + call.step));
  const V dy = below ? masked<true>(lane_masks.inside, pixel - load<V>(next + i)) : V{};
  return {dx, dy, below ? lane_masks.inside : lane_masks.right, Scalar<V>(call.eps)};
}

template <class V, class T>
void isotropic_block_sums(const ImageCall& call, int64_t item) {
  const Rows<V, T> rows(call, item);
  DifferenceSums& out = call.partial[item];
  out = DifferenceSums();
  rows.read(rows.first);
  for (int64_t row = rows.first; row < rows.last; ++row) {
    const bool below = row + 1 < call.rows;
    if (below) rows.read(row + 1);
    V sum{};
    for (int64_t i = 0; i < call.length; i += lanes<V>) {
      sum = sum + isotropic_term<V>(call, rows[row], rows[row + 1], below, i).length;
    }
    out.isotropic += double(sum_lanes(sum));
  }
}

template <class V, class T>
void isotropic_block_gradients(const ImageCall& call, int64_t item) {
  using S = Scalar<V>;
  const Rows<V, T> rows(call, item);
  const S scale = S(call.coefficients[rows.image].linear[0]);
  if (rows.first > 0) rows.read(rows.first - 1);
  rows.read(rows.first);
  for (int64_t row = rows.first; row < rows.last; ++row) {
    const bool above = row > 0, below = row + 1 < call.rows;
    if (below) rows.read(row + 1);
    for (int64_t i = 0; i < call.length; i += lanes<V>) {
      // A pixel takes part in its own term and in those of its left and upper neighbours.
      const auto own = isotropic_term<V>(call, rows[row], rows[row + 1], below, i);
      V gradient = own.slope(own.dx) + own.slope(own.dy);
      const auto left = isotropic_term<V>(call, rows[row], rows[row + 1], below, i - call.step);
      gradient = gradient - masked<true>(Lanes<V>({call.length, call.step}, i).left, left.slope(left.dx));
      if (above) {
        const auto upper = isotropic_term<V>(call, rows[row + 2], rows[row], true, i);
        gradient = gradient - upper.slope(upper.dy);
      }
      rows.write(row, i, gradient * scale);
    }
  }
}

template <class Body>
KDKERNELS_INLINE void for_each_block(const ImageCall& call, int64_t begin, int64_t end, const Body& body) {
  with_vectors<KDKERNELS_VECTOR_BYTES>(call.storage, [&](auto vector, auto type) {
    for (int64_t item = begin; item < end; ++item) body(vector, type, item);
  });
}

void difference_sums(const ImageCall& call, int64_t begin, int64_t end) {
  for_each_block(call, begin, end, [&](auto vector, auto type, int64_t item) {
    using V = decltype(vector);
    using T = decltype(type);
    const auto sums = call.absolute && call.squares ? block_sums<V, T, true, true>
                      : call.absolute               ? block_sums<V, T, true, false>
                                                    : block_sums<V, T, false, true>;
    sums(call, item);
  });
}
void difference_gradients(const ImageCall& call, int64_t begin, int64_t end) {
  for_each_block(call, begin, end, [&](auto vector, auto type, int64_t item) {
    using V = decltype(vector);
    using T = decltype(type);
    const auto gradients = call.absolute && call.squares ? block_gradients<V, T, true, true>
                           : call.absolute               ? block_gradients<V, T, true, false>
                                                         : block_gradients<V, T, false, true>;
    gradients(call, item);
  });
}
void isotropic_sums(const ImageCall& call, int64_t begin, int64_t end) {
  for_each_block(call, begin, end, [&](auto vector, auto type, int64_t item) {
    isotropic_block_sums<decltype(vector), decltype(type)>(call, item);
  });
}
void isotropic_gradients(const ImageCall& call, int64_t begin, int64_t end) {
  for_each_block(call, begin, end, [&](auto vector, auto type, int64_t item) {
    isotropic_block_gradients<decltype(vector), decltype(type)>(call, item);
  });
}

}  // namespace kdkernels::cpu::KDKERNELS_CAPABILITY
