// The backward of gradient reversal: each number times the negated coefficient.
#include "gradient_reversal/cuda_kernels.h"

namespace kdkernels::cuda {
namespace {

constexpr unsigned threads = 256;

template <class T>
__global__ void __launch_bounds__(threads, 1) reversed_scale(const ScaleCall call) {
  using S = Compute<T>;
  constexpr int pack = Run<T>::pack;
  const S factor = S(-call.coefficient.read());
  const Run<T> destination(static_cast<T*>(call.destination), call.count);
  const Run<const T> source(static_cast<const T*>(call.source), destination);
  for (int64_t p = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; p < destination.packs();
       p += int64_t(gridDim.x) * blockDim.x) {
    S numbers[pack];
    source.load(p, numbers);
#pragma unroll
    for (int k = 0; k < pack; ++k) numbers[k] *= factor;
    destination.store(p, numbers);
  }
}

}  // namespace

unsigned scale_blocks(const ScaleCall& call) {
  const int64_t pack = 16 / size_of(call.storage);
  return blocks_for(ceil_div(call.count, pack * threads) + 1);  // one more where memory is not aligned
}

cudaError_t launch_reversed_scale(const ScaleCall& call, cudaStream_t stream) {
  return for_storage(call.storage, [&](auto type) {
    using T = typename decltype(type)::type;
    return launch(reversed_scale<T>, scale_blocks(call), threads, 0, stream, call);
  });
}

}  // namespace kdkernels::cuda
