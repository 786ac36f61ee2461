// Image priors: all sums over the differences of neighbouring pixels in one read, all gradients in one more.
//
// A thread takes a pack of neighbouring numbers and walks down some rows of the image; the rows around the current one
// stay in registers, so that each is read once.
#include "core/cuda/reduce.cuh"
#include "total_variation/cuda_strip.cuh"
#include "total_variation/math.h"

namespace kdkernels::cuda {
namespace {

constexpr unsigned threads = 256;

enum { absolute_sums, square_sums = 4, pixel_sum = 8, isotropic_sum, difference_sums };

template <class S>
__device__ __forceinline__ math::IsotropicTerm<S> isotropic_term(S pixel, S right, bool has_right, S below,
                                                                 bool has_below, S eps) {
  return {has_right ? pixel - right : S(0), has_below ? pixel - below : S(0), has_right || has_below, eps};
}

template <Variation variation, class T, int pack, class S>
__device__ __forceinline__ void add_terms(const Strip<T>& strip, const Window<S, pack>& here,
                                          const Window<S, pack>& below, bool has_below, S (&sums)[difference_sums]) {
  const ImageCall& call = strip.call;
  const bool down = has_below && call.directions >= 2, diagonal = has_below && call.directions == 4;
#pragma unroll
  for (int k = 0; k < pack; ++k) {
    const bool inside = strip.inside(k), has_right = strip.has_right(k);
    if constexpr (variation == Variation::isotropic) {
      sums[isotropic_sum] +=
          isotropic_term(here.here[k], here.right[k], has_right, below.here[k], has_below && inside, S(call.eps))
              .length;
    } else {
      const math::Differences<S> d(here.here[k], here.right[k], below.here[k], below.right[k]);
      const auto add = [&](int direction, S difference, bool is_pair) {
        const S present = is_pair ? difference : S(0);
        if (call.uses_absolute()) sums[absolute_sums + direction] += math::absolute(present);
        if (call.uses_squares()) sums[square_sums + direction] += present * present;
      };
      add(0, d.right, has_right);
      add(1, d.down, down && inside);
      add(2, d.rising, diagonal && has_right);
      add(3, d.falling, diagonal && has_right);
      if (call.uses_pixels())
        sums[pixel_sum] += here.here[k] * here.here[k];  // there are zeros past the end of the row
    }
  }
}

template <class T, bool adjacent, Variation variation>
__global__ void __launch_bounds__(threads, 1) sum_differences(const ImageCall call, const ImagePlan plan) {
  using S = Compute<T>;
  constexpr int pack = pack_of<T>;
  for (int64_t item = blockIdx.x; item < call.images * plan.items_of_image(call); item += gridDim.x) {
    const Strip<T> strip(call, plan, item);
    S sums[difference_sums] = {};
    Window<S, pack> here, below = {};
    if (strip.first < strip.last) strip.template load<adjacent>(strip.first, below);
    for (int64_t row = strip.first; row < strip.last; ++row) {
      here = below;
      const bool has_below = row + 1 < call.rows;
      if (has_below) strip.template load<adjacent>(row + 1, below);
      add_terms<variation>(strip, here, below, has_below, sums);
    }
    double totals[difference_sums];
#pragma unroll
    for (int k = 0; k < difference_sums; ++k) totals[k] = double(sums[k]);
    reduce_block(totals, Add());
    if (threadIdx.x == 0) {
      DifferenceSums& out = call.partial[item];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        out.absolute[k] = totals[absolute_sums + k];
        out.squares[k] = totals[square_sums + k];
      }
      out.pixels = totals[pixel_sum];
      out.isotropic = totals[isotropic_sum];
    }
  }
}

struct AddSums {
  __device__ __forceinline__ DifferenceSums operator()(DifferenceSums a, const DifferenceSums& b) const {
    a.add(b);
    return a;
  }
};

// A block adds up the items of an image.
__global__ void __launch_bounds__(threads, 1) sum_images(const ImageCall call, int64_t items) {
  for (int64_t image = blockIdx.x; image < call.images; image += gridDim.x) {
    DifferenceSums total[1] = {};
    for (int64_t i = threadIdx.x; i < items; i += blockDim.x) total[0].add(call.partial[image * items + i]);
    reduce_block(total, AddSums());
    if (threadIdx.x == 0) call.by_image[image] = total[0];
  }
}

// One block turns the sums of all images into the losses.
template <class S>
__global__ void __launch_bounds__(threads, 1) finish_priors(const ImageCall call) {
  S* const norms = static_cast<S*>(call.norms);
  DifferenceSums batch[1] = {};
  double norm_sum[1] = {0};
  for (int64_t image = threadIdx.x; image < call.images; image += blockDim.x) {
    const DifferenceSums& sums = call.by_image[image];
    batch[0].add(sums);
    const double norm = sqrt(sums.pixels);
    norms[4 + image] = S(norm);
    norm_sum[0] += norm;
  }
  reduce_block(batch, AddSums());
  reduce_block(norm_sum, Add());
  if (threadIdx.x != 0) return;
  double tv_l1 = 0, tv_l2 = 0;
  for (int k = 0; k < 4; ++k) {
    tv_l1 += batch[0].absolute[k] * call.weight[k];
    const double norm = sqrt(batch[0].squares[k]);
    tv_l2 += norm;
    norms[k] = S(norm);
  }
  *static_cast<S*>(call.tv_l1) = S(tv_l1);
  *static_cast<S*>(call.tv_l2) = S(tv_l2);
  *static_cast<S*>(call.l2) = S(call.images > 0 ? norm_sum[0] / double(call.images) : 0);
}

template <class S>
__global__ void __launch_bounds__(threads, 1) finish_variation(const ImageCall call) {
  double total[1] = {0};
  for (int64_t image = threadIdx.x; image < call.images; image += blockDim.x) {
    const double value = call.by_image[image].variation(call.losses, call.directions, call.weight);
    if (call.norms != nullptr) static_cast<S*>(call.norms)[image] = S(value);
    if (call.loss_by_image) static_cast<S*>(call.tv_l1)[image] = S(value);
    total[0] += value;
  }
  reduce_block(total, Add());
  if (threadIdx.x != 0 || call.loss_by_image) return;
  const double divisor = call.average_images && call.images > 0 ? double(call.images) : 1;
  *static_cast<S*>(call.tv_l1) = S(total[0] / divisor);
}

template <class S>
__device__ __forceinline__ math::DifferenceCoefficients<S> coefficients_of(const ImageCall& call, int64_t image) {
  const auto number = [](const void* numbers, int64_t i) {
    return numbers == nullptr ? 0.0 : double(static_cast<const S*>(numbers)[i]);
  };
  const auto norm = [&](int64_t i) { return number(call.given_norms, i); };
  math::DifferenceCoefficients<S> coefficients;
  if (call.losses == Losses::priors) {
    coefficients.set_priors(number(call.grad_l1, 0), number(call.grad_l2, 0), number(call.grad_norm, 0), call.weight,
                            norm, norm(4 + image), double(call.images));
    return coefficients;
  }
  double scale = number(call.grad_l1, call.loss_by_image ? image : 0);
  if (call.average_images) scale /= double(call.images);
  if (call.losses == Losses::l2) scale *= math::inverse(norm(image));
  coefficients.set_variation(call.losses, scale, call.weight);
  return coefficients;
}

// The derivatives by the pixels of a pack, from their differences to the eight neighbours
template <Variation variation, class T, int pack, class S>
__device__ __forceinline__ void differentiate(const Strip<T>& strip, const math::DifferenceCoefficients<S>& by,
                                              bool has_above, bool has_below, const Window<S, pack>& above,
                                              const Window<S, pack>& here, const Window<S, pack>& below,
                                              S (&gradient)[pack]) {
  const ImageCall& call = strip.call;
  const bool vertical = call.directions >= 2, diagonal = call.directions == 4;
  const bool want_absolute = call.uses_absolute(), want_squares = call.uses_squares();
#pragma unroll
  for (int k = 0; k < pack; ++k) {
    const bool left = strip.has_left(k), right = strip.has_right(k), inside = strip.inside(k);
    const S pixel = here.here[k];
    if constexpr (variation == Variation::isotropic) {
      // A pixel takes part in its own term and in those of its left and upper neighbours.
      const S eps = S(call.eps);
      const auto own = isotropic_term(pixel, here.right[k], right, below.here[k], has_below, eps);
      const auto of_left = isotropic_term(here.left[k], pixel, left, below.left[k], has_below, eps);
      const auto of_upper = isotropic_term(above.here[k], above.right[k], right, pixel, has_above, eps);
      gradient[k] = own.slope(own.dx) + own.slope(own.dy);
      if (left) gradient[k] -= of_left.slope(of_left.dx);
      if (has_above) gradient[k] -= of_upper.slope(of_upper.dy);
      gradient[k] *= by.linear[0];
    } else {
      S sum = call.uses_pixels() ? pixel * by.pixel : S(0);
      const auto add = [&](int direction, S neighbour, bool is_pair) {
        const S difference = pixel - neighbour;
        S slope = want_squares ? difference * by.linear[direction] : S(0);
        if (want_absolute && !want_squares) slope = math::sign(difference) * by.absolute[direction];
        if (want_absolute && want_squares) {
          slope = math::difference_gradient(difference, by.linear[direction], by.absolute[direction]);
        }
        sum += is_pair ? slope : S(0);
      };
      add(0, here.right[k], right);
      add(0, here.left[k], left);
      add(1, below.here[k], vertical && has_below && inside);
      add(1, above.here[k], vertical && has_above && inside);
      add(2, above.right[k], diagonal && has_above && right);
      add(2, below.left[k], diagonal && has_below && left);
      add(3, below.right[k], diagonal && has_below && right);
      add(3, above.left[k], diagonal && has_above && left);
      gradient[k] = sum;
    }
  }
}

template <class T, bool adjacent, Variation variation>
__global__ void __launch_bounds__(threads, 1) difference_gradients(const ImageCall call, const ImagePlan plan) {
  using S = Compute<T>;
  constexpr int pack = pack_of<T>;
  for (int64_t item = blockIdx.x; item < call.images * plan.items_of_image(call); item += gridDim.x) {
    const Strip<T> strip(call, plan, item);
    if (strip.first >= strip.last) continue;
    const auto coefficients = coefficients_of<S>(call, strip.image);
    Window<S, pack> above = {}, here = {}, below = {};
    if (strip.first > 0) strip.template load<adjacent>(strip.first - 1, here);
    strip.template load<adjacent>(strip.first, below);
    for (int64_t row = strip.first; row < strip.last; ++row) {
      above = here;
      here = below;
      const bool has_below = row + 1 < call.rows;
      if (has_below) strip.template load<adjacent>(row + 1, below);
      S gradient[pack];
      differentiate<variation>(strip, coefficients, row > 0, has_below, above, here, below, gradient);
      T* const destination = static_cast<T*>(call.output.data) + strip.image * call.output.image_stride +
                             strip.plane * call.output.plane_stride + row * call.output.row_stride + strip.column;
      store_some(destination, call.length - strip.column, gradient);
    }
  }
}

// Calls body(storage type, whether neighbours are adjacent, variation), each a compile-time constant.
template <class Body>
cudaError_t with_variant(const ImageCall& call, const Body& body) {
  using Differences = std::integral_constant<Variation, Variation::differences>;
  using Isotropic = std::integral_constant<Variation, Variation::isotropic>;
  return for_storage(call.storage, [&](auto type) {
    const auto with_step = [&](auto adjacent) {
      return call.variation() == Variation::isotropic ? body(type, adjacent, Isotropic())
                                                      : body(type, adjacent, Differences());
    };
    return call.step == 1 ? with_step(std::true_type()) : with_step(std::false_type());
  });
}

}  // namespace

