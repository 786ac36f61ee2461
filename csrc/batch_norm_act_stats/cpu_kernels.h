// The fused BatchNorm layer: output and statistics of the input in one pass, and all their gradients in another.
//
// The moments of a block that the first-level cache holds are sums around a center, the mean of some values, and
// are merged in double. So the variance keeps its accuracy however large the mean is.
#pragma once

#include "batch_norm_act_stats/cpu_vectors.h"
#include "core/cpu/scratch.h"

namespace kdkernels::cpu::KDKERNELS_CAPABILITY {

// Planes

template <ActivationKind kind, class V, class T>
math::Moments<double> plane_forward(const BatchNormActCall& call, int64_t channel, int64_t first, int64_t last) {
  using S = Scalar<V>;
  const V scale = splat_at<V>(call.scale, channel), shift = splat_at<V>(call.shift, channel);
  const math::ActivationOf<kind, V> activation(call.activation);
  math::Moments<double> total;
  for (int64_t start = 0; start < call.plane; start += BatchNormActCall::block_values) {
    const int64_t end = std::min(call.plane, start + BatchNormActCall::block_values);
    // The mean of values from all over the block, so that it is not that of a border alone
    const T* const begin = at<const T>(call.input, plane_offset(call.input, first, channel) + start);
    const int64_t length = end - start, some = std::min<int64_t>(length, 4 * lanes<V>);
    S center = 0;
    for (int64_t k = 0; k < some; ++k) center += load_one<S>(begin + k * length / some);
    center /= S(some);
    Sums<V> sums[2];
    for (int64_t n = first; n < last; ++n) {
      const Forward<kind, V, T> numbers{at<const T>(call.input, plane_offset(call.input, n, channel)),
                                        at<const T>(call.residual, plane_offset(call.residual, n, channel)),
                                        at<T>(call.output, plane_offset(call.output, n, channel))};
      const auto add = [&](Sums<V>& to, int64_t i) {
        to.add(numbers.template vector<true>(i, lanes<V>, scale, shift, activation) - center);
      };
      int64_t i = start;
      for (; i + 2 * lanes<V> <= end; i += 2 * lanes<V>) {
        add(sums[0], i);
        add(sums[1], i + lanes<V>);
      }
      if (i + lanes<V> <= end) {
        add(sums[0], i);
        i += lanes<V>;
      }
      if (i < end) {
        sums[1].add(numbers.template vector<false>(i, end - i, scale, shift, activation, center) - center);
      }
    }
    sums[0].add(sums[1]);
    total.merge(
        moments_of(center, double(length * (last - first)), exact_sum(sums[0].distances), exact_sum(sums[0].squares)));
  }
  return total;
}

template <ActivationKind kind, class V, class T>
void plane_backward(const BatchNormActCall& call, int64_t channel, int64_t first, int64_t last) {
  const math::ActivationOf<kind, V> activation(call.activation);
  for (int64_t n = first; n < last; ++n) {
    const int64_t i_statistic = call.by_image ? n * call.channels + channel : channel;
    const Coefficients<V> coefficients{splat_at<V>(call.scale, channel), splat_at<V>(call.shift, channel),
                                       splat_at<V>(call.mean, i_statistic), splat_at<V>(call.constant, i_statistic),
                                       splat_at<V>(call.slope, i_statistic)};
    const Backward<kind, V, T> numbers{at<const T>(call.input, plane_offset(call.input, n, channel)),
                                       at<const T>(call.output, plane_offset(call.output, n, channel)),
                                       at<const T>(call.grad_output, plane_offset(call.grad_output, n, channel)),
                                       at<T>(call.grad_input, plane_offset(call.grad_input, n, channel)),
                                       at<T>(call.grad_residual, plane_offset(call.grad_residual, n, channel)),
                                       call.of_statistics};
    int64_t i = 0;
    for (; i + lanes<V> <= call.plane; i += lanes<V>) {
      numbers.template vector<true>(i, lanes<V>, coefficients, activation);
    }
    if (i < call.plane) numbers.template vector<false>(i, call.plane - i, coefficients, activation);
  }
}

// Rows

struct RowRange {
  int64_t sample, first, last;

