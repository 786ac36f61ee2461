// Batch-norm statistics in one read of the activation, and their gradient in one more.
//
// A group of values small enough for the cache is summed twice: exactly, for its mean, and then around the mean. Groups
// are merged in double precision or better. This keeps the mean accurate where it is small, and the variance where the
// mean is large.
#pragma once

#include "batch_norm_stats/plan.h"
#include "core/cpu/scratch.h"
#include "core/sums.h"

namespace kdkernels::cpu::KDKERNELS_CAPABILITY {

// Calls body(vector) for `count` numbers, and close() after every block of a BlockedSum; lanes past the end hold
// `fill`.
template <class V, class T, class Body, class Close>
KDKERNELS_INLINE void for_each_vector(const T* source, int64_t count, Scalar<V> fill, const Body& body,
                                      const Close& close) {
  constexpr int64_t block = math::BlockedSum<V>::block * lanes<V>;
  for (int64_t start = 0; start < count; start += block) {
    const int64_t end = count - start < block ? count : start + block;
    int64_t i = start;
    for (; i + lanes<V> <= end; i += lanes<V>) body(load<V>(source + i));
    if (i < end) body(load_part<V>(source + i, end - i, fill));
    close();
  }
}

template <class V, class T>
Moments plane_moments(const BatchNormCall& call, int64_t channel, int64_t first, int64_t last) {
  using S = Scalar<V>;
  const T* const data = static_cast<const T*>(call.input.data) + channel * call.input.channel_stride;
  // Long planes are cut so that the second sum finds them in the first-level cache.
  constexpr int64_t cut = 4096;
  Moments total;
  for (int64_t start = 0; start < call.plane; start += cut) {
    const int64_t length = call.plane - start < cut ? call.plane - start : cut;
    const int64_t count = length * (last - first);
    ExactSum<V> sum;
    for (int64_t n = first; n < last; ++n) {
      for_each_vector<V>(data + n * call.input.sample_stride + start, length, S(0), [&](V x) { sum.add(x); }, [] {});
    }
    const long double mean = sum.total() / count;
    const V shift = splat<V>(S(mean));
    math::BlockedSum<V> rest, squares;
    for (int64_t n = first; n < last; ++n) {
      for_each_vector<V>(
          data + n * call.input.sample_stride + start, length, S(mean),
          [&](V x) {
            const V distance = x - shift;
            rest.add(distance);
            squares.add(distance * distance);
          },
          [&] {
            rest.close_block();
            squares.close_block();
          });
    }
    total.merge(Moments::around(mean, count, double(sum_lanes(rest.sum())), double(sum_lanes(squares.sum()))));
  }
  return total;
}

// The moments of `width` neighbouring vectors of channels over all rows of the group
template <int width, class V, class T>
KDKERNELS_INLINE void row_moments(const T* data, int64_t rows, int64_t row_stride, int64_t valid, Moments* out) {
  using S = Scalar<V>;
  const auto read = [&](int64_t row, int w) {
    const T* const source = data + row * row_stride + w * lanes<V>;
    const int64_t rest = valid - w * lanes<V>;
    return rest >= lanes<V> ? load<V>(source) : load_part<V>(source, rest, S(0));
  };
  ExactSum<V> sum[width];
  for (int64_t row = 0; row < rows; ++row) {
    for (int w = 0; w < width; ++w) sum[w].add(read(row, w));
  }
  V mean[width];
  for (int w = 0; w < width; ++w) {
    S means[lanes<V>];
    for (int l = 0; l < lanes<V>; ++l) means[l] = S(sum[w].lane_sum(l) / rows);
    mean[w] = load<V>(means);
  }
  math::BlockedSum<V> rest[width], squares[width];
  constexpr int64_t block = math::BlockedSum<V>::block;
  for (int64_t start = 0; start < rows; start += block) {
    const int64_t end = rows - start < block ? rows : start + block;
    for (int64_t row = start; row < end; ++row) {
      for (int w = 0; w < width; ++w) {
        const V distance = read(row, w) - mean[w];
        rest[w].add(distance);
        squares[w].add(distance * distance);
      }
    }
    for (int w = 0; w < width; ++w) {
      rest[w].close_block();
      squares[w].close_block();
    }
  }
  for (int64_t c = 0; c < valid; ++c) {
    const int w = int(c / lanes<V>), l = int(c % lanes<V>);
    out[c] = Moments::around(sum[w].lane_sum(l) / rows, rows, double(lane(rest[w].sum(), l)),
                             double(lane(squares[w].sum(), l)));
  }
}

template <class V, class T>
void group_moments(const BatchNormCall& call, int64_t group) {
  const int64_t all = call.samples * call.plane, first = group * call.group;
  const int64_t rows = all - first < call.group ? all - first : call.group;
  const T* const data = static_cast<const T*>(call.input.data) + first * call.input.row_stride;
  Moments* const out = call.partial + group * call.channels;
  constexpr int width = 4;
  int64_t c = 0;
  for (; c + width * lanes<V> <= call.channels; c += width * lanes<V>) {
    row_moments<width, V>(data + c, rows, call.input.row_stride, width * lanes<V>, out + c);
  }
  for (; c < call.channels; c += lanes<V>) {
    const int64_t valid = call.channels - c < lanes<V> ? call.channels - c : lanes<V>;
    row_moments<1, V>(data + c, rows, call.input.row_stride, valid, out + c);
  }
}

// out = grad_output + constant + slope * (x - mean) for `count` numbers. coefficient(k, i, here) gives the mean, the
// constant or the slope: one number for a plane, consecutive ones for a row.
template <class V, class T, class Coefficient>
KDKERNELS_INLINE void gradient_run(const T* x, const T* grad_output, T* out, int64_t count,
                                   const Coefficient& coefficient) {
  using S = Scalar<V>;
  for (int64_t i = 0; i < count; i += lanes<V>) {
    const int64_t here = count - i < lanes<V> ? count - i : lanes<V>;
    const bool full = here == lanes<V>;
    const V value = full ? load<V>(x + i) : load_part<V>(x + i, here, S(0));
    V gradient =
        math::statistics_gradient(value, coefficient(0, i, here), coefficient(1, i, here), coefficient(2, i, here));
    if (grad_output != nullptr) {
      gradient = gradient + (full ? load<V>(grad_output + i) : load_part<V>(grad_output + i, here, S(0)));
    }
    if (full) {
      store(out + i, gradient);
    } else {
      store_part(out + i, gradient, here);
    }
  }
}

template <class V, class T>
void plane_gradient(const BatchNormCall& call, int64_t channel, int64_t first, int64_t last) {
  using S = Scalar<V>;
  const void* const sources[] = {call.mean, call.constant, call.slope};
  V coefficients[3];
  for (int k = 0; k < 3; ++k) coefficients[k] = splat<V>(static_cast<const S*>(sources[k])[channel]);
  for (int64_t n = first; n < last; ++n) {
    gradient_run<V>(at<const T>(call.input, plane_offset(call.input, n, channel)),
                    at<const T>(call.grad_output, plane_offset(call.grad_output, n, channel)),
                    at<T>(call.output, plane_offset(call.output, n, channel)), call.plane,
                    [&](int k, int64_t, int64_t) { return coefficients[k]; });
  }
}

template <class V, class T>
void row_gradient(const BatchNormCall& call, int64_t group) {
  using S = Scalar<V>;
  const S* const sources[] = {static_cast<const S*>(call.mean), static_cast<const S*>(call.constant),
                              static_cast<const S*>(call.slope)};
  const int64_t all = call.samples * call.plane;
  const int64_t last = (group + 1) * call.group < all ? (group + 1) * call.group : all;
  for (int64_t row = group * call.group; row < last; ++row) {
    gradient_run<V>(at<const T>(call.input, row * call.input.row_stride),
                    at<const T>(call.grad_output, row * call.grad_output.row_stride),
                    at<T>(call.output, row * call.output.row_stride), call.channels,
                    [&](int k, int64_t i, int64_t here) {
                      return here == lanes<V> ? load<V>(sources[k] + i) : load_part<V>(sources[k] + i, here, S(0));
                    });
  }
}

template <class Plane, class Row>
KDKERNELS_INLINE void for_each_item(const BatchNormCall& call, int64_t begin, int64_t end, const Plane& plane,
                                    const Row& row) {
  for (int64_t item = begin; item < end; ++item) {
    if (call.rows) {
      row(item);
    } else {
      const int64_t first = item / call.channels * call.group;
      const int64_t last = first + call.group < call.samples ? first + call.group : call.samples;
      plane(item, item % call.channels, first, last);
    }
  }
}

void batch_norm_moments(const BatchNormCall& call, int64_t begin, int64_t end) {
  with_vectors<KDKERNELS_VECTOR_BYTES>(call.storage, [&](auto vector, auto type) {
    using V = decltype(vector);
    using T = decltype(type);
    for_each_item(
        call, begin, end,
        [&](int64_t item, int64_t channel, int64_t first, int64_t last) {
          call.partial[item] = plane_moments<V, T>(call, channel, first, last);
        },
        [&](int64_t group) { group_moments<V, T>(call, group); });
  });
}

void batch_norm_gradient(const BatchNormCall& call, int64_t begin, int64_t end) {
  with_vectors<KDKERNELS_VECTOR_BYTES>(call.storage, [&](auto vector, auto type) {
    using V = decltype(vector);
    using T = decltype(type);
    for_each_item(
        call, begin, end,
        [&](int64_t, int64_t channel, int64_t first, int64_t last) {
          plane_gradient<V, T>(call, channel, first, last);
        },
        [&](int64_t group) { row_gradient<V, T>(call, group); });
  });
}

}  // namespace kdkernels::cpu::KDKERNELS_CAPABILITY
