// A position of the softmax divergences as its threads see it: where its logits lie, how they are read, and what is
// known of them after they were read once.
#pragma once

#include "core/cuda/reduce.cuh"
#include "softmax_divergence/cuda_classes.cuh"

namespace kdkernels::cuda {

// The logits of one side of a position, or its gradients
struct Side {
  char* data = nullptr;
  Storage storage = Storage::float32;
  int64_t stride = 0;  // between classes
  bool packs = false;  // whether packs of classes are aligned
};

__device__ __forceinline__ Side choose(bool first, Side a, Side b) {
  return {first ? a.data : b.data, first ? a.storage : b.storage, first ? a.stride : b.stride,
          first ? a.packs : b.packs};
}

// The sides of a position, and the classes that a thread takes: every group_threads-th pack of `unit` classes. The
// first pack begins where memory is aligned, `shift` numbers before the first class.
template <class N, Group group>
struct Position {
  static constexpr int unit = group == Group::thread ? 1 : N::plain ? 8 : 4;
  Side side[operands];
  int64_t classes;
  int shift = 0;

  __device__ __forceinline__ Position(const SoftmaxCall& call, int64_t position) : classes(call.classes) {
    int64_t offset[operands], run = position / call.inner;
#pragma unroll
    for (int o = 0; o < operands; ++o) offset[o] = position % call.inner * call.operand[o].inner_stride;
    for (int d = call.outer_dims - 1; d >= 0; --d) {
      const int64_t index = run % call.outer_size[d];
      run /= call.outer_size[d];
#pragma unroll
      for (int o = 0; o < operands; ++o) offset[o] += index * call.operand[o].outer_stride[d];
    }
#pragma unroll
    for (int o = 0; o < operands; ++o) {
      const auto& operand = call.operand[o];
      const int64_t size = size_of(operand.storage);
      side[o] = {static_cast<char*>(operand.data) + offset[o] * size, operand.storage, operand.class_stride, false};
      if constexpr (unit > 1) {
        if (o == student && operand.class_stride == 1) {
          shift = int(reinterpret_cast<uintptr_t>(side[o].data) / size % unit);
        }
        const uintptr_t start = reinterpret_cast<uintptr_t>(side[o].data) - shift * size;
        side[o].packs = operand.class_stride == 1 && start % (size * unit < 16 ? size * unit : 16) == 0;
      }
    }
  }

  // Calls body(c) for every pack of the thread. A pack may begin before the first class, and reach past the last one.
  template <class Body>
  __device__ __forceinline__ void for_each_pack(int64_t slice, int64_t slices, const Body& body) const {
    const int64_t step = int64_t(group_threads<group>()) * unit;
    for (int64_t c = slice * step + thread_in_group<group>() * unit - shift; c < classes; c += slices * step) body(c);
  }
  __device__ __forceinline__ bool has(int64_t c) const { return c >= 0 && c < classes; }
};

// Calls body(Type<T>()) with the type that logits are stored as; plain formulas are for 16-bit storage only.
template <class N, class Body>
__device__ __forceinline__ decltype(auto) with_logits(Storage storage, const Body& body) {
  if constexpr (N::plain) {
    if (storage == Storage::float16) return body(Type<__half>());
    return body(Type<__nv_bfloat16>());
  } else {
    return with_storage(storage, body);
  }
}

template <class N, class S = typename N::S>
__device__ __forceinline__ S read_one(const Side& side, int64_t c) {
  return with_logits<N>(side.storage, [&](auto type) {
    using T = typename decltype(type)::type;
    return to_compute<S>(reinterpret_cast<const T*>(side.data)[c * side.stride]);
  });
}

// Reads the pack from class c on, with -inf in place of what is not a class, and copies it to `kept` if that has
// memory.
template <class N, int unit, class S>
__device__ __forceinline__ void read_pack(Side side, int64_t c, int64_t classes, Side kept, S (&numbers)[unit]) {
  with_logits<N>(side.storage, [&](auto type) {
    using T = typename decltype(type)::type;
    const T* const source = reinterpret_cast<const T*>(side.data);
    T stored[unit];
    if constexpr (unit > 1) {
      const bool whole = c >= 0 && c + unit <= classes;
      if (side.packs && whole) {
        const auto pack = Pack<unit, T>::load(source + c);
#pragma unroll
        for (int k = 0; k < unit; ++k) stored[k] = pack.values[k];
      } else {
#pragma unroll
        for (int k = 0; k < unit; ++k) {
          stored[k] = c + k >= 0 && c + k < classes ? source[(c + k) * side.stride] : to_stored<T>(S(0));
        }
      }
      if (kept.data != nullptr) {
        Pack<unit, T> pack;
#pragma unroll
        for (int k = 0; k < unit; ++k) pack.values[k] = stored[k];
        pack.store(reinterpret_cast<T*>(kept.data) + c);
      }
    } else {
      stored[0] = source[c * side.stride];
      if (kept.data != nullptr) reinterpret_cast<T*>(kept.data)[c * kept.stride] = stored[0];
    }
#pragma unroll
    for (int k = 0; k < unit; ++k) {
      numbers[k] = c + k >= 0 && c + k < classes ? to_compute<S>(stored[k]) : -math::infinity<S>;
    }
  });
}

template <class N, int unit, class S>
__device__ __forceinline__ void write_pack(const Side& side, int64_t c, int64_t classes, const S (&numbers)[unit]) {
  with_logits<N>(side.storage, [&](auto type) {
    using T = typename decltype(type)::type;
    T* const destination = reinterpret_cast<T*>(side.data);
    if constexpr (unit > 1) {
      if (side.packs && c >= 0 && c + unit <= classes) {
        Pack<unit, T> pack;
#pragma unroll
        for (int k = 0; k < unit; ++k) pack.values[k] = to_stored<T>(numbers[k]);
        return pack.store(destination + c);
      }
    }
#pragma unroll
    for (int k = 0; k < unit; ++k) {
      if (c + k >= 0 && c + k < classes) destination[(c + k) * side.stride] = to_stored<T>(numbers[k]);
    }
  });
}

// A logit, and the other side's logit of the same class
template <class S>
struct Likeliest {
  S logit = -math::infinity<S>, other = 0;
};
struct Likelier {
  template <class S>
  __device__ __forceinline__ Likeliest<S> operator()(const Likeliest<S>& a, const Likeliest<S>& b) const {
    return a.logit > b.logit || (a.logit == b.logit && a.other > b.other) ? a : b;
  }
};

// The largest of the logits read so far, the sum of e^((x - largest) / T), and the sum of e^(x - largest) without the
// label, in two levels as in Sums
template <class N>
struct OnlineSums {
  using S = typename N::S;
  Likeliest<S> largest;
  S sum = 0, others = 0, part = 0, others_part = 0;
  int terms = 0;

