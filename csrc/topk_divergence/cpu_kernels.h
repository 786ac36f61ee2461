// The divergence from a teacher's top classes: one read of each row forward, one more and a write backward.
#pragma once

#include "core/cpu/scratch.h"
#include "topk_divergence/cpu_outcomes.h"

namespace kdkernels::cpu::KDKERNELS_CAPABILITY {
namespace topk {

// The classes of a row in blocks of whole vectors. Listed classes are marked by a bit, 16 of them in a word.
template <class V, class T>
class Row {
 public:
  static constexpr int64_t vectors = 16, numbers = vectors * lanes<V>;

  explicit Row(int64_t classes)
      : classes_(classes), blocks_((classes + numbers - 1) / numbers), marks_(blocks_ * lanes<V>), copy_(numbers) {
    memset(marks_.get(), 0, size_t(blocks_ * lanes<V>) * sizeof(uint16_t));
  }

  int64_t blocks() const { return blocks_; }
  int64_t classes() const { return classes_; }
  void move_to(const void* data, int64_t offset, int64_t stride) {
    data_ = static_cast<const T*>(data) + offset;
    stride_ = stride;
  }
  double at(int64_t index) const { return load_one<double>(data_ + index * stride_); }

  // Whether the class was there to be marked
  bool mark(int64_t index) {
    if (index < 0 || index >= classes_) return false;
    uint16_t& word = marks_.get()[index / 16];
    const uint16_t bit = uint16_t(1u << (index % 16));
    if (word & bit) return false;
    word = uint16_t(word | bit);
    return true;
  }
  void unmark(int64_t index) {
    if (index >= 0 && index < classes_) marks_.get()[index / 16] = 0;
  }

  // A block where it lies; or a copy, if it ends within the block, if it is not dense, or if it has marked classes and
  // is to be without them. What does not count is -inf in the copy.
  template <bool without_marked>
  KDKERNELS_INLINE const T* block(int64_t b) const {
    const int64_t begin = b * numbers, count = classes_ - begin < numbers ? classes_ - begin : numbers;
    const uint16_t* const marks = marks_.get() + b * lanes<V>;
    uint16_t marked = 0;
    if constexpr (without_marked) {
      for (int w = 0; w < lanes<V>; ++w) marked = uint16_t(marked | marks[w]);
    }
    const T* const source = data_ + begin * stride_;
    if (stride_ == 1 && count == numbers && marked == 0) return source;
    T* const copy = copy_.get();
    if (stride_ == 1) {
      memcpy(copy, source, size_t(count) * sizeof(T));
    } else {
      for (int64_t i = 0; i < count; ++i) copy[i] = source[i * stride_];
    }
    constexpr Scalar<V> nothing = -std::numeric_limits<Scalar<V>>::infinity();
    for (int64_t i = count; i < numbers; ++i) store<Scalar<V>>(copy + i, nothing);
    for (int w = 0; marked != 0 && w < lanes<V>; ++w) {
      for (int bit = 0; marks[w] >> bit != 0; ++bit) {
        if (marks[w] >> bit & 1) store<Scalar<V>>(copy + w * 16 + bit, nothing);
      }
    }
    return copy;
  }

