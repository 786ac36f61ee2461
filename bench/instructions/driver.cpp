// Calls the AVX2 compilation of every CPU kernel the way its binding in csrc/cpu does, case after case on one thread,
// for callgrind to count the instructions of each. Prints the elements and the name of every case, in their order.
#define KDKERNELS_CAPABILITY avx2

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <new>
#include <string>
#include <vector>

#include "batch_norm_stats/plan.h"
#include "gradient_reversal/plan.h"
#include "softmax_divergence/plan.h"
#include "total_variation/plan.h"

// Only what runs inside this function is counted. What follows the call keeps it from becoming a jump that callgrind
// would not see return.
extern "C" __attribute__((noinline)) void measured(const std::function<void()>& body) {
  body();
  asm volatile("" ::: "memory");
}

// Kernels give their working memory back in the opposite order. What malloc does for them depends on all that was
// allocated before: a case would count differently because of the cases before it.
alignas(64) static unsigned char memory[1 << 20];
static std::size_t memory_used = 0;

void* operator new(std::size_t size, std::align_val_t) {
  if (size > sizeof(memory) - memory_used) std::abort();
  void* const result = memory + memory_used;
  memory_used += (size + 63) / 64 * 64;
  return result;
}
void operator delete(void* pointer, std::align_val_t) noexcept {
  memory_used = std::size_t(static_cast<unsigned char*>(pointer) - memory);
}

namespace {

using namespace kdkernels;
using namespace kdkernels::cpu;

// How the bindings divide work, in their own words: a test compares these lines with csrc/cpu.
constexpr int64_t tile_logits = 4096;
constexpr int64_t tile_positions = 128;
constexpr int64_t row_tile_logits = 2048;
constexpr int64_t few_classes = 32;
constexpr int64_t max_lanes = 16;
constexpr int64_t plane_values = 512;
constexpr int64_t row_values = 65536;
constexpr int64_t block_numbers = 8192;
constexpr int64_t chunk_cost = 32768;

template <class Kernel>
void for_each_chunk(int64_t items, int64_t cost_of_item, const Kernel& kernel) {
  const int64_t size = std::max<int64_t>(1, chunk_cost / std::max<int64_t>(1, cost_of_item));
  for (int64_t begin = 0; begin < items; begin += size) kernel(begin, std::min(items, begin + size));
}

const char* name_of(Storage storage) {
  return storage == Storage::float32 ? "fp32" : storage == Storage::bfloat16 ? "bf16" : "fp16";
}

// A tensor's memory: NaN until something is written, or numbers between -3 and 3 that every run has alike.
class Numbers {
 public:
  Numbers(Storage storage, int64_t count)
      : storage_(storage), count_(count), words_(size_t(count * size_of(storage) + 7) / 8, ~uint64_t(0)) {}
  Numbers(Storage storage, int64_t count, uint32_t seed) : Numbers(storage, count) {
    with_storage(storage_, [&](auto type) {
      uint32_t state = seed;
      for (int64_t i = 0; i < count_; ++i) {
        state = state * 1664525u + 1013904223u;
        cpu::store<float>(static_cast<decltype(type)*>(data()) + i, float(state >> 8) * 0x1p-24f * 6 - 3);
      }
    });
  }

  void* data() { return words_.data(); }

  // The sum of the absolute values: NaN where a number was not written
  double magnitude() {
    double sum = 0;
    with_storage(storage_, [&](auto type) {
      for (int64_t i = 0; i < count_; ++i) {
        sum += std::abs(double(cpu::load<float>(static_cast<const decltype(type)*>(data()) + i)));
      }
    });
    return sum;
  }

 private:
  Storage storage_;
  int64_t count_;
  std::vector<uint64_t> words_;
};

// magnitude() tells afterwards whether the kernel has computed anything.
void run_case(const std::string& name, int64_t elements, const std::function<void()>& body,
              const std::function<double()>& magnitude) {
  body();  // what only a first call does, such as asking the system for memory, is not counted
  measured(body);
  const double found = magnitude();
  if (!std::isfinite(found) || found == 0) {
    std::fprintf(stderr, "%s: the results are %g\n", name.c_str(), found);
    std::exit(1);
  }
  std::printf("%lld\t%s\n", static_cast<long long>(elements), name.c_str());
}

// Logits [outer, classes, inner], or rows [inner, classes]
struct Logits {
  const char* shape;
  int64_t outer, classes, inner;
  bool rows;

