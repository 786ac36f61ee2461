// Batch-norm statistics in one read of the activation, and the backward of the tap in one more.
//
// A few values at a time are summed in the type that is computed in, around their own mean; these sums are added up in
// double precision. This keeps the mean accurate where it is small, and the variance where the mean is large.
#include "batch_norm_stats/cuda_moments.cuh"
#include "core/cuda/reduce.cuh"

namespace kdkernels::cuda {
namespace {

constexpr unsigned threads = 256;

// A block takes the planes of one channel in the samples of one split.
template <class T>
__global__ void __launch_bounds__(threads, 1) plane_moments(const BatchNormCall call, const BatchNormPlan plan) {
  using S = Compute<T>;
  const int64_t x = threadIdx.x % plan.across, y = threadIdx.x / plan.across, step = blockDim.x / plan.across;
  for (int64_t item = blockIdx.x; item < call.channels * plan.splits; item += gridDim.x) {
    const int64_t channel = item % call.channels, split = item / call.channels;
    const int64_t first = split * plan.items_of_split;
    const int64_t last = first + plan.items_of_split < call.samples ? first + plan.items_of_split : call.samples;
    ThreadMoments<S> sums;
    for (int64_t n = first + y; n < last; n += step) {
      const Run<const T> run(at<const T>(call.input, plane_offset(call.input, n, channel)), call.plane);
      for (int64_t p = x; p < run.packs(); p += plan.across) {
        S values[Run<T>::pack];
        run.load(p, values);
        if (run.whole(p)) {
          sums.add(values, [](int) { return true; });
        } else {
          sums.add(values, [&](int k) { return run.has(run.first_of(p) + k); });
        }
      }
    }
    Moments total[1] = {sums.moments()};
    reduce_block(total, Merge());
    if (threadIdx.x == 0) call.partial[item] = total[0];
  }
}

// A block takes a tile of channels in the rows of one split, and a thread takes a pack of channels in every step-th
// row.
template <class T>
__global__ void __launch_bounds__(threads, 1) row_moments(const BatchNormCall call, const BatchNormPlan plan) {
  using S = Compute<T>;
  constexpr int pack = pack_of<T>, together = 4;
  __shared__ __align__(16) unsigned char memory[threads * sizeof(Moments)];
  Moments* const of_threads = reinterpret_cast<Moments*>(memory);
  const int64_t x = threadIdx.x % plan.across, y = threadIdx.x / plan.across, step = blockDim.x / plan.across;
  const int64_t rows = call.samples * call.plane;
  for (int64_t item = blockIdx.x; item < plan.tiles * plan.splits; item += gridDim.x) {
    const int64_t channel = (item % plan.tiles * plan.across + x) * pack, split = item / plan.tiles;
    const int64_t first = split * plan.items_of_split;
    const int64_t last = first + plan.items_of_split < rows ? first + plan.items_of_split : rows;
    const int64_t valid = call.channels - channel < pack ? call.channels - channel : pack;
    ThreadMoments<S> sums[pack];
    for (int64_t row = first + y; row < last; row += step * together) {
      S values[together][pack];
#pragma unroll
      for (int r = 0; r < together; ++r) {
        const int64_t at_row = row + r * step;
        load_some(at<const T>(call.input, at_row * call.input.row_stride + channel), at_row < last ? valid : 0,
                  values[r]);
      }
      const int64_t here = (last - row + step - 1) / step;
#pragma unroll
      for (int k = 0; k < pack; ++k) {
        S column[together];
#pragma unroll
        for (int r = 0; r < together; ++r) column[r] = values[r][k];
        sums[k].add(column, [&](int r) { return r < here; });
      }
    }
#pragma unroll
    for (int k = 0; k < pack; ++k) {
      of_threads[threadIdx.x] = sums[k].moments();
      __syncthreads();
      if (y == 0 && k < valid) {
        Moments total = of_threads[x];
        for (int64_t other = 1; other < step; ++other) total.merge(of_threads[other * plan.across + x]);
        call.partial[split * call.channels + channel + k] = total;
      }
      __syncthreads();
    }
  }
}

// A warp merges the splits of one channel.
template <class S>
__global__ void __launch_bounds__(threads, 1) finish_moments(const BatchNormCall call, int64_t splits) {
  const int lane = thread_in_group<Group::warp>();
  const int64_t warps = blockDim.x / warp_threads;
  for (int64_t c = blockIdx.x * warps + group_in_block<Group::warp>(); c < call.channels; c += gridDim.x * warps) {
    Moments total;
    for (int64_t s = lane; s < splits; s += warp_threads) total.merge(call.partial[s * call.channels + c]);
    total = reduce_warp(total, Merge());
    if (lane == 0) {
      const S mean = S(total.mean());
      static_cast<S*>(call.mean)[c] = mean;
      static_cast<S*>(call.variance)[c] = S(total.squares.value() / call.divisor());
      static_cast<S*>(call.mean_error)[c] =
          S((fma(-double(mean), total.count, total.sum.sum) + total.sum.rest) / total.count);
    }
  }
}

// What the gradient by a value of a channel needs: (x - mean) * slope + constant
template <class S>
struct ChannelGradient {
  S mean = 0, slope = 0, constant = 0;

