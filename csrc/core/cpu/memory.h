// The memory of outputs.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "core/cpu/storage.h"
#include "core/dispatch.h"

namespace kdkernels::cpu {

// The C allocator asks the system for every output above this size, and the first write to each page then costs a page
// fault and the clearing of the page. With huge pages that happens 512 times less often.
constexpr int64_t fresh_pages_above = int64_t(32) << 20;

inline Tensor with_huge_pages(Tensor output) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const int64_t bytes = output.numel() * size_of(storage_of(output));
  if (bytes > fresh_pages_above) {
    constexpr uintptr_t page = 4096;
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(output.const_data_ptr()) + page - 1) / page * page;
    // This is only advice: a system without huge pages ignores it.
    (void)madvise(reinterpret_cast<void*>(begin), (size_t(bytes) - page) / page * page, MADV_HUGEPAGE);
  }
#endif
  return output;
}

// An uninitialized tensor laid out like another, which a kernel will fill completely
inline Tensor new_output(const Tensor& like) { return with_huge_pages(torch::stable::empty_like(like)); }
inline Tensor new_output(const Tensor& like, ScalarType dtype) { return with_huge_pages(empty_like(like, dtype)); }

}  // namespace kdkernels::cpu