ImagePlan plan_images(const ImageCall& call) {
  const int64_t pack = 16 / size_of(call.storage), packs = ceil_div(call.length, pack);
  ImagePlan plan;
  while (plan.across < threads && plan.across < packs) plan.across *= 2;
  // Blocks of whole warps, no larger than a plane needs
  const int64_t needed = ceil_div(plan.across * ceil_div(call.rows, plan.strip), warp_threads) * warp_threads;
  plan.block = needed < threads ? unsigned(needed < warp_threads ? warp_threads : needed) : threads;
  const int64_t strips = plan.block / plan.across;
  plan.columns = ceil_div(packs, plan.across);
  plan.row_blocks = ceil_div(call.rows, strips * plan.strip);
  plan.grid = blocks_for(call.images * plan.items_of_image(call));
  return plan;
}

cudaError_t launch_difference_sums(const ImageCall& call, const ImagePlan& plan, cudaStream_t stream) {
  cudaError_t error = with_variant(call, [&](auto type, auto adjacent, auto variation) {
    using T = typename decltype(type)::type;
    return launch(sum_differences<T, adjacent(), variation()>, plan.grid, plan.block, 0, stream, call, plan);
  });
  if (error != cudaSuccess) return error;
  error = launch(sum_images, blocks_for(call.images), threads, 0, stream, call, plan.items_of_image(call));
  if (error != cudaSuccess) return error;
  const bool is_double = call.storage == Storage::float64;
  const auto finish = call.losses == Losses::priors ? (is_double ? finish_priors<double> : finish_priors<float>)
                                                    : (is_double ? finish_variation<double> : finish_variation<float>);
  return launch(finish, 1, threads, 0, stream, call);
}

cudaError_t launch_difference_gradients(const ImageCall& call, const ImagePlan& plan, cudaStream_t stream) {
  return with_variant(call, [&](auto type, auto adjacent, auto variation) {
    using T = typename decltype(type)::type;
    return launch(difference_gradients<T, adjacent(), variation()>, plan.grid, plan.block, 0, stream, call, plan);
  });
}

}  // namespace kdkernels::cuda