  int64_t count() const { return outer * classes * inner; }
};

SoftmaxCall softmax_call(const Logits& logits, Storage storage) {
  SoftmaxCall call;
  call.classes = logits.classes;
  call.positions = logits.outer * logits.inner;
  call.inner = logits.inner;
  call.outer_dims = logits.outer > 1 ? 1 : 0;
  call.outer_size[0] = logits.outer;
  for (SoftmaxOperand& operand : call.operand) {
    operand.storage = storage;
    operand.class_stride = logits.rows ? 1 : logits.inner;
    operand.inner_stride = logits.rows ? logits.classes : 1;
    operand.outer_stride[0] = logits.classes * logits.inner;
  }
  call.classes_in_lanes = call.classes > few_classes && logits.rows;
  if (call.classes_in_lanes) {
    call.tile = std::clamp<int64_t>(row_tile_logits / call.classes, 1, max_lanes);
  } else {
    const int64_t fitting = std::clamp<int64_t>(tile_logits / call.classes, 1, tile_positions);
    call.tile = (fitting + max_lanes - 1) / max_lanes * max_lanes;
  }
  call.tiles_in_run = (call.inner + call.tile - 1) / call.tile;
  call.normalizer = 1.0 / double(call.positions);
  call.temperature = 2;
  return call;
}

double run_softmax(const SoftmaxCall& call) {
  double total = 0;
  for_each_chunk(call.positions / call.inner * call.tiles_in_run, call.classes * call.tile,
                 [&](int64_t begin, int64_t end) { total += avx2::softmax_tiles(call, begin, end); });
  return total;
}

void softmax_cases(const Logits& logits, Storage storage, const std::string& divergence, bool with_labels) {
  Numbers input(storage, logits.count(), 1), target(storage, logits.count(), 2);
  Numbers input_gradient(storage, logits.count()), target_gradient(storage, logits.count());
  std::vector<int64_t> labels(size_t(logits.outer * logits.inner));
  for (size_t i = 0; i < labels.size(); ++i) labels[i] = int64_t(i * 7) % logits.classes;
  const float grad_output = 0.5f;

  SoftmaxCall call = softmax_call(logits, storage);
  const DivergenceChoice choice = choose_divergence(divergence, call.beta);
  call.divergence = choice.divergence;
  call.reverse = choice.reverse;
  call.operand[student].data = input.data();
  call.operand[teacher].data = target.data();
  if (with_labels) {
    call.labels = labels.data();
    call.ignored_label = -100;
    call.label_weight = 0.5;
  }
  const std::string what = divergence + (with_labels ? " and labels, " : ", ") + logits.shape + ", " + name_of(storage);
  double loss = 0;
  const auto run = [&] { loss = run_softmax(call); };
  run_case("softmax_divergence: " + what, logits.count(), run, [&] { return loss; });
  call.operand[student_gradient].data = input_gradient.data();
  run_case("softmax_divergence: " + what + ", saves the gradient", logits.count(), run,
           [&] { return loss + input_gradient.magnitude(); });
  call.operand[teacher_gradient].data = target_gradient.data();
  call.grad_output = &grad_output;
  run_case("softmax_divergence_backward: " + what, logits.count(), run,
           [&] { return input_gradient.magnitude() + target_gradient.magnitude(); });
}

void batch_norm_cases(bool channels_last, Storage storage) {
  constexpr int64_t samples = 4, channels = 48, plane = 256, count = samples * channels * plane;
  Numbers input(storage, count, 3), grad_output(storage, count, 4), output(storage, count);
  Numbers mean(Storage::float32, channels, 5), through_mean(Storage::float32, channels, 6);
  Numbers through_variance(Storage::float32, channels, 7);

  BatchNormCall call;
  call.storage = storage;
  call.samples = samples;
  call.channels = channels;
  call.plane = plane;
  call.rows = channels_last;
  call.group = std::max<int64_t>(1, channels_last ? row_values / channels : plane_values / plane);
  const auto place = [&](Numbers& numbers) {
    return channels_last ? ChannelTensor{numbers.data(), 0, 0, channels}
                         : ChannelTensor{numbers.data(), channels * plane, plane, 0};
  };
  call.input = place(input);
  std::vector<Moments> partial(size_t(call.groups() * channels));
  call.partial = partial.data();
  const auto run = [&](const auto& kernel) {
    const int64_t items = call.rows ? call.groups() : call.groups() * channels;
    for_each_chunk(items, call.group * (call.rows ? channels : plane),
                   [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
  };
  const std::string what =
      ": [4, 48, 16, 16]" + std::string(channels_last ? " channels_last, " : ", ") + name_of(storage);
  run_case(
      "batch_norm_stats" + what, count, [&] { run(avx2::batch_norm_moments); },
      [&] {
        double sum = 0;
        for (const Moments& moments : partial) sum += double(moments.count * moments.squares);
        return sum;
      });
  call.grad_output = place(grad_output);
  call.output = place(output);
  call.mean = mean.data();
  call.through_mean = through_mean.data();
  call.through_variance = through_variance.data();
  run_case(
      "batch_norm_tap_backward" + what, count, [&] { run(avx2::batch_norm_gradient); },
      [&] { return output.magnitude(); });
}

struct Images {
  int64_t images, channels, size;
  bool channels_last;

  int64_t count() const { return images * channels * size * size; }
};

// `norm_type` as in total_variation, or "priors" for the three terms of image_prior_losses together
void image_cases(const Images& shape, Storage storage, const std::string& norm_type) {
  Numbers input(storage, shape.count(), 8), output(storage, shape.count());
  const bool priors = norm_type == "priors", isotropic = norm_type == "isotropic";

  ImageCall call;
  call.storage = storage;
  call.images = shape.images;
  call.rows = shape.size;
  call.step = shape.channels_last ? shape.channels : 1;
  call.planes = shape.channels_last ? 1 : shape.channels;
  call.length = shape.size * call.step;
  call.block = std::clamp<int64_t>(block_numbers / call.length, 1, call.rows);
  call.blocks = (call.rows + call.block - 1) / call.block;
  call.directions = priors ? 4 : 2;
  call.absolute = priors || norm_type == "l1";
  call.squares = norm_type != "l1";
  call.pixels = priors;
  const auto place = [&](Numbers& numbers) {
    return ImageTensor{numbers.data(), shape.channels * shape.size * shape.size,
                       shape.channels_last ? 1 : shape.size * shape.size, call.length};
  };
  call.input = place(input);
  std::vector<DifferenceSums> partial(size_t(call.items()));
  call.partial = partial.data();
  const auto run = [&](const auto& kernel) {
    for_each_chunk(call.items(), call.block * call.length,
                   [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
  };
  const std::string size = std::to_string(shape.size);
  const std::string what = (priors ? ": [" : ": " + norm_type + ", [") + std::to_string(shape.images) + ", " +
                           std::to_string(shape.channels) + ", " + size + ", " + size + "]" +
                           (shape.channels_last ? " channels_last, " : ", ") + name_of(storage);
  const std::string op = priors ? "image_prior_losses" : "total_variation";
  run_case(
      op + what, shape.count(), [&] { run(isotropic ? avx2::isotropic_sums : avx2::difference_sums); },
      [&] {
        double sum = 0;
        for (const DifferenceSums& sums : partial) sum += sums.absolute[0] + sums.squares[0] + sums.isotropic;
        return sum;
      });
  const std::vector<double> scale(size_t(shape.images), 0.25);
  (priors ? call.pixel_scale : call.image_scale) = scale.data();
  for (int k = 0; k < 4; ++k) {
    call.coefficients.linear[k] = 0.5;
    call.coefficients.absolute[k] = 0.75;
  }
  call.output = place(output);
  run_case(
      op + "_backward" + what, shape.count(),
      [&] { run(isotropic ? avx2::isotropic_gradients : avx2::difference_gradients); },
      [&] { return output.magnitude(); });
}

void gradient_reversal_case(Storage storage) {
  constexpr int64_t count = 16000;
  Numbers source(storage, count, 9), destination(storage, count);
  const ScaleCall call{storage, source.data(), destination.data(), -0.5};
  run_case(
      "gradient_reversal_backward: [16, 1000], " + std::string(name_of(storage)), count,
      [&] { for_each_chunk(count, 1, [&](int64_t begin, int64_t end) { avx2::scale_numbers(call, begin, end); }); },
      [&] { return destination.magnitude(); });
}

}  // namespace

int main() {
  const Logits rows{"[16, 1000]", 1, 1000, 16, true}, few{"[256, 10]", 1, 10, 256, true};
  const Logits map{"[2, 19, 16, 32] dim 1", 2, 19, 512, false};
  for (const Storage storage : {Storage::float32, Storage::bfloat16}) {
    for (const Logits& logits : {rows, few, map}) {
      softmax_cases(logits, storage, "forward_kl", false);
      softmax_cases(logits, storage, "js", false);
      softmax_cases(logits, storage, "forward_kl", true);
    }
    for (const bool channels_last : {false, true}) {
      batch_norm_cases(channels_last, storage);
      image_cases({4, 3, 32, channels_last}, storage, "priors");
    }
  }
  softmax_cases(rows, Storage::float32, "reverse_kl", false);
  softmax_cases(few, Storage::float32, "clamped_js", false);
  image_cases({1, 3, 112, false}, Storage::float32, "priors");
  for (const char* norm_type : {"l1", "l2_squared", "isotropic"}) {
    image_cases({4, 3, 32, false}, Storage::float32, norm_type);
  }
  for (const Storage storage : {Storage::float32, Storage::float16, Storage::bfloat16}) gradient_reversal_case(storage);
}
