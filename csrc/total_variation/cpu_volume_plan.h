// What a call of the total variation of volumes asks for, how the CPU cuts its work, by size alone, and the kernels
// that do it. No torch.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/cpu/capability.h"
#include "core/cpu/chunks.h"
#include "core/cpu/storage.h"
#include "total_variation/math.h"

namespace kdkernels::cpu {

using math::PairNorm;

// A volume as planes of slices of rows: a plane is a channel, or the whole volume where channels are neighbours in
// memory.
struct VolumeTensor {
  void* data = nullptr;
  int64_t image_stride = 0, plane_stride = 0, slice_stride = 0, row_stride = 0;

  int64_t offset(int64_t image, int64_t plane) const { return image * image_stride + plane * plane_stride; }
};

// Axes are numbered 0, 1, 2: across slices, across rows, along a row.
struct VolumeArguments {
  Storage storage = Storage::float32;
  // `length` numbers in a row, neighbours along it `step` numbers apart
  int64_t images = 0, planes = 0, slices = 0, rows = 0, length = 0, step = 1;
  VolumeTensor input, output, mask;  // the mask has bytes, one for each number of the input; null without one
  PairNorm norm = PairNorm::absolute;
  double scale[3] = {}, threshold[3] = {};  // of each axis
  double eps = 0;                           // of the isotropic variation

  // Pairs of neighbours along an axis in one image
  int64_t pairs(int axis) const {
    const int64_t lines = axis == 0 ? slices : axis == 1 ? rows : length / step;
    const int64_t others = planes * step * (axis == 0 ? 1 : slices) * (axis == 1 ? 1 : rows);
    return others * (axis == 2 ? 1 : length / step) * std::max<int64_t>(lines - 1, 0);
  }
};

struct VolumeSums {
  double terms[3] = {};   // weighted already where isotropic
  int64_t pairs[3] = {};  // that the mask leaves

  void add(const VolumeSums& other) {
    for (int axis = 0; axis < 3; ++axis) {
      terms[axis] += other.terms[axis];
      pairs[axis] += other.pairs[axis];
    }
  }
};

struct VolumeCoefficients {
  double axis[3] = {};
};

// A tile is some rows of every slice of a plane, and an item the tile in some of the slices, so that a cache keeps the
// tile of the last slice.
struct VolumeCall : VolumeArguments {
  static constexpr int64_t tile_numbers = 8192, item_numbers = 65536;
  static constexpr int64_t short_row = 48, joined_numbers = 1024;

  int64_t joined;           // rows without gaps between them that are taken as one
  int64_t tile, tiles;      // rows of a tile, tiles of a plane
  int64_t thickness, runs;  // slices of an item, items of a tile

  VolumeSums* partial = nullptr;                     // by item
  const VolumeCoefficients* coefficients = nullptr;  // by image

  explicit VolumeCall(const VolumeArguments& arguments) : VolumeArguments(arguments) {
    const int64_t numbers = std::max<int64_t>(1, length);
    joined = length < short_row && is_dense()
                 ? std::clamp<int64_t>(joined_numbers / numbers, 1, std::max<int64_t>(1, rows))
                 : 1;
    tile = std::clamp<int64_t>(tile_numbers / numbers, 1, std::max<int64_t>(1, rows));
    tiles = length == 0 ? 0 : (rows + tile - 1) / tile;
    thickness = std::clamp<int64_t>(item_numbers / (tile * numbers), 1, std::max<int64_t>(1, slices));
    runs = (slices + thickness - 1) / thickness;
  }

  int64_t items() const { return images * planes * tiles * runs; }
  Chunks chunks() const { return {items(), thickness * tile * length}; }

 private:
  // Whether rows lie behind one another
  bool is_dense() const {
    for (const VolumeTensor& tensor : {input, output, mask}) {
      if (tensor.data != nullptr && rows > 1 && tensor.row_stride != length) return false;
    }
    return true;
  }
};

KDKERNELS_KERNEL(void, volume_sums, (const VolumeCall& call, int64_t begin, int64_t end), (call, begin, end))
KDKERNELS_KERNEL(void, volume_gradients, (const VolumeCall& call, int64_t begin, int64_t end), (call, begin, end))

}  // namespace kdkernels::cpu
