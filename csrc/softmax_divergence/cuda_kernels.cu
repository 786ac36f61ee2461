// Divergences between softmax distributions: a thread, a warp or a block takes a position, by the number of classes.
//
// The forward reads the logits once for the maxima and sums of both softmaxes and goes over them again for the
// divergence: on chip where they fit into shared memory. A thread reads there only the classes that it wrote itself, so
// no barrier is needed in between. The backward has the sums from the forward and is one pass.
#include "softmax_divergence/cuda_classes.cuh"
#include "softmax_divergence/cuda_position.cuh"

namespace kdkernels::cuda {
namespace {

template <Group group, class S>
constexpr unsigned most_threads = group == Group::thread                   ? 128
                                  : group == Group::warp || sizeof(S) == 8 ? 256
                                                                           : 512;

// The loss of a position, in every thread of its group. kept_s and kept_t have room for the logits of the position in
// shared memory, or no memory.
template <class N, Group group, Divergence divergence>
__device__ double position_loss(const SoftmaxCall& call, const Scalars<typename N::S>& scalars, int64_t at,
                                int64_t label, Side kept_s, Side kept_t) {
  using S = typename N::S;
  constexpr int unit = Position<N, group>::unit;
  const Position<N, group> position(call, at);
  const bool resident = kept_s.data != nullptr;
  // Packs are aligned in shared memory too.
  kept_s.data += resident ? position.shift * size_of(kept_s.storage) : 0;
  kept_t.data += resident ? position.shift * size_of(kept_t.storage) : 0;

  OnlineSums<N> online_s, online_t;
  position.for_each_pack(0, 1, [&](int64_t c) {
    S s[unit], t[unit];
    read_pack<N>(position.side[student], c, position.classes, kept_s, s);
    read_pack<N>(position.side[teacher], c, position.classes, kept_t, t);
    online_s.add(s, t, scalars.inverse_temperature, scalars.labels, label - c);
    online_t.add(t, s, scalars.inverse_temperature, false, 0);
  });
  Likeliest<S> likeliest[2] = {online_s.largest, online_t.largest};
  reduce<group>(likeliest, Likelier());
  online_s.close_part();
  online_t.close_part();
  online_s.move(likeliest[student], scalars.inverse_temperature, scalars.labels);
  online_t.move(likeliest[teacher], scalars.inverse_temperature, false);
  S totals[3] = {online_s.sum, online_t.sum, online_s.others};
  reduce<group>(totals, Add());
  const S max_s = likeliest[student].logit, max_t = likeliest[teacher].logit;

  double loss = 0;
  Centers<S> centers;
  if (scalars.divergence) {
    const Softmaxes<N, divergence> softmaxes(scalars.inverse_temperature, max_s, max_t, totals[0], totals[1]);
    const Side from_s = choose(resident, kept_s, position.side[student]);
    const Side from_t = choose(resident, kept_t, position.side[teacher]);
    with_formula<N, divergence>(call.reverse, scalars.beta, [&](const auto& formula) {
      if constexpr (!N::plain) {
        centers.pivot = {formula.derivatives(softmaxes.at(max_s, likeliest[student].other)).student,
                         formula.derivatives(softmaxes.at(likeliest[teacher].other, max_t)).teacher};
      }
      Sums<S> sums;
      position.for_each_pack(0, 1, [&](int64_t c) {
        S s[unit], t[unit];
        read_pack<N>(from_s, c, position.classes, Side(), s);
        read_pack<N>(from_t, c, position.classes, Side(), t);
#pragma unroll
        for (int k = 0; k < unit; ++k) {
          if (position.has(c + k)) formula.add(softmaxes.at(s[k], t[k]), centers.pivot, sums);
        }
        sums.terms += unit;
        if (sums.terms >= Sums<S>::terms_of_part) sums.close_part();
      });
      sums.close_part();
      reduce<group>(sums.of, Add());
      loss = scalars.divergence_weight * double(formula.value(sums));
      centers.rest = formula.rests(sums);
    });
  }
  if (scalars.labels) {
    const S label_logit = misplaced(call, label) ? S(NAN) : read_one<N>(position.side[student], label);
    loss += scalars.label_weight * double(CrossEntropy<N>(label_logit, max_s, totals[2]).value());
  }
  if (misplaced(call, label)) loss = double(NAN);
  if (call.statistics != nullptr && thread_in_group<group>() == 0) {
    const auto save = [&](Statistic which, S number) { *statistic<S>(call, which, at) = number; };
    save(student_max, max_s);
    save(teacher_max, max_t);
    save(student_sum, totals[0]);
    save(teacher_sum, totals[1]);
    if (scalars.labels) save(other_labels_sum, totals[2]);
    save(student_rest, centers.rest.student);
    save(teacher_rest, centers.rest.teacher);
    if constexpr (!N::plain) {
      save(student_pivot, centers.pivot.student);
      save(teacher_pivot, centers.pivot.teacher);
    }
  }
  return loss;
}

template <class N, Group group, Divergence divergence>
__global__ void __launch_bounds__(most_threads<group, typename N::S>, 1)
    forward(const SoftmaxCall call, const SoftmaxPlan plan) {
  using S = typename N::S;
  KDKERNELS_DYNAMIC_SHARED(shared);
  const Scalars<S> scalars(call);
  const int64_t here = group_in_block<group>();
  const auto room = [&](OperandIndex o, int64_t numbers_before) {
    if (plan.shared_bytes == 0) return Side();
    const int64_t first = group == Group::thread ? here : here * plan.row;
    const int64_t bytes = numbers_before * size_of(call.operand[student].storage);
    return Side{reinterpret_cast<char*>(shared) + bytes + first * size_of(call.operand[o].storage),
                call.operand[o].storage, group == Group::thread ? int64_t(blockDim.x) : 1, true};
  };
  const Side kept_s = room(student, 0), kept_t = room(teacher, plan.row * plan.positions);
  double totals[1] = {0};
  int64_t kept[1] = {0};
  for (int64_t first = blockIdx.x * plan.positions; first < call.positions; first += gridDim.x * plan.positions) {
    const int64_t at = first + here;
    if (at >= call.positions) continue;
    const int64_t label = call.labels == nullptr ? -1 : call.labels[at];
    const bool ignored = call.labels != nullptr && label == call.ignored_label;
    const double loss = ignored ? 0 : position_loss<N, group, divergence>(call, scalars, at, label, kept_s, kept_t);
    if (thread_in_group<group>() != 0) continue;
    if (call.loss_stride != 0) static_cast<S*>(call.loss)[at] = S(loss);
    totals[0] += loss;
    kept[0] += !ignored;
  }
  reduce_block(totals, Add());
  reduce_block(kept, Add());
  if (threadIdx.x == 0) {
    call.partial[blockIdx.x] = totals[0];
    if (call.kept != nullptr) call.kept[blockIdx.x] = kept[0];
  }
}

// The sum of partial results, in every thread of the block
template <class V>
__device__ __forceinline__ V sum_of(const V* partial, int64_t count) {
  V total[1] = {0};
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) total[0] += partial[i];
  reduce_block(total, Add());
  return total[0];
}

template <class S>
__global__ void __launch_bounds__(256, 1) finish(const SoftmaxCall call, unsigned parts) {
  const double total = sum_of(call.partial, parts);
  const double divisor = call.divide_by_kept ? double(sum_of(call.kept, parts)) : call.divisor;
  if (threadIdx.x != 0) return;
  *static_cast<S*>(call.loss) = S(total * math::inverse(divisor));
  if (call.statistics != nullptr && call.divide_by_kept) *kept_positions<S>(call) = S(divisor);
}

template <class N, Group group, Divergence divergence>
__device__ void position_gradients(const SoftmaxCall& call, const Scalars<typename N::S>& scalars,
                                   const SoftmaxPlan& plan, int64_t at, int64_t label, double scale) {
  using S = typename N::S;
  constexpr int unit = Position<N, group>::unit;
  const Position<N, group> position(call, at);
  const bool want_student = call.operand[student_gradient].data != nullptr;
  const bool want_teacher = call.operand[teacher_gradient].data != nullptr;
  const bool ignored = call.labels != nullptr && label == call.ignored_label, bad = !ignored && misplaced(call, label);
  const auto write = [&](int64_t c, const S(&by_student)[unit], const S(&by_teacher)[unit]) {
    if (want_student) write_pack<N>(position.side[student_gradient], c, position.classes, by_student);
    if (want_teacher) write_pack<N>(position.side[teacher_gradient], c, position.classes, by_teacher);
  };
  if (ignored || bad) {
    S constant[unit];
    for (S& number : constant) number = bad ? S(NAN) : S(0);
    return position.for_each_pack(blockIdx.y, plan.slices, [&](int64_t c) { write(c, constant, constant); });
  }
  const auto saved = [&](Statistic which) { return *statistic<S>(call, which, at); };
  const S max_s = saved(student_max);
  const Softmaxes<N, divergence> softmaxes(scalars.inverse_temperature, max_s, saved(teacher_max), saved(student_sum),
                                           saved(teacher_sum));
  // With few classes, reading a number that is not needed would cost as much as reading a logit.
  const auto if_wanted = [&](bool wanted, Statistic which) { return wanted ? saved(which) : S(0); };
  const Centers<S> centers{
      {if_wanted(want_student && !N::plain, student_pivot), if_wanted(want_teacher && !N::plain, teacher_pivot)},
      {if_wanted(want_student, student_rest), if_wanted(want_teacher, teacher_rest)}};
  const CrossEntropy<N> cross_entropy(scalars.labels ? read_one<N>(position.side[student], label) : max_s, max_s,
                                      if_wanted(scalars.labels, other_labels_sum));
  const S soft_scale = S(scalars.divergence_weight * scale / scalars.temperature);
  const S hard_scale = S(scalars.label_weight * scale);
  with_formula<N, divergence>(call.reverse, scalars.beta, [&](const auto& formula) {
    position.for_each_pack(blockIdx.y, plan.slices, [&](int64_t c) {
      S s[unit], t[unit], by_student[unit], by_teacher[unit];
      read_pack<N>(position.side[student], c, position.classes, Side(), s);
      if (scalars.divergence) read_pack<N>(position.side[teacher], c, position.classes, Side(), t);
#pragma unroll
      for (int k = 0; k < unit; ++k) {
        by_student[k] = by_teacher[k] = 0;
        if (scalars.divergence) {
          // Most often only the gradient of one side is wanted, and the work for the other is left out.
          const Pair<S> pair = softmaxes.at(s[k], t[k]);
          if (want_student) by_student[k] = formula.gradients(pair, centers).student * soft_scale;
          if (want_teacher) by_teacher[k] = formula.gradients(pair, centers).teacher * soft_scale;
        }
        if (scalars.labels) by_student[k] += cross_entropy.gradient(s[k], max_s, c + k == label) * hard_scale;
      }
      write(c, by_student, by_teacher);
    });
  });
}

template <class N, Group group, Divergence divergence>
__global__ void __launch_bounds__(most_threads<group, typename N::S>, 1)
    backward(const SoftmaxCall call, const SoftmaxPlan plan) {
  using S = typename N::S;
  const Scalars<S> scalars(call);
  const double scale = math::inverse(call.divide_by_kept ? double(*kept_positions<S>(call)) : call.divisor);
  const S* const grad_output = static_cast<const S*>(call.grad_output);
  for (int64_t first = blockIdx.x * plan.positions; first < call.positions; first += gridDim.x * plan.positions) {
    const int64_t at = first + group_in_block<group>();
    if (at >= call.positions) continue;
    const int64_t label = call.labels == nullptr ? -1 : call.labels[at];
    position_gradients<N, group, divergence>(call, scalars, plan, at, label,
                                             scale * double(grad_output[at * call.grad_stride]));
  }
}

// Calls body(precision, group, divergence), each a compile-time constant.
template <class N, Group group, class Body>
cudaError_t with_divergence(Divergence divergence, const Body& body) {
  using G = std::integral_constant<Group, group>;
  switch (divergence) {
    case Divergence::kl:
      return body(N(), G(), std::integral_constant<Divergence, Divergence::kl>());
    case Divergence::js:
      return body(N(), G(), std::integral_constant<Divergence, Divergence::js>());
    default:
      return body(N(), G(), std::integral_constant<Divergence, Divergence::clamped_js>());
  }
}
template <class N, class Body>
cudaError_t with_group(const SoftmaxCall& call, const SoftmaxPlan& plan, const Body& body) {
  switch (plan.threads) {
    case SoftmaxPlan::Threads::one:
      return with_divergence<N, Group::thread>(call.divergence, body);
    case SoftmaxPlan::Threads::warp:
      return with_divergence<N, Group::warp>(call.divergence, body);
    default:
      return with_divergence<N, Group::block>(call.divergence, body);
  }
}
template <class Body>
cudaError_t with_variant(const SoftmaxCall& call, const SoftmaxPlan& plan, const Body& body) {
  if (call.is_double) return with_group<Exact64>(call, plan, body);
  return call.is_plain() ? with_group<Plain32>(call, plan, body) : with_group<Exact32>(call, plan, body);
}

}  // namespace

