// Runs the blocks of a launch one after another, and the threads of a block as the schedule orders them.
#include <link.h>
#include <signal.h>
#include <ucontext.h>

#include <algorithm>
#include <mutex>
#include <numeric>
#include <random>

#include "scheduler.h"

uint3 threadIdx;
uint3 blockIdx;
dim3 blockDim;
dim3 gridDim;
const int warpSize = cuda_host::warp_size;

namespace cuda_host {

static Region named(const char* name) {
  Region region;
  region.name = name;
  return region;
}

Launch launched;
Observer* observer = nullptr;
Region static_shared = named("static shared memory");
Region dynamic_region = named("dynamic shared memory");
Region library = named("static data");

namespace {

// Makes the dynamic linker give this library a thread-local segment even without a __shared__ variable.
thread_local volatile char anchor;

Schedule schedule = Schedule::fifo;
uint64_t seed = 0;
std::mt19937_64 generator;

// Rank of each thread in the schedule and the inverse map; ready is the set of ranks whose threads can run.
int order[max_threads];
int rank_of[max_threads];
uint64_t ready[max_threads / 64];

int next_ready(int from) {
  for (int word = from / 64; word < max_threads / 64; ++word) {
    const uint64_t rest = ready[word] & (word == from / 64 ? ~uint64_t(0) << from % 64 : ~uint64_t(0));
    if (rest) return word * 64 + __builtin_ctzll(rest);
  }
  return -1;
}

int pick(int last) {
  const int count = int(launched.threads.size());
  int from = 0;  // under warp_priority, the first thread that can run
  if (schedule == Schedule::random) from = int(generator() % count);
  if (schedule == Schedule::fifo || schedule == Schedule::reverse) from = (last + 1) % count;
  const int found = next_ready(from);
  return found >= 0 || from == 0 ? found : next_ready(0);
}

void order_threads() {
  const int count = int(launched.threads.size());
  std::iota(order, order + count, 0);
  if (schedule == Schedule::reverse) std::reverse(order, order + count);
  if (schedule == Schedule::random) std::shuffle(order, order + count, generator);
  if (schedule == Schedule::warp_priority) {
    uint64_t priorities[max_threads];
    for (int i = 0; i < count; ++i) {
      priorities[i] = i % warp_size ? priorities[i - 1] : generator() >> 32 << 32;
    }
    for (int i = 0; i < count; ++i) priorities[i] |= generator() >> 32;
    std::sort(order, order + count, [&](int a, int b) { return priorities[a] < priorities[b]; });
  }
  for (int i = 0; i < count; ++i) rank_of[order[i]] = i;
}

// A permutation of the blocks without a list of them: there may be 2^31.
struct BlockOrder {
  unsigned long long count, factor = 1, offset = 0;

  explicit BlockOrder(unsigned long long blocks) : count(blocks) {
    if (schedule == Schedule::reverse) {
      factor = offset = count - 1;
    } else if (schedule != Schedule::fifo) {
      do factor = generator() % count + 1;
      while (std::gcd(factor, count) != 1);
      offset = generator() % count;
    }
  }
  unsigned long long operator()(unsigned long long i) const {
    return static_cast<unsigned long long>((static_cast<unsigned __int128>(factor) * i + offset) % count);
  }
};

void run_thread() {
  launched.call.run(launched.call.arguments);
  leave_kernel();
  suspend();
}

int find_library(dl_phdr_info* info, size_t, void*) {
  Region code, shared;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const ElfW(Phdr) & header = info->dlpi_phdr[i];
    if (header.p_type == PT_LOAD) {
      if (!code.begin) code.begin = info->dlpi_addr + header.p_vaddr;
      code.bytes = info->dlpi_addr + header.p_vaddr + header.p_memsz - code.begin;
    } else if (header.p_type == PT_TLS) {
      shared.begin = uintptr_t(info->dlpi_tls_data);
      shared.bytes = header.p_memsz;
    }
  }
  if (!code.holds(uintptr_t(&find_library), 1)) return 0;
  library.begin = code.begin;
  library.bytes = code.bytes;
  static_shared.begin = shared.begin;
  static_shared.bytes = shared.bytes;
  return 1;
}

void find_shared_memory() {
  anchor = 0;
  dl_iterate_phdr(find_library, nullptr);
  // Dynamic shared memory ends at a guard page and starts at a multiple of 16 bytes.
  const size_t bytes = launched.config.dynamicSmemBytes, rounded = (bytes + 15) / 16 * 16;
  static unsigned char* mapped = nullptr;
  static size_t mapped_bytes = 0;
  if (!mapped || rounded > mapped_bytes) {
    if (mapped) unmap_guarded(mapped, mapped_bytes);
    mapped_bytes = std::max<size_t>(rounded, 256 << 10);
    mapped = map_guarded(mapped_bytes);
  }
  dynamic_region.begin = uintptr_t(mapped + mapped_bytes - rounded);
  dynamic_region.bytes = bytes;
}

void run_block(unsigned long long block) {
  const dim3 grid = launched.config.gridDim, shape = launched.config.blockDim;
  blockIdx = {unsigned(block % grid.x), unsigned(block / grid.x % grid.y), unsigned(block / grid.x / grid.y)};
  launched.block = block;
  launched.at_barrier = launched.gone = 0;
  memset(reinterpret_cast<void*>(static_shared.begin), 0xff, static_shared.bytes);
  memset(reinterpret_cast<void*>(dynamic_region.begin), 0xff, dynamic_region.bytes);
  const int count = int(launched.threads.size());
  for (int i = 0; i < count; ++i) {
    launched.threads[i].index = {i % shape.x, i / shape.x % shape.y, i / shape.x / shape.y};
    launched.threads[i].state = State::fresh;
    launched.threads[i].fiber = nullptr;
  }
  for (size_t i = 0; i < launched.warps.size(); ++i) {
    const int lanes = std::min(warp_size, count - int(i) * warp_size);
    launched.warps[i] = {lanes == warp_size ? 0 : ~0u << lanes, 0};
  }
  order_threads();
  for (int i = 0; i < count; ++i) ready[i / 64] |= uint64_t(1) << i % 64;
  if (observer) observer->begin_block();

  for (int rank = pick(count - 1); rank >= 0; rank = pick(rank)) {
    ready[rank / 64] &= ~(uint64_t(1) << rank % 64);
    launched.running = order[rank];
    Thread& thread = launched.threads[launched.running];
    if (thread.state == State::fresh) thread.fiber = take_fiber(run_thread);
    thread.state = State::ready;
    threadIdx = thread.index;
    resume(thread.fiber);
    launched.running = -1;
    if (!launched.error.empty()) break;
    if (thread.state == State::gone) {
      return_fiber(thread.fiber);
      thread.fiber = nullptr;
    }
  }
  if (launched.error.empty() && launched.gone < count) launched.error = deadlock();
  if (launched.error.empty()) return;
  // Objects on the stacks of a failed launch are abandoned.
  for (Thread& thread : launched.threads) {
    if (thread.fiber) return_fiber(thread.fiber);
  }
  std::fill(std::begin(ready), std::end(ready), 0);
}

// A fault in a kernel ends the launch instead of the process: the handler switches to the scheduler's stack.
constexpr int faults[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};
struct sigaction before_launch[4];

const void* faulting_code(const void* context) {
#if defined(__x86_64__)
  return reinterpret_cast<const void*>(static_cast<const ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP]);
#else
  return nullptr;
#endif
}

