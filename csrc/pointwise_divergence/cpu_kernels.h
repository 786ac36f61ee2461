// Pointwise divergences on the CPU. A piece of every operand is read in the type that is computed in, in place where it
// lies so in memory and else through a buffer; the formulas see only such pieces.
#pragma once

#include "core/cpu/simd.h"
#include "pointwise_divergence/math.h"
#include "pointwise_divergence/plan.h"

namespace kdkernels::cpu::KDKERNELS_CAPABILITY {

template <class V>
class Piece {
 public:
  using S = Scalar<V>;

  KDKERNELS_INLINE Piece(const PointwiseCall& call, int64_t item) : call_(call) {
    const int64_t row = item / call.pieces, begin = (item - row * call.pieces) * piece_numbers;
    count = std::min(piece_numbers, call.length - begin);
    for (int o = 0; o < pointwise_operands; ++o) offset_[o] = call.dims == 0 ? 0 : begin * stride(o);
    int64_t index = row;
    for (int d = call.dims - 2; d >= 0; --d) {
      const int64_t here = index % call.size[d];
      index /= call.size[d];
      for (int o = 0; o < pointwise_operands; ++o) offset_[o] += here * call.operand[o].stride[d];
    }
  }

  int64_t count;

  // The numbers of an operand, up to whole vectors
  KDKERNELS_INLINE const S* read(PointwiseOperandIndex o, S* buffer) const {
    const PointwiseOperand& operand = call_.operand[o];
    const int64_t step = stride(o);
    const S* place = buffer;
    with_storage(operand.storage, [&](auto type) {
      using T = decltype(type);
      const T* const source = static_cast<const T*>(operand.data) + offset_[o];
      if (step == 1) {
        if constexpr (std::is_same_v<S, T>) {
          if (count % lanes<V> == 0) {
            place = source;
            return;
          }
        }
        int64_t i = 0;
        for (; i + lanes<V> <= count; i += lanes<V>) store(buffer + i, load<V>(source + i));
        if (i < count) store(buffer + i, load_part<V>(source + i, count - i, S(0)));
      } else if (step == 0) {
        const V value = splat<V>(load_one<S>(source));
        for (int64_t i = 0; i < count; i += lanes<V>) store(buffer + i, value);
      } else {
        for (int64_t i = 0; i < count; ++i) buffer[i] = load_one<S>(source + i * step);
        for (int64_t i = count; i % lanes<V> != 0; ++i) buffer[i] = 0;
      }
    });
    return place;
  }

  // Where to put the numbers of a result, before write()
  KDKERNELS_INLINE S* place(PointwiseOperandIndex o, S* buffer) const {
    const PointwiseOperand& operand = call_.operand[o];
    const bool same = operand.storage == (sizeof(S) == 8 ? Storage::float64 : Storage::float32);
    return same && stride(o) == 1 && count % lanes<V> == 0 ? static_cast<S*>(operand.data) + offset_[o] : buffer;
  }
  KDKERNELS_INLINE void write(PointwiseOperandIndex o, const S* values, const S* buffer) const {
    if (values != buffer) return;  // they are in place
    const PointwiseOperand& operand = call_.operand[o];
    const int64_t step = stride(o);
    with_storage(operand.storage, [&](auto type) {
      using T = decltype(type);
      T* const destination = static_cast<T*>(operand.data) + offset_[o];
      if (step == 1) {
        int64_t i = 0;
        for (; i + lanes<V> <= count; i += lanes<V>) store(destination + i, load<V>(buffer + i));
        if (i < count) store_part(destination + i, load<V>(buffer + i), count - i);
      } else {
        for (int64_t i = 0; i < count; ++i) store(destination + i * step, buffer[i]);
      }
    });
  }

 private:
  KDKERNELS_INLINE int64_t stride(int o) const { return call_.dims == 0 ? 1 : call_.operand[o].stride[call_.dims - 1]; }