SoftmaxPlan plan_softmax(const SoftmaxCall& call, bool backward, int64_t most_shared_bytes) {
  constexpr int64_t few_classes = 32, warp_classes = 1024;
  SoftmaxPlan plan;
  const auto& input = call.operand[student];
  const int64_t sizes = size_of(input.storage) + size_of(call.operand[teacher].storage);
  // As in the CPU kernels: a thread per position where classes are few, or where positions are contiguous.
  if (call.classes <= few_classes || (input.class_stride != 1 && input.inner_stride == 1)) {
    plan.threads = SoftmaxPlan::Threads::one;
    plan.row = call.classes;
    // Fewer threads where the logits of more would not fit
    constexpr int64_t comfortable = 48 << 10;
    plan.block = 128;
    while (!backward && plan.block > 32 && plan.row * sizes * plan.block > comfortable) plan.block /= 2;
    plan.positions = plan.block;
  } else {
    plan.row = ceil_div(call.classes + 7, 8) * 8;
    plan.threads = call.classes <= warp_classes ? SoftmaxPlan::Threads::warp : SoftmaxPlan::Threads::block;
    plan.block = call.classes <= warp_classes             ? 256
                 : call.classes <= 2048                   ? 128
                 : call.classes <= 8192 || call.is_double ? 256
                                                          : 512;
    plan.positions = plan.threads == SoftmaxPlan::Threads::warp ? plan.block / warp_threads : 1;
  }
  const int64_t bytes = plan.row * plan.positions * sizes;
  if (!backward && bytes <= most_shared_bytes) plan.shared_bytes = size_t(bytes);
  if (!backward && plan.shared_bytes == 0 && plan.threads == SoftmaxPlan::Threads::one) {
    plan.block = 128;
    plan.positions = plan.block;
  }
  plan.grid = blocks_for(ceil_div(call.positions, plan.positions));
  if (backward && plan.threads == SoftmaxPlan::Threads::block) {
    // Without a reduction, blocks can share the classes of a position: a few packs per thread.
    plan.slices = unsigned(ceil_div(call.classes, int64_t(plan.block) * 16));
  }
  return plan;
}

cudaError_t launch_softmax_forward(const SoftmaxCall& call, const SoftmaxPlan& plan, cudaStream_t stream) {
  const cudaError_t error = with_variant(call, plan, [&](auto precision, auto group, auto divergence) {
    using N = decltype(precision);
    return launch(forward<N, group(), divergence()>, plan.grid, plan.block, plan.shared_bytes, stream, call, plan);
  });
  if (error != cudaSuccess || call.loss_stride != 0) return error;
  return launch(call.is_double ? finish<double> : finish<float>, 1, 256, 0, stream, call, plan.grid);
}

cudaError_t launch_softmax_backward(const SoftmaxCall& call, const SoftmaxPlan& plan, cudaStream_t stream) {
  return with_variant(call, plan, [&](auto precision, auto group, auto divergence) {
    using N = decltype(precision);
    return launch(backward<N, group(), divergence()>, dim3(plan.grid, plan.slices), plan.block, 0, stream, call, plan);
  });
}

}  // namespace kdkernels::cuda