  RowRange(const BatchNormActCall& call, int64_t item) : sample(call.by_image ? item / call.pieces : 0) {
    const int64_t piece = item - sample * call.pieces;
    first = sample * call.plane + piece * call.group;
    last = sample * call.plane + std::min(call.divided, (piece + 1) * call.group);
  }
};

// Calls body(first row, wide rows, first number, numbers in a vector, width, whole) for blocks of wide rows that the
// first-level cache holds, and runs of `width` vectors of numbers in them.
template <class V, class Body>
KDKERNELS_INLINE void for_each_block(const BatchNormActCall& call, const RowRange& range, const Body& body) {
  using std::false_type, std::integral_constant, std::true_type;
  const int64_t wide_rows = (range.last - range.first) / call.copies, numbers = call.wide();
  for (int64_t wide_row = 0; wide_row < wide_rows; wide_row += call.block_rows()) {
    const int64_t row = range.first + wide_row * call.copies, here = std::min(call.block_rows(), wide_rows - wide_row);
    int64_t c = 0;
    for (; c + 4 * lanes<V> <= numbers; c += 4 * lanes<V>) {
      body(row, here, c, lanes<V>, integral_constant<int, 4>(), true_type());
    }
    const int64_t rest = (numbers - c) / lanes<V>;
    if (rest == 3) body(row, here, c, lanes<V>, integral_constant<int, 3>(), true_type());
    if (rest == 2) body(row, here, c, lanes<V>, integral_constant<int, 2>(), true_type());
    if (rest == 1) body(row, here, c, lanes<V>, integral_constant<int, 1>(), true_type());
    c += rest * lanes<V>;
    if (c < numbers) body(row, here, c, numbers % lanes<V>, integral_constant<int, 1>(), false_type());
  }
  const int64_t row = range.first + wide_rows * call.copies, left = (range.last - row) * call.channels;
  int64_t c = 0;
  for (; c + lanes<V> <= left; c += lanes<V>) body(row, 1, c, lanes<V>, integral_constant<int, 1>(), true_type());
  if (c < left) body(row, 1, c, left % lanes<V>, integral_constant<int, 1>(), false_type());
}

// The mean of each channel in rows from all over the range
template <class V, class T>
void find_centers(const BatchNormActCall& call, const RowRange& range, Scalar<V>* centers) {
  using S = Scalar<V>;
  const int64_t count = range.last - range.first, some = std::min<int64_t>(8, count);
  for (int64_t c = 0; c < call.channels; c += lanes<V>) {
    const bool whole = call.channels - c >= lanes<V>;
    V sum{};
    for (int64_t k = 0; k < some; ++k) {
      const T* const x = at<const T>(call.input, (range.first + k * count / some) * call.input.row_stride + c);
      sum = sum + (whole ? load<V>(x) : load_part<V>(x, call.channels % lanes<V>, S(0)));
    }
    store(centers + c, V(sum / S(some)));
  }
  for (int64_t c = call.channels; c < call.wide(); ++c) centers[c] = centers[c - call.channels];
}

template <ActivationKind kind, class V, class T>
void rows_forward(const BatchNormActCall& call, int64_t item) {
  using S = Scalar<V>;
  const RowRange range(call, item);
  const int64_t padded = call.wide() + lanes<V>;
  const Scratch<S> centers(padded);
  const Scratch<double> distances(padded), squares(padded);
  std::fill_n(distances.get(), padded, 0.0);
  std::fill_n(squares.get(), padded, 0.0);
  find_centers<V, T>(call, range, centers.get());
  const math::ActivationOf<kind, V> activation(call.activation);
  const auto block = [&](int64_t first, int64_t rows, int64_t c, int64_t count, auto vectors, auto whole) {
    // Few vectors are summed in several rows at a time, since an addition waits for the one before it.
    constexpr int width = vectors.value, together = width == 1 ? 4 : width == 2 ? 2 : 1;
    V scale[width], shift[width], center[width];
    Sums<V> sums[together][width];
    for (int w = 0; w < width; ++w) {
      scale[w] = load_at<V>(call.scale, c + w * lanes<V>);
      shift[w] = load_at<V>(call.shift, c + w * lanes<V>);
      center[w] = load<V>(centers.get() + c + w * lanes<V>);
    }
    const auto add = [&](Sums<V>* to, int64_t wide_row) {
      const int64_t row = first + wide_row * call.copies;
      const Forward<kind, V, T> numbers{at<const T>(call.input, row * call.input.row_stride + c),
                                        at<const T>(call.residual, row * call.residual.row_stride + c),
                                        at<T>(call.output, row * call.output.row_stride + c)};
      for (int w = 0; w < width; ++w) {
        to[w].add(numbers.template vector<whole.value>(w * lanes<V>, count, scale[w], shift[w], activation) -
                  center[w]);
      }
    };
    int64_t row = 0;
    if constexpr (whole.value) {
      for (; row + together <= rows; row += together) {
        for (int t = 0; t < together; ++t) add(sums[t], row + t);
      }
    }
    for (; row < rows; ++row) add(sums[0], row);
    for (int w = 0; w < width; ++w) {
      for (int t = 1; t < together; ++t) sums[0][w].add(sums[t][w]);
      const int64_t valid = whole.value ? lanes<V> : count;
      add_lanes(distances.get() + c + w * lanes<V>, sums[0][w].distances, valid);
      add_lanes(squares.get() + c + w * lanes<V>, sums[0][w].squares, valid);
    }
  };
  for_each_block<V>(call, range, block);
  double *const means = call.means_of(item), *const around = call.squares_of(item);
  const double share = 1 / double(range.last - range.first);
  for (int64_t c = 0; c < call.channels; ++c) {
    double sum = 0, sum_of_squares = 0;
    for (int64_t i = c; i < call.wide(); i += call.channels) {
      sum += distances.get()[i];
      sum_of_squares += squares.get()[i];
    }
    means[c] = double(centers.get()[c]) + sum * share;
    around[c] = not_negative(sum_of_squares - sum * sum * share);
  }
}

template <ActivationKind kind, class V, class T>
void rows_backward(const BatchNormActCall& call, int64_t item) {
  const RowRange range(call, item);
  const math::ActivationOf<kind, V> activation(call.activation);
  const auto block = [&](int64_t first, int64_t rows, int64_t c, int64_t count, auto vectors, auto whole) {
    constexpr int width = vectors.value;
    Coefficients<V> coefficients[width];
    for (int w = 0; w < width; ++w) {
      const int64_t i = c + w * lanes<V>, i_statistic = range.sample * call.wide() + i;
      coefficients[w] = {load_at<V>(call.scale, i), load_at<V>(call.shift, i), load_at<V>(call.mean, i_statistic),
                         load_at<V>(call.constant, i_statistic), load_at<V>(call.slope, i_statistic)};
    }
    for (int64_t wide_row = 0; wide_row < rows; ++wide_row) {
      const int64_t row = first + wide_row * call.copies;
      const Backward<kind, V, T> numbers{at<const T>(call.input, row * call.input.row_stride + c),
                                         at<const T>(call.output, row * call.output.row_stride + c),
                                         at<const T>(call.grad_output, row * call.grad_output.row_stride + c),
                                         at<T>(call.grad_input, row * call.grad_input.row_stride + c),
                                         at<T>(call.grad_residual, row * call.grad_residual.row_stride + c),
                                         call.of_statistics};
      for (int w = 0; w < width; ++w) {
        numbers.template vector<whole.value>(w * lanes<V>, count, coefficients[w], activation);
      }
    }
  };
  for_each_block<V>(call, range, block);
}

// Calls body(kind) with the kind of the activation as a type.
template <class Body>
KDKERNELS_INLINE void with_kind(ActivationKind kind, const Body& body) {
  switch (kind) {
    case ActivationKind::clamp:
      return body(std::integral_constant<ActivationKind, ActivationKind::clamp>());
    case ActivationKind::silu:
      return body(std::integral_constant<ActivationKind, ActivationKind::silu>());
    case ActivationKind::hardswish:
      return body(std::integral_constant<ActivationKind, ActivationKind::hardswish>());
    default:
      return body(std::integral_constant<ActivationKind, ActivationKind::leaky_relu>());
  }
}

// Calls rows(item, kind, V(), T()), or planes(item, channel, first sample, last sample, kind, V(), T()).
template <class Rows, class Planes>
KDKERNELS_INLINE void for_each_item(const BatchNormActCall& call, int64_t begin, int64_t end, const Rows& rows,
                                    const Planes& planes) {
  with_vectors<KDKERNELS_VECTOR_BYTES>(call.storage, [&](auto vector, auto type) {
    with_kind(call.activation.kind, [&](auto kind) {
      for (int64_t item = begin; item < end; ++item) {
        if (call.rows) {
          rows(item, kind, vector, type);
        } else {
          const int64_t first = item / call.channels * call.group;
          planes(item, item % call.channels, first, std::min(first + call.group, call.samples), kind, vector, type);
        }
      }
    });
  });
}

void batch_norm_act_forward(const BatchNormActCall& call, int64_t begin, int64_t end) {
  for_each_item(
      call, begin, end,
      [&](int64_t item, auto kind, auto vector, auto type) {
        rows_forward<kind.value, decltype(vector), decltype(type)>(call, item);
      },
      [&](int64_t item, int64_t channel, int64_t first, int64_t last, auto kind, auto vector, auto type) {
        const auto moments = plane_forward<kind.value, decltype(vector), decltype(type)>(call, channel, first, last);
        call.means_of(item / call.channels)[channel] = moments.mean;
        call.squares_of(item / call.channels)[channel] = moments.squares;
      });
}

void batch_norm_act_backward(const BatchNormActCall& call, int64_t begin, int64_t end) {
  for_each_item(
      call, begin, end,
      [&](int64_t item, auto kind, auto vector, auto type) {
        rows_backward<kind.value, decltype(vector), decltype(type)>(call, item);
      },
      [&](int64_t, int64_t channel, int64_t first, int64_t last, auto kind, auto vector, auto type) {
        plane_backward<kind.value, decltype(vector), decltype(type)>(call, channel, first, last);
      });
}

}  // namespace kdkernels::cpu::KDKERNELS_CAPABILITY