 private:
  int64_t classes_, blocks_;
  Scratch<uint16_t> marks_;
  Scratch<T> copy_;
  const T* data_ = nullptr;
  int64_t stride_ = 1;
};

// Sums up the classes that are not marked, relative to the largest of them so far.
template <class V, class T>
KDKERNELS_INLINE Rest sum_rest(const Row<V, T>& row, Scalar<V> inverse_temperature) {
  using S = Scalar<V>;
  S largest = -std::numeric_limits<S>::infinity();
  double total = 0;
  for (int64_t b = 0; b < row.blocks(); ++b) {
    const T* const block = row.template block<true>(b);
    V maxima = load<V>(block);
    for (int64_t i = 1; i < row.vectors; ++i) maxima = math::maximum(load<V>(block + i * lanes<V>), maxima);
    const S here = max_lanes(maxima);
    if (here > largest) {
      total *= std::exp(double(largest - here) * double(inverse_temperature));
      largest = here;
    }
    const S shift = largest == -std::numeric_limits<S>::infinity() ? 0 : largest;
    V sum{};
    for (int64_t i = 0; i < row.vectors; ++i) {
      sum = sum + math::exp_nonpositive((load<V>(block + i * lanes<V>) - shift) * inverse_temperature);
    }
    total += double(sum_lanes(sum));
  }
  return {double(largest), total};
}

// Writes factor * e^((z - largest) / T) to a row of the gradient.
template <class V, class T>
KDKERNELS_INLINE void write_rest(const Row<V, T>& row, Scalar<V> largest, Scalar<V> inverse_temperature,
                                 Scalar<V> factor, T* destination, int64_t stride) {
  alignas(64) T buffer[Row<V, T>::numbers];
  for (int64_t b = 0; b < row.blocks(); ++b) {
    const int64_t begin = b * row.numbers;
    const int64_t count = row.classes() - begin < row.numbers ? row.classes() - begin : row.numbers;
    const bool direct = stride == 1 && count == row.numbers;
    T* const out = direct ? destination + begin : buffer;
    if (factor == 0) {
      for (int64_t i = 0; i < row.vectors; ++i) store(out + i * lanes<V>, V{});
    } else {
      const T* const block = row.template block<false>(b);
      for (int64_t i = 0; i < row.vectors; ++i) {
        const V x = (load<V>(block + i * lanes<V>) - largest) * inverse_temperature;
        store(out + i * lanes<V>, math::exp_nonpositive(x) * factor);
      }
    }
    for (int64_t i = 0; !direct && i < count; ++i) destination[(begin + i) * stride] = buffer[i];
  }
}

// The memory of a thread: a row of the student's logits and the listed classes of its position
template <class V, class T>
class Position {
 public:
  using S = Scalar<V>;

  explicit Position(const TopKCall& call)
      : call_(call),
        row_(call.classes),
        vectors_((call.listed + lanes<Doubles> - 1) / lanes<Doubles>),
        memory_(4 * vectors_) {}

  Row<V, T>& row() { return row_; }
  const Outcomes& outcomes() const { return outcomes_; }

  double weight(int64_t position) const {
    return call_.weights == nullptr ? 1 : double(static_cast<const S*>(call_.weights)[position]);
  }
  bool is_padding(int64_t k) const { return values_[k] == -std::numeric_limits<S>::infinity(); }
  int64_t index(int64_t k) const { return indices_[k]; }

  // Reads what is listed and marks it; returns whether it is accepted.
  bool enter(int64_t position) {
    values_ = static_cast<const S*>(call_.values) + position * call_.listed;
    indices_ = call_.indices + position * call_.listed;
    row_.move_to(call_.input.data, call_.offset_of(call_.input, position), call_.input.class_stride);
    Doubles* const memory = memory_.get();
    outcomes_ = {vectors_, 0, memory, memory + vectors_, memory + 2 * vectors_, memory + 3 * vectors_};
    double* const logits = reinterpret_cast<double*>(outcomes_.logit);
    double* const log_p = reinterpret_cast<double*>(outcomes_.log_p);
    double mass = 0;
    for (int64_t k = 0; k < vectors_ * lanes<Doubles>; ++k) {
      logits[k] = log_p[k] = -std::numeric_limits<double>::infinity();
      if (k >= call_.listed || is_padding(k)) continue;
      if (!row_.mark(indices_[k])) return false;
      log_p[k] = double(values_[k]);
      logits[k] = row_.at(indices_[k]) / call_.temperature;
      ++outcomes_.listed;
      if (log_p[k] > 1) mass = std::numeric_limits<double>::infinity();
    }
    if (call_.tail == TopKTail::renormalize) return true;
    mass += sum_over(outcomes_, [&](int64_t i) { return math::exp_nonpositive(outcomes_.log_p[i]); });
    return !(mass > TopKArguments::most_mass);
  }
  void leave() {
    for (int64_t k = 0; k < call_.listed; ++k) row_.unmark(indices_[k]);
  }

