// What the kernels of the image priors are asked to do, in plain numbers and pointers.
#pragma once

#include "core/cuda/vec.cuh"
#include "total_variation/image_tensor.h"

namespace kdkernels::cuda {

enum class Variation { differences, isotropic };

// What the sums of the differences become: the three priors of DeepInversion, or a total variation
enum class Losses { priors, l1, l2, l2_squared, isotropic };

struct ImageCall {
  Storage storage = Storage::float32;
  int64_t images = 0, planes = 0, rows = 0, length = 0, step = 1;  // length: numbers in a row
  ImageTensor input, output;
  Losses losses = Losses::priors;
  int directions = 4;
  double eps = 0;               // of the isotropic variation
  double weight[4] = {};        // of the sums of each direction
  bool average_images = false;  // of the losses that are one number an image

  DifferenceSums* partial = nullptr;  // by item
  DifferenceSums* by_image = nullptr;
  // Results, of the type that is computed in: priors give tv_l1, tv_l2, l2 and norms (of the differences, then of each
  // image); a variation gives tv_l1 as its loss, one number or one an image, and norms where it is l2.
  void *tv_l1 = nullptr, *tv_l2 = nullptr, *l2 = nullptr, *norms = nullptr;
  bool loss_by_image = false;
  // For the gradient: null where there is none
  const void *grad_l1 = nullptr, *grad_l2 = nullptr, *grad_norm = nullptr, *given_norms = nullptr;

  KDKERNELS_INLINE Variation variation() const {
    return losses == Losses::isotropic ? Variation::isotropic : Variation::differences;
  }
  // Which sums, or which parts of the gradient, are wanted
  KDKERNELS_INLINE bool absolute() const { return losses == Losses::priors || losses == Losses::l1; }
  KDKERNELS_INLINE bool squares() const { return losses != Losses::l1; }
  KDKERNELS_INLINE bool pixels() const { return losses == Losses::priors; }
};

// An item is a block's: `across` threads over the packs of a row, block / across strips of rows below each other.
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
