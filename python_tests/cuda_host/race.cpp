// Finds data races and accesses outside a kernel's tensors: the compiler calls the __tsan_ functions at the end of this
// file before every access. Barriers, __syncwarp, and fence + atomic + fence order accesses; shuffles and the
// emulator's schedule do not.
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <unordered_map>

#include "runtime.h"

namespace cuda_host {
namespace {

// Grows with every event that orders accesses, over all launches; accesses before a launch or a block are stale.
using Time = uint32_t;

struct Access {
  uint32_t thread;  // in the grid
  Time time;        // 0: none
  uint32_t code;    // offset in the library
  uint8_t bytes;    // one bit for each byte of the cell
  bool write, atomic;
};

// The last accesses to four bytes. If there are more readers than fit, those of different warps are kept.
constexpr size_t cell_bytes = 4;
struct Cell {
  Access accesses[4];
};

// A thread's acquisition of the releases at an address up to a time
struct Address;
struct Acquired {
  const Address* address;
  Time time;
  bool whole_device;
};
using Acquisitions = std::vector<Acquired>;

// Accesses ordered before a thread, besides its own: those of a lane of its warp up to known[lane], those of its block
// up to barrier, and those that it acquired
using Lanes = std::array<Time, warp_size>;
struct Fence {
  Time time;
  Time barrier;
  Lanes known;
  Acquisitions acquired;
};
struct Release {
  Fence fence;
  Time time;
  uint32_t thread;
  bool whole_device;
};
struct Address {
  std::unordered_map<uint32_t, std::vector<Release>> releases;  // by block
};

struct Knowledge {
  Lanes known;
  Acquisitions acquired;
  Acquisitions pending;  // by an atomic without a later fence
  Fence fences[2];       // the last fence of block scope and of device scope
};

Time now = 0;
Time launch_start, block_start, last_barrier;
std::vector<Knowledge> knowledge;
Acquisitions acquired_by_block;
std::unordered_map<uintptr_t, Address> addresses;

uint32_t block_of(uint32_t thread) { return thread / uint32_t(launched.threads.size()); }
uint32_t place_of(uint32_t thread) { return thread % uint32_t(launched.threads.size()); }
uint32_t running_thread() { return uint32_t(launched.block * launched.threads.size() + launched.running); }

void add(Acquisitions& all, const Acquired& one) {
  for (Acquired& other : all) {
    if (other.address != one.address || other.whole_device != one.whole_device) continue;
    other.time = std::max(other.time, one.time);
    return;
  }
  all.push_back(one);
}

// Whether a block's acquisitions at a barrier, at a fence or now cover a past access
bool covers(const Acquisitions& acquired, uint32_t block, const Access& past, const Address* except = nullptr);

bool covers(const Release& release, const Access& past, const Address* address) {
  const Fence& fence = release.fence;
  if (past.thread == release.thread) return past.time < fence.time;
  if (block_of(past.thread) == block_of(release.thread)) {
    if (past.time < fence.barrier) return true;
    const bool same_warp = place_of(past.thread) / warp_size == place_of(release.thread) / warp_size;
    if (same_warp && past.time < fence.known[place_of(past.thread) % warp_size]) return true;
  }
  return covers(fence.acquired, block_of(release.thread), past, address);
}

bool covers(const Acquisitions& acquired, uint32_t block, const Access& past, const Address* except) {
  for (const Acquired& one : acquired) {
    if (one.address == except) continue;
    for (const auto& [releasing_block, releases] : one.address->releases) {
      for (const Release& release : releases) {
        if (release.time >= one.time) continue;
        if (releasing_block != block && !(release.whole_device && one.whole_device)) continue;
        if (covers(release, past, one.address)) return true;
      }
    }
  }
  return false;
}

bool is_ordered(const Access& past, uintptr_t address) {
  if (past.thread == running_thread()) return true;
  const Knowledge& own = knowledge[launched.running];
  if (block_of(past.thread) == launched.block) {
    if (past.time < last_barrier) return true;
    const uint32_t place = place_of(past.thread);
    if (int(place) / warp_size == launched.running / warp_size && past.time < own.known[place % warp_size]) return true;
  }
  if (past.atomic) {  // this thread's own atomic at that address saw the result of the past one
    const Address* changed = &addresses[address];
    for (const Acquisitions* all : {&own.pending, &own.acquired, &std::as_const(acquired_by_block)}) {
      for (const Acquired& one : *all) {
        if (one.address == changed && past.time < one.time) return true;
      }
    }
  }
  return covers(own.acquired, uint32_t(launched.block), past) ||
         covers(acquired_by_block, uint32_t(launched.block), past);
}

std::string describe_access(const Access& access) {
  const uint32_t block = block_of(access.thread), place = place_of(access.thread);
  const dim3 grid = launched.config.gridDim;
  const uint3 block_index = {block % grid.x, block / grid.x % grid.y, block / grid.x / grid.y};
  return std::string(access.atomic  ? "atomic"
                     : access.write ? "write"
                                    : "read") +
         " by thread " + describe(launched.threads[place].index) + " of block " + describe(block_index) + ", " +
         describe_code(reinterpret_cast<const void*>(library.begin + access.code));
}

void visit(Cell& cell, const Access& access, Time since, uintptr_t address) {
  Access* place = nullptr;
  int best = 0;
  for (Access& past : cell.accesses) {
    if (past.time < since) past.time = 0;
    if (past.time && (past.bytes & access.bytes)) {
      const bool ordered = is_ordered(past, address);
      if (!ordered && (past.write || access.write) && !(past.atomic && access.atomic)) {
        fail("race on " + describe_data(address) + ": " + describe_access(past) + "; " + describe_access(access));
      }
      // Every access ordered after this one is also ordered after that one.
      if (ordered && (access.write || !past.write) && !(past.bytes & ~access.bytes)) past.time = 0;
    }
    const bool same_warp = past.thread / warp_size == access.thread / warp_size;
    const int score = !past.time ? 4 : !past.write ? 2 + same_warp : same_warp;
    if (!place || score > best) {
      place = &past;
      best = score;
    }
  }
  *place = access;
}

Cell* cells_of(Region& region) {
  const size_t wanted = (region.bytes / cell_bytes + 2) * sizeof(Cell);
  if (wanted > region.shadow_bytes) {
    if (region.shadow) munmap(region.shadow, region.shadow_bytes);
    region.shadow_bytes = wanted;
    region.shadow = mmap(nullptr, wanted, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  }
  return static_cast<Cell*>(region.shadow);
}

Region* find(uintptr_t address, size_t bytes) {
  for (Region* region : {&static_shared, &dynamic_region}) {
    if (region->holds(address, bytes)) return region;
  }
  for (Region& tensor : tensors) {
    if (tensor.holds(address, bytes)) return &tensor;
  }
  return memory_is_open && !library.holds(address, bytes) ? open_mapping(address) : nullptr;
}

void check(void* pointer, size_t bytes, bool write, bool atomic, void* code) {
  if (launched.running < 0) return;
  const uintptr_t address = uintptr_t(pointer);
  if (launched.threads[launched.running].fiber->holds(address)) return;
  Region* region = find(address, bytes);
  // The call instruction instead of its successor
  const uintptr_t calling = uintptr_t(code) - 1;
  if (!region) {
    if (library.holds(address, bytes)) return;
    if (!write && address - uintptr_t(launched.call.arguments) < launched.call.argument_bytes) return;
  }
  if (!region || (write && !region->writable)) {
    fail(std::string(write ? "write" : "read") + " of " + std::to_string(bytes) + " bytes " +
         (region ? "to read-only memory: " : "outside the tensors: ") + describe_data(address) + ", by thread " +
         describe(threadIdx) + ", " + describe_code(reinterpret_cast<const void*>(calling)));
  }
  if (!region->writable) return;
  const bool shared = region == &static_shared || region == &dynamic_region;
  Cell* cells = cells_of(*region);
  const uintptr_t first_cell = region->begin / cell_bytes;
  Access access{running_thread(), now, uint32_t(calling - library.begin), 0, write, atomic};
  for (uintptr_t cell = address / cell_bytes; cell <= (address + bytes - 1) / cell_bytes; ++cell) {
    const uintptr_t begin = std::max(address, cell * cell_bytes),
                    end = std::min(address + bytes, (cell + 1) * cell_bytes);
    access.bytes = uint8_t(((1u << (end - begin)) - 1) << begin % cell_bytes);
    visit(cells[cell - first_cell], access, shared ? block_start : launch_start, begin);
  }
}

class RaceDetector : public Observer {
 public:
  RaceDetector() { observer = this; }

  void forget_tensors() override {
    for (Region& tensor : tensors) {
      if (tensor.shadow) munmap(tensor.shadow, tensor.shadow_bytes);
    }
  }
  void begin_launch() override {
    launch_start = ++now;
    addresses.clear();
    knowledge.resize(max_threads);
  }
  void begin_block() override {
    block_start = last_barrier = ++now;
    acquired_by_block.clear();
    for (size_t i = 0; i < launched.threads.size(); ++i) {
      knowledge[i].acquired.clear();
      knowledge[i].pending.clear();
    }
  }
  void barrier() override {
    last_barrier = ++now;
    for (size_t i = 0; i < launched.threads.size(); ++i) {
      for (const Acquired& one : knowledge[i].acquired) add(acquired_by_block, one);
      knowledge[i].acquired.clear();
    }
  }
  void warp_barrier(int warp, unsigned lanes) override {
    ++now;
    Knowledge* members = &knowledge[warp * warp_size];
    Lanes known{};
    Acquisitions acquired;
    for (int lane = 0; lane < warp_size; ++lane) {
      if (!(lanes >> lane & 1)) continue;
      for (int other = 0; other < warp_size; ++other) known[other] = std::max(known[other], members[lane].known[other]);
      for (const Acquired& one : members[lane].acquired) add(acquired, one);
    }
    for (int lane = 0; lane < warp_size; ++lane) {
      if (lanes >> lane & 1) known[lane] = now;
    }
    for (int lane = 0; lane < warp_size; ++lane) {
      if (!(lanes >> lane & 1)) continue;
      members[lane].known = known;
      members[lane].acquired = acquired;
    }
  }
  void fence(bool whole_device) override {
    ++now;
    Knowledge& own = knowledge[launched.running];
    for (Acquired one : own.pending) {
      one.whole_device = whole_device;
      add(own.acquired, one);
    }
    Acquisitions acquired = own.acquired;
    for (const Acquired& one : acquired_by_block) add(acquired, one);
    own.fences[0] = {now, last_barrier, own.known, acquired};
    if (whole_device) own.fences[1] = own.fences[0];
  }
  void atomic(void* pointer, size_t bytes, void* code) override {
    ++now;
    check(pointer, bytes, true, true, code);
    Address& address = addresses[uintptr_t(pointer)];
    Knowledge& own = knowledge[launched.running];
    std::vector<Release>& releases = address.releases[uint32_t(launched.block)];
    for (bool whole_device : {false, true}) {
      const Fence& fence = own.fences[whole_device];
      const auto is_this = [&](const Release& known) {
        return known.fence.time == fence.time && known.whole_device == whole_device;
      };
      if (fence.time < block_start || std::any_of(releases.rbegin(), releases.rend(), is_this)) continue;
      releases.push_back({fence, now, running_thread(), whole_device});
    }
    add(own.pending, {&address, now, false});
  }
};
RaceDetector detector;

}  // namespace
}  // namespace cuda_host

extern "C" {

#define CUDA_HOST_ACCESS(name, bytes, write)                                     \
  void __tsan_##name##bytes(void* address) {                                     \
    cuda_host::check(address, bytes, write, false, __builtin_return_address(0)); \
  }
#define CUDA_HOST_ACCESSES(bytes)                \
  CUDA_HOST_ACCESS(read, bytes, false)           \
  CUDA_HOST_ACCESS(write, bytes, true)           \
  CUDA_HOST_ACCESS(unaligned_read, bytes, false) \
  CUDA_HOST_ACCESS(unaligned_write, bytes, true) \
  CUDA_HOST_ACCESS(volatile_read, bytes, false)  \
  CUDA_HOST_ACCESS(volatile_write, bytes, true)
CUDA_HOST_ACCESSES(1)
CUDA_HOST_ACCESSES(2)
CUDA_HOST_ACCESSES(4)
CUDA_HOST_ACCESSES(8)
CUDA_HOST_ACCESSES(16)

void __tsan_read_range(void* address, size_t bytes) {
  if (bytes) cuda_host::check(address, bytes, false, false, __builtin_return_address(0));
}
void __tsan_write_range(void* address, size_t bytes) {
  if (bytes) cuda_host::check(address, bytes, true, false, __builtin_return_address(0));
}
void __tsan_vptr_update(void** address, void*) {
  cuda_host::check(address, sizeof(*address), true, false, __builtin_return_address(0));
}
void __tsan_vptr_read(void** address) {
  cuda_host::check(address, sizeof(*address), false, false, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}
