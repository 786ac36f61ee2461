// What the CUDA kernels of the image priors are given, and how their launches divide the work. No torch.
#pragma once

#include "core/cuda/vec.cuh"
#include "total_variation/arguments.h"

namespace kdkernels::cuda {

enum class Variation { differences, isotropic };

struct ImageCall : ImageArguments {
  DifferenceSums* partial = nullptr;  // by item
  DifferenceSums* by_image = nullptr;
  // Results, in the type that is computed in: priors give tv_l1, tv_l2, l2 and norms (of the differences, then of each
  // image); a variation gives its loss as tv_l1, one number or one per image, and norms where it is l2.
  void *tv_l1 = nullptr, *tv_l2 = nullptr, *l2 = nullptr, *norms = nullptr;
  // For the gradient: null where there is none
  const void *grad_l1 = nullptr, *grad_l2 = nullptr, *grad_norm = nullptr, *given_norms = nullptr;

  KDKERNELS_INLINE Variation variation() const {
    return losses == Losses::isotropic ? Variation::isotropic : Variation::differences;
  }
};

// A block takes an item: `across` threads over the packs of a row, and block / across strips of rows below each other.
struct ImagePlan {
  unsigned block = 256, grid = 0, across = 1;
  int64_t strip = 8;                    // rows of a thread
  int64_t columns = 1, row_blocks = 1;  // items of a plane
  KDKERNELS_INLINE int64_t items_of_image(const ImageCall& call) const { return call.planes * columns * row_blocks; }
};

ImagePlan plan_images(const ImageCall& call);

cudaError_t launch_difference_sums(const ImageCall& call, const ImagePlan& plan, cudaStream_t stream);
cudaError_t launch_difference_gradients(const ImageCall& call, const ImagePlan& plan, cudaStream_t stream);

}  // namespace kdkernels::cuda