  ChannelGradient() = default;
  __device__ __forceinline__ ChannelGradient(const BatchNormCall& call, int64_t c) {
    const auto number = [&](const void* numbers) {
      return numbers == nullptr ? S(0) : static_cast<const S*>(numbers)[c];
    };
    mean = number(call.given_mean);
    const math::StatisticsGradient<S> gradient(number(call.grad_mean), number(call.grad_variance),
                                               number(call.given_mean_error), S(call.count()), S(call.divisor()));
    slope = gradient.slope;
    constant = gradient.constant;
  }
};

template <class T>
__global__ void __launch_bounds__(threads, 1) plane_gradient(const BatchNormCall call, const BatchNormPlan plan) {
  using S = Compute<T>;
  constexpr int pack = Run<T>::pack;
  const int64_t x = threadIdx.x % plan.across, y = threadIdx.x / plan.across, step = blockDim.x / plan.across;
  const int64_t planes = call.samples * call.channels;
  for (int64_t item = blockIdx.x * step + y; item < planes; item += gridDim.x * step) {
    const int64_t sample = item / call.channels, channel = item % call.channels;
    const ChannelGradient<S> gradient(call, channel);
    const Run<T> output(at<T>(call.output, plane_offset(call.output, sample, channel)), call.plane);
    const Run<const T> input(at<const T>(call.input, plane_offset(call.input, sample, channel)), output);
    const Run<const T> grad(at<const T>(call.grad_output, plane_offset(call.grad_output, sample, channel)), output);
    for (int64_t p = blockIdx.y * plan.across + x; p < output.packs(); p += int64_t(gridDim.y) * plan.across) {
      S values[pack], incoming[pack] = {};
      input.load(p, values);
      if (grad.data != nullptr) grad.load(p, incoming);
#pragma unroll
      for (int k = 0; k < pack; ++k) {
        values[k] =
            math::statistics_gradient(values[k], gradient.mean, gradient.constant, gradient.slope) + incoming[k];
      }
      output.store(p, values);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(threads, 1) row_gradient(const BatchNormCall call, const BatchNormPlan plan) {
  using S = Compute<T>;
  constexpr int pack = Run<T>::pack;
  const int64_t x = threadIdx.x % plan.across, y = threadIdx.x / plan.across, step = blockDim.x / plan.across;
  const int64_t rows = call.samples * call.plane;
  for (int64_t item = blockIdx.x; item < plan.tiles * plan.splits; item += gridDim.x) {
    const int64_t channel = (item % plan.tiles * plan.across + x) * pack, split = item / plan.tiles;
    const int64_t first = split * plan.items_of_split;
    const int64_t last = first + plan.items_of_split < rows ? first + plan.items_of_split : rows;
    const int64_t valid = call.channels - channel < pack ? call.channels - channel : pack;
    if (valid <= 0) continue;
    ChannelGradient<S> gradient[pack];
#pragma unroll
    for (int k = 0; k < pack; ++k) {
      if (k < valid) gradient[k] = ChannelGradient<S>(call, channel + k);
    }
    for (int64_t row = first + y; row < last; row += step) {
      T* const destination = at<T>(call.output, row * call.output.row_stride + channel);
      const T* const source = at<const T>(call.input, row * call.input.row_stride + channel);
      const T* const from_grad = at<const T>(call.grad_output, row * call.grad_output.row_stride + channel);
      S values[pack], incoming[pack] = {};
      load_some(source, valid, values);
      if (from_grad != nullptr) load_some(from_grad, valid, incoming);
#pragma unroll
      for (int k = 0; k < pack; ++k) {
        const ChannelGradient<S>& g = gradient[k];
        values[k] = math::statistics_gradient(values[k], g.mean, g.constant, g.slope) + incoming[k];
      }
      store_some(destination, valid, values);
    }
  }
}

template <class S>
struct LayerStatistics {
  const StatDistanceCall& call;
  math::StatDistance distance;
  int64_t first, last;

  __device__ __forceinline__ explicit LayerStatistics(const StatDistanceCall& call)
      : call(call),
        distance(call.distance),
        first(call.first_channel[blockIdx.x]),
        last(call.first_channel[blockIdx.x + 1]) {
    distance.channels = double(last - first);
  }
  __device__ __forceinline__ math::StatDistance::Channel operator[](int64_t c) const {
    const auto number = [&](int i) { return double(static_cast<const S*>(call.statistics[i])[c]); };
    return {number(0), number(1), number(2), number(3)};
  }
  __device__ __forceinline__ math::StatDistance::Sums sums() const {
    math::StatDistance::Sums sums;
    for (int64_t c = first + threadIdx.x; c < last; c += blockDim.x) distance.measure((*this)[c], sums);
    double totals[2] = {sums.means, sums.spreads};
    reduce_block(totals, Add());
    sums.means = totals[0];
    sums.spreads = totals[1];
    return sums;
  }
};

// A block takes a layer.
template <class S>
__global__ void __launch_bounds__(threads, 1) stat_distances(const StatDistanceCall call) {
  const LayerStatistics<S> layer(call);
  const math::StatDistance::Sums sums = layer.sums();
  if (threadIdx.x == 0) static_cast<S*>(call.losses)[blockIdx.x] = S(layer.distance.value(sums));
}

template <class S>
__global__ void __launch_bounds__(threads, 1) stat_distance_gradients(const StatDistanceCall call) {
  const LayerStatistics<S> layer(call);
  const math::StatDistance::Sums sums = layer.sums();
  const double grad = double(static_cast<const S*>(call.grad_losses)[blockIdx.x]);
  for (int64_t c = layer.first + threadIdx.x; c < layer.last; c += blockDim.x) {
    const math::StatDistance::Gradients gradients = layer.distance.gradients(layer[c], sums);
    const auto write = [&](int i, double gradient) { static_cast<S*>(call.gradients[i])[c] = S(grad * gradient); };
    write(0, gradients.mean);
    write(1, gradients.variance);
    write(2, gradients.running_mean);
    write(3, gradients.running_variance);
  }
}

unsigned power_of_two_up_to(int64_t most, int64_t needed) {
  int64_t power = 1;
  while (power < most && power < needed) power *= 2;
  return unsigned(power);
}

}  // namespace

BatchNormPlan plan_batch_norm(const BatchNormCall& call, bool gradient) {
  constexpr int64_t wanted_blocks = 2048, values_of_thread = 64;
  const int64_t pack = 16 / size_of(call.storage), enough = threads * values_of_thread;
  BatchNormPlan plan;
  plan.block = threads;
  if (call.rows) {
    const int64_t rows = call.samples * call.plane;
    plan.across = power_of_two_up_to(warp_threads, ceil_div(call.channels, pack));
    plan.tiles = ceil_div(call.channels, plan.across * pack);
    const int64_t least = ceil_div(enough, plan.across * pack);
    plan.splits = ceil_div(rows, least);
    const int64_t most = ceil_div(wanted_blocks, plan.tiles);
    if (plan.splits > most) plan.splits = most;
    if (plan.splits < 1) plan.splits = 1;
    plan.items_of_split = ceil_div(rows, plan.splits);
    plan.grid = blocks_for(plan.tiles * plan.splits);
    return plan;
  }
  const int64_t packs = ceil_div(call.plane, pack) + 1;  // one more where planes are not aligned
  plan.across = power_of_two_up_to(threads, packs);
  if (gradient) {
    plan.grid = blocks_for(ceil_div(call.samples * call.channels, threads / plan.across));
    plan.splits = 1;
    const int64_t parts = ceil_div(packs, int64_t(plan.across) * 8);
    plan.tiles = parts > 1024 ? 1024 : parts;  // blocks that share a plane
    return plan;
  }
  const int64_t least = ceil_div(enough, call.plane > 0 ? call.plane : 1);
  plan.splits = ceil_div(call.samples, least);
  const int64_t most = ceil_div(wanted_blocks, call.channels > 0 ? call.channels : 1);
  if (plan.splits > most) plan.splits = most;
  if (plan.splits < 1) plan.splits = 1;
  plan.items_of_split = ceil_div(call.samples, plan.splits);
  plan.grid = blocks_for(call.channels * plan.splits);
  return plan;
}

cudaError_t launch_batch_norm_stats(const BatchNormCall& call, const BatchNormPlan& plan, cudaStream_t stream) {
  const cudaError_t error = for_storage(call.storage, [&](auto type) {
    using T = typename decltype(type)::type;
    return launch(call.rows ? row_moments<T> : plane_moments<T>, plan.grid, plan.block, 0, stream, call, plan);
  });
  if (error != cudaSuccess) return error;
  return launch(call.storage == Storage::float64 ? finish_moments<double> : finish_moments<float>,
                blocks_for(ceil_div(call.channels, threads / warp_threads)), threads, 0, stream, call, plan.splits);
}

cudaError_t launch_batch_norm_gradient(const BatchNormCall& call, const BatchNormPlan& plan, cudaStream_t stream) {
  return for_storage(call.storage, [&](auto type) {
    using T = typename decltype(type)::type;
    const dim3 grid(plan.grid, call.rows ? 1 : unsigned(plan.tiles), 1);
    return launch(call.rows ? row_gradient<T> : plane_gradient<T>, grid, plan.block, 0, stream, call, plan);
  });
}

cudaError_t launch_stat_distances(const StatDistanceCall& call, bool backward, cudaStream_t stream) {
  const auto run = [&](auto kernel) { return launch(kernel, unsigned(call.layers), threads, 0, stream, call); };
  if (call.is_double) return run(backward ? stat_distance_gradients<double> : stat_distances<double>);
  return run(backward ? stat_distance_gradients<float> : stat_distances<float>);
}

}  // namespace kdkernels::cuda