  __device__ __forceinline__ void close_part() {
    sum += part;
    others += others_part;
    part = others_part = 0;
    terms = 0;
  }
  __device__ __forceinline__ void move(const Likeliest<S>& to, S inverse_temperature, bool labels) {
    const S shift = largest.logit - to.logit;
    const S factor = power_of_e<N>(shift * inverse_temperature);
    sum *= factor;
    part *= factor;
    if (labels) {
      const S hard_factor = power_of_e<N>(shift);
      others *= hard_factor;
      others_part *= hard_factor;
    }
    largest = to;
  }
  // `label` is the place of the label in the pack.
  template <int unit>
  __device__ __forceinline__ void add(const S (&x)[unit], const S (&other)[unit], S inverse_temperature, bool labels,
                                      int64_t label) {
    Likeliest<S> now = largest;
#pragma unroll
    for (int k = 0; k < unit; ++k) {
      if constexpr (N::plain) {
        now.logit = fmaxf(now.logit, x[k]);  // NaN comes back with the sum
      } else if (!(x[k] <= now.logit)) {
        now = {x[k], other[k]};
      }
    }
    if (now.logit == -math::infinity<S>) return;  // only -inf so far, which has no mass
    if (now.logit != largest.logit) move(now, inverse_temperature, labels);
#pragma unroll
    for (int k = 0; k < unit; ++k) {
      part += numerator<N>(x[k], now.logit, inverse_temperature);
      if (labels && k != label) others_part += power_of_e<N>(x[k] - now.logit);
    }
    terms += unit;
    if (terms >= Sums<S>::terms_of_part) close_part();
  }
};

template <class S>
struct Scalars {
  double divergence_weight, label_weight, beta, temperature;
  S inverse_temperature;
  bool divergence, labels;  // which terms the loss has

  __device__ __forceinline__ explicit Scalars(const SoftmaxCall& call)
      : divergence_weight(call.divergence_weight.read()),
        label_weight(call.label_weight.read()),
        beta(call.beta.read()),
        divergence(divergence_weight != 0),
        labels(call.labels != nullptr && label_weight != 0) {
    temperature = call.temperature.read();
    if (!(temperature > 0 && temperature < double(INFINITY))) temperature = double(NAN);
    inverse_temperature = S(1 / temperature);
  }
};

// Whether a label is neither a class nor ignored
__device__ __forceinline__ bool misplaced(const SoftmaxCall& call, int64_t label) {
  return call.labels != nullptr && (label < 0 || label >= call.classes);
}

template <class S>
__device__ __forceinline__ S* statistic(const SoftmaxCall& call, Statistic which, int64_t position) {
  return static_cast<S*>(call.statistics) + which * (call.positions + 1) + position;
}

// The place where a forward leaves the number of positions that count
template <class S>
__device__ __forceinline__ S* kept_positions(const SoftmaxCall& call) {
  return statistic<S>(call, student_max, call.positions);
}

}  // namespace kdkernels::cuda