 private:
  const TopKCall& call_;
  Row<V, T> row_;
  int64_t vectors_;
  Scratch<Doubles> memory_;
  Outcomes outcomes_{};
  const S* values_ = nullptr;
  const int64_t* indices_ = nullptr;
};

template <class S>
KDKERNELS_INLINE void put(void* results, int64_t position, double value) {
  if (results != nullptr) static_cast<S*>(results)[position] = S(value);
}

template <class V, class T>
double forward(const TopKCall& call, int64_t begin, int64_t end, int64_t* refused) {
  using S = Scalar<V>;
  const S inverse_temperature = S(1 / call.temperature);
  Position<V, T> position(call);
  double total = 0;
  for (int64_t i = begin; i < end; ++i) {
    const double weight = position.weight(i);
    Solution solution{0, 0, 0, 0};
    Rest rest{0, 0};
    if (weight != 0) {
      if (!position.enter(i)) {
        *refused = i;
        return total;
      }
      if (call.reads_rows()) rest = sum_rest(position.row(), inverse_temperature);
      solution = solve<false>(call, position.outcomes(), rest);
      position.leave();
      total += weight * solution.value;
    }
    put<S>(call.losses, i, weight * solution.value);
    put<S>(call.target_mass, i, solution.target_mass);
    put<S>(call.input_mass, i, solution.input_mass);
    put<S>(call.rest, i, rest.largest);
    put<S>(call.rest, call.positions + i, rest.sum);
  }
  return total;
}

template <class V, class T>
void backward(const TopKCall& call, int64_t begin, int64_t end) {
  using S = Scalar<V>;
  const S inverse_temperature = S(1 / call.temperature);
  const S* const rests = static_cast<const S*>(call.rest);
  Position<V, T> position(call);
  for (int64_t i = begin; i < end; ++i) {
    const double scale =
        double(static_cast<const S*>(call.grad_output)[i * call.grad_stride]) * position.weight(i) * call.normalizer;
    const bool counts = position.weight(i) != 0;
    const Rest rest{double(rests[i]), double(rests[call.positions + i])};
    Solution solution{0, 0, 0, 0};
    bool accepted = true;
    if (counts) {
      accepted = position.enter(i);
      if (accepted) solution = solve<true>(call, position.outcomes(), rest);
      position.leave();
    }
    const double* const by_logit = reinterpret_cast<const double*>(position.outcomes().logit);
    const double* const by_value = reinterpret_cast<const double*>(position.outcomes().log_p);
    constexpr double nan = std::numeric_limits<double>::quiet_NaN();
    if (call.grad_values != nullptr) {
      S* const grad_values = static_cast<S*>(call.grad_values) + i * call.listed;
      for (int64_t k = 0; k < call.listed; ++k) {
        const bool given = counts && !position.is_padding(k);
        grad_values[k] = !accepted ? S(nan) : given ? S(by_value[k] * scale) : S(0);
      }
    }
    if (call.grad_input.data == nullptr) continue;
    T* const destination = static_cast<T*>(call.grad_input.data) + call.offset_of(call.grad_input, i);
    const int64_t stride = call.grad_input.class_stride;
    // Where they have no gradient, the unlisted logits must not matter, even if their sum is NaN.
    const bool outside = rest.sum != 0 && solution.outside != 0;
    double factor = outside ? solution.outside * scale / call.temperature / rest.sum : 0;
    if (!accepted) factor = nan;
    write_rest(position.row(), S(rest.largest), inverse_temperature, S(factor), destination, stride);
    for (int64_t k = 0; k < call.listed && counts && accepted; ++k) {
      if (position.is_padding(k)) continue;
      store<S>(destination + position.index(k) * stride, S(by_logit[k] * scale / call.temperature));
    }
  }
}

// Calls body(V(), T()) with the vectors to compute in and the type of the logits.
template <class Body>
KDKERNELS_INLINE void with_types(const TopKCall& call, const Body& body) {
  with_storage(call.input.storage, [&](auto type) {
    if (call.is_double) {
      body(Doubles(), type);
    } else if constexpr (!std::is_same_v<decltype(type), double>) {
      body(Vector<float, KDKERNELS_VECTOR_BYTES>(), type);
    }
  });
}

}  // namespace topk

double topk_forward(const TopKCall& call, int64_t begin, int64_t end, int64_t* refused) {
  double total = 0;
  topk::with_types(call, [&](auto vector, auto type) {
    total = topk::forward<decltype(vector), decltype(type)>(call, begin, end, refused);
  });
  return total;
}

void topk_backward(const TopKCall& call, int64_t begin, int64_t end) {
  topk::with_types(call,
                   [&](auto vector, auto type) { topk::backward<decltype(vector), decltype(type)>(call, begin, end); });
}

}  // namespace kdkernels::cpu::KDKERNELS_CAPABILITY