void on_fault(int signal, siginfo_t* info, void* context) {
  if (launched.running < 0) {  // not in a kernel: restore the previous handler
    for (int i = 0; i < 4; ++i) {
      if (faults[i] == signal) sigaction(signal, &before_launch[i], nullptr);
    }
    return;
  }
  const uintptr_t address = uintptr_t(info->si_addr);
  const std::string thread = ", thread " + describe(threadIdx);
  if (signal == SIGSEGV && launched.threads[launched.running].fiber->guards(address)) fail("stack overflow" + thread);
  const std::string place = thread + ", " + describe_code(faulting_code(context));
  if (signal == SIGILL) fail("undefined behavior" + place);
  if (signal == SIGFPE) fail("integer division by zero" + place);
  if (!address) fail("access through a null pointer, or misaligned vector access" + place);
  fail("access outside memory: " + describe_data(address) + place);
}

class FaultHandler {
 public:
  FaultHandler() {
    stack_t own{};
    own.ss_sp = stack_;
    own.ss_size = sizeof(stack_);
    sigaltstack(&own, &previous_);
    struct sigaction action{};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (int i = 0; i < 4; ++i) sigaction(faults[i], &action, &before_launch[i]);
  }
  ~FaultHandler() {
    for (int i = 0; i < 4; ++i) sigaction(faults[i], &before_launch[i], nullptr);
    sigaltstack(&previous_, nullptr);
  }

 private:
  static unsigned char stack_[64 << 10];
  stack_t previous_;
};
unsigned char FaultHandler::stack_[64 << 10];

}  // namespace

void set_schedule(Schedule kind, uint64_t new_seed) {
  schedule = kind;
  seed = new_seed;
}

void make_ready(int thread) {
  launched.threads[thread].state = State::ready;
  const int rank = rank_of[thread];
  ready[rank / 64] |= uint64_t(1) << rank % 64;
}

void fail(const std::string& text) {
  launched.error = text;
  suspend();
  __builtin_unreachable();
}

unsigned char* dynamic_shared() { return reinterpret_cast<unsigned char*>(dynamic_region.begin); }

cudaError_t run(const cudaLaunchConfig_t& config, const Call& call) {
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  const size_t count = size_t(config.blockDim.x) * config.blockDim.y * config.blockDim.z;
  launched.config = config;
  launched.call = call;
  launched.error.clear();
  launched.threads.resize(count);
  launched.warps.resize((count + warp_size - 1) / warp_size);
  blockDim = config.blockDim;
  gridDim = config.gridDim;
  find_shared_memory();
  generator.seed(seed);
  const FaultHandler handler;
  if (observer) observer->begin_launch();
  const BlockOrder blocks(1ull * gridDim.x * gridDim.y * gridDim.z);
  for (unsigned long long i = 0; i < blocks.count && launched.error.empty(); ++i) run_block(blocks(i));
  return launched.error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace cuda_host
