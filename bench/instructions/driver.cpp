// Runs the cases of every op, on one thread, for callgrind to count the instructions of each. Prints the elements and
// the name of every case, in the order of the counts.
#define KDKERNELS_CAPABILITY avx2

#include <cstdio>
#include <cstdlib>
#include <new>

#include "core/cpu/counting.h"
#include "counted_of_every_op.h"  // written by the build: C++ cannot look for files

// Only what runs inside this function is counted. The statement after the call keeps the call from becoming a jump,
// whose return callgrind would not see.
extern "C" __attribute__((noinline)) void measured(const std::function<void()>& body) {
  body();
  asm volatile("" ::: "memory");
}

// The working memory of kernels, which they give back in the opposite order. The work of malloc would depend on
// everything that was allocated before, and the count of a case on the cases before it.
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

void kdkernels::counted::run_case(const std::string& name, int64_t elements, const std::function<void()>& body,
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

int main() {
  for (const auto& run : kdkernels::counted::all_cases()) run();
}