  const PointwiseCall& call_;
  int64_t offset_[pointwise_operands];
};

template <class V>
struct Buffers {
  alignas(64) Scalar<V> of[pointwise_operands][piece_numbers];
};

// Calls body(formula) with the formula of a call.
template <class V, class Body>
KDKERNELS_INLINE double with_formula(const PointwiseCall& call, const Body& body) {
  using S = Scalar<V>;
  switch (call.formula) {
    case PointwiseFormula::log_probabilities:
      return body(math::LogProbabilityTerms<V>{call.reversed});
    case PointwiseFormula::jensen_shannon:
      return body(math::JensenShannonTerms<V>{S(call.beta)});
    case PointwiseFormula::binary:
      return body(math::BinaryTerms<V>{call.reversed, call.target_is_probability, S(1 / call.temperature)});
    default:
      return body(math::ProbabilityTerms<V>{});
  }
}

// A weight times a value; a weight of 0 counts for nothing.
template <class V>
KDKERNELS_INLINE V weighted(V weight, V value) {
  return select(weight == Scalar<V>(0), V{}, weight * value);
}

// The sum; infinite terms leave a compensated one without a number.
template <class V>
KDKERNELS_INLINE double total_of(const ExactSum<V>& sum) {
  const double total = double(sum.total());
  return total == total || ExactSum<V>::is_float ? total : double(sum_lanes(sum.sums[0]));
}

template <class V, class Formula>
double losses_of(const PointwiseCall& call, const Formula& formula, int64_t begin, int64_t end) {
  using S = Scalar<V>;
  Buffers<V> buffers;
  const bool has_weights = call.operand[element_weight].data != nullptr;
  const bool writes = call.operand[left_result].data != nullptr;
  ExactSum<V> sum;
  for (int64_t item = begin; item < end; ++item) {
    const Piece<V> piece(call, item);
    const S* const x = piece.read(left, buffers.of[left]);
    const S* const y = piece.read(right, buffers.of[right]);
    const S* const w = has_weights ? piece.read(element_weight, buffers.of[element_weight]) : nullptr;
    S* const result = writes ? piece.place(left_result, buffers.of[left_result]) : nullptr;
    for (int64_t i = 0; i < piece.count; i += lanes<V>) {
      V value = formula.value(load<V>(x + i), load<V>(y + i));
      if (has_weights) value = weighted(load<V>(w + i), value);
      if (writes) store(result + i, value);
      sum.add(piece.count - i >= lanes<V> ? value : keep_lanes(value, piece.count - i, S(0)));
    }
    if (writes) piece.write(left_result, result, buffers.of[left_result]);
  }
  return total_of(sum);
}

template <class V, class Formula>
KDKERNELS_INLINE V slope_by_temperature(const Formula& formula, V x, V y, const math::Slopes<V>& by) {
  if constexpr (std::is_same_v<Formula, math::BinaryTerms<V>>) {
    return formula.slope_by_temperature(x, y, by);
  } else {
    return V{};
  }
}

// The gradient of the input alone (`of_right` is false) needs less.
template <class V, bool of_right, class Formula>
double gradients_of(const PointwiseCall& call, const Formula& formula, int64_t begin, int64_t end) {
  using S = Scalar<V>;
  constexpr bool reads_left = of_right || Formula::input_slope_needs_input;
  Buffers<V> buffers;
  const bool has_weights = call.operand[element_weight].data != nullptr;
  const bool writes_left = call.operand[left_result].data != nullptr;
  const bool writes_right = of_right && call.operand[right_result].data != nullptr;
  const V normalizer = splat<V>(S(call.normalizer));
  ExactSum<V> sum;
  for (int64_t item = begin; item < end; ++item) {
    const Piece<V> piece(call, item);
    const S* const y = piece.read(right, buffers.of[right]);
    const S* const x = reads_left ? piece.read(left, buffers.of[left]) : y;
    const S* const g = piece.read(incoming_gradient, buffers.of[incoming_gradient]);
    const S* const w = has_weights ? piece.read(element_weight, buffers.of[element_weight]) : nullptr;
    S* const by_left = writes_left ? piece.place(left_result, buffers.of[left_result]) : nullptr;
    S* const by_right = writes_right ? piece.place(right_result, buffers.of[right_result]) : nullptr;
    for (int64_t i = 0; i < piece.count; i += lanes<V>) {
      const V at_x = load<V>(x + i), at_y = load<V>(y + i);
      const math::Slopes<V> slopes = formula.slopes(at_x, at_y);
      const V scale = load<V>(g + i) * normalizer;
      const auto scaled = [&](V slope) {
        return has_weights ? scale * weighted(load<V>(w + i), slope) : scale * slope;
      };
      if (writes_left) store(by_left + i, scaled(slopes.input));
      if constexpr (of_right) {
        if (writes_right) store(by_right + i, scaled(slopes.target));
        if (call.sum_temperature) {
          const V slope = scaled(slope_by_temperature(formula, at_x, at_y, slopes));
          sum.add(piece.count - i >= lanes<V> ? slope : keep_lanes(slope, piece.count - i, S(0)));
        }
      }
    }
    if (writes_left) piece.write(left_result, by_left, buffers.of[left_result]);
    if (writes_right) piece.write(right_result, by_right, buffers.of[right_result]);
  }
  return total_of(sum);
}

template <class Body>
KDKERNELS_INLINE double with_compute_vector(const PointwiseCall& call, const Body& body) {
  if (call.is_double) return body(Vector<double, KDKERNELS_VECTOR_BYTES>());
  return body(Vector<float, KDKERNELS_VECTOR_BYTES>());
}

double sum_of_element_weights(const ElementWeights& weights, int64_t begin, int64_t end) {
  const auto sum_of = [&](auto vector) {
    using V = decltype(vector);
    using S = Scalar<V>;
    const S* const data = static_cast<const S*>(weights.data);
    ExactSum<V> sum;
    for (int64_t i = begin; i < end; i += lanes<V>) {
      const V weight = end - i >= lanes<V> ? load<V>(data + i) : load_part<V>(data + i, end - i, S(0));
      sum.add(select(weight >= S(0), weight, splat<V>(math::not_a_number<V>)));
    }
    return total_of(sum);
  };
  return weights.is_double ? sum_of(Vector<double, KDKERNELS_VECTOR_BYTES>())
                           : sum_of(Vector<float, KDKERNELS_VECTOR_BYTES>());
}

double pointwise_losses(const PointwiseCall& call, int64_t begin, int64_t end) {
  return with_compute_vector(call, [&](auto vector) {
    using V = decltype(vector);
    return with_formula<V>(call, [&](const auto& formula) { return losses_of<V>(call, formula, begin, end); });
  });
}

double pointwise_gradients(const PointwiseCall& call, int64_t begin, int64_t end) {
  const bool of_right = call.operand[right_result].data != nullptr || call.sum_temperature;
  return with_compute_vector(call, [&](auto vector) {
    using V = decltype(vector);
    return with_formula<V>(call, [&](const auto& formula) {
      return of_right ? gradients_of<V, true>(call, formula, begin, end)
                      : gradients_of<V, false>(call, formula, begin, end);
    });
  });
}

}  // namespace kdkernels::cpu::KDKERNELS_CAPABILITY
