#include "fiber.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

namespace cuda_host {
namespace {

size_t whole_pages(size_t bytes) { return (bytes + page_bytes - 1) / page_bytes * page_bytes; }

unsigned char* map_pages(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    perror("the CUDA emulator cannot map memory");
    abort();
  }
  return static_cast<unsigned char*>(memory);
}

std::vector<Fiber*> pool;
Fiber scheduler;
Fiber* running = nullptr;

}  // namespace

unsigned char* map_guarded(size_t bytes) {
  unsigned char* memory = map_pages(whole_pages(bytes) + page_bytes);
  mprotect(memory + whole_pages(bytes), page_bytes, PROT_NONE);
  return memory + whole_pages(bytes) - bytes;
}

void unmap_guarded(unsigned char* memory, size_t bytes) {
  munmap(memory + bytes - whole_pages(bytes), whole_pages(bytes) + page_bytes);
}

#if defined(CUDA_HOST_PORTABLE_FIBER)

static void start(Fiber& fiber, void (*entry)()) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = stack_bytes;
  makecontext(&fiber.context, entry, 0);
}
static void switch_fiber(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }

#else

// Saves the callee-saved registers and the stack pointer, and returns on the other stack.
extern "C" void cuda_host_switch(void** from, void* to);
__asm__(R"(
.text
.local cuda_host_switch
.type cuda_host_switch, @function
cuda_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

static void start(Fiber& fiber, void (*entry)()) {
  // Six registers, entry as the return address, and a null above it: aligned as after a call.
  void** top = reinterpret_cast<void**>(fiber.stack + stack_bytes);
  for (int i = 1; i <= 8; ++i) top[-i] = nullptr;
  top[-2] = reinterpret_cast<void*>(entry);
  fiber.stack_pointer = top - 8;
}
static void switch_fiber(Fiber& from, Fiber& to) { cuda_host_switch(&from.stack_pointer, to.stack_pointer); }

#endif

Fiber* take_fiber(void (*entry)()) {
  if (pool.empty()) {
    unsigned char* memory = map_pages(page_bytes + stack_bytes);
    mprotect(memory, page_bytes, PROT_NONE);
    Fiber* fiber = new Fiber{};
    fiber->stack = memory + page_bytes;
    pool.push_back(fiber);
  }
  Fiber* fiber = pool.back();
  pool.pop_back();
  start(*fiber, entry);
  return fiber;
}

void return_fiber(Fiber* fiber) { pool.push_back(fiber); }

void resume(Fiber* fiber) {
  running = fiber;
  switch_fiber(scheduler, *fiber);
}

void suspend() { switch_fiber(*running, scheduler); }

}  // namespace cuda_host
