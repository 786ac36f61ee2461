// Barriers and warp collectives: threads wait until the last participant arrives.
#include <initializer_list>

#include "runtime.h"

namespace cuda_host {
namespace {

constexpr uint64_t poison = ~uint64_t(0);

int warp_of(int thread) { return thread / warp_size; }
int lane_of(int thread) { return thread % warp_size; }

const char* name_of(Collective operation) {
  constexpr const char* names[] = {"__syncwarp",       "__shfl_sync",   "__shfl_xor_sync", "__shfl_up_sync",
                                   "__shfl_down_sync", "__ballot_sync", "__any_sync",      "__all_sync"};
  return names[static_cast<int>(operation)];
}

std::string hexadecimal(unsigned mask) {
  char text[16];
  snprintf(text, sizeof(text), "0x%08x", mask);
  return text;
}

std::string describe_wait(const Thread& thread) {
  switch (thread.state) {
    case State::gone:
      return "has left the kernel";
    case State::at_barrier:
      return "waits at __syncthreads, " + describe(thread.site);
    case State::at_collective:
      return std::string("waits at ") + name_of(thread.operation) + " with mask " + hexadecimal(thread.mask) + ", " +
             describe(thread.site);
    default:
      return "runs";
  }
}

// Lane that a shuffle reads, by the rules of the shfl instruction
int source_lane(const Thread& thread, int own) {
  const int first = own & ~(thread.width - 1), last = first + thread.width - 1;
  switch (thread.operation) {
    case Collective::shuffle:
      return first | (thread.lane & (thread.width - 1));
    case Collective::shuffle_xor:
      return (own ^ thread.lane) <= last ? own ^ thread.lane : own;
    case Collective::shuffle_up:
      return own - thread.lane >= first ? own - thread.lane : own;
    default:
      return own + thread.lane <= last ? own + thread.lane : own;
  }
}

void compute(Thread* threads, unsigned members) {
  uint64_t given[warp_size];
  unsigned votes = 0;
  for (int lane = 0; lane < warp_size; ++lane) {
    const bool member = members >> lane & 1;
    given[lane] = member ? threads[lane].value : poison;
    if (member && given[lane]) votes |= 1u << lane;
  }
  for (int lane = 0; lane < warp_size; ++lane) {
    if (!(members >> lane & 1)) continue;
    Thread& thread = threads[lane];
    switch (thread.operation) {
      case Collective::syncwarp:
        break;
      case Collective::ballot:
        thread.value = votes;
        break;
      case Collective::any:
        thread.value = votes != 0;
        break;
      case Collective::all:
        thread.value = votes == members;
        break;
      default:
        thread.value = given[source_lane(thread, lane) & (warp_size - 1)];
    }
  }
}

// Releases the lanes of a mask once all have arrived; lanes that left the kernel do not count.
void try_to_complete(int warp_index, unsigned mask) {
  Warp& warp = launched.warps[warp_index];
  Thread* threads = &launched.threads[warp_index * warp_size];
  const unsigned members = mask & ~warp.gone;
  if (members & ~warp.waiting) return;
  const Thread& first = threads[__builtin_ctz(members)];
  for (int lane = 0; lane < warp_size; ++lane) {
    if ((members >> lane & 1) && threads[lane].mask != mask) return;
  }
  for (int lane = 0; lane < warp_size; ++lane) {
    if (!(members >> lane & 1)) continue;
    if (threads[lane].operation != first.operation || !(threads[lane].site == first.site)) {
      fail("lanes of one warp meet at different collectives: thread " + describe(first.index) + " " +
           describe_wait(first) + "; thread " + describe(threads[lane].index) + " " + describe_wait(threads[lane]));
    }
  }
  compute(threads, members);
  if (first.operation == Collective::syncwarp && observer) observer->warp_barrier(warp_index, members);
  warp.waiting &= ~members;
  for (int lane = 0; lane < warp_size; ++lane) {
    if (members >> lane & 1) make_ready(warp_index * warp_size + lane);
  }
}

}  // namespace

void sync_threads(Site site) {
  Thread& self = launched.threads[launched.running];
  self.site = site;
  self.state = State::at_barrier;
  if (++launched.at_barrier == int(launched.threads.size())) {
    const Thread& first = launched.threads[0];
    for (const Thread& thread : launched.threads) {
      if (!(thread.site == first.site)) {
        fail("threads of one block meet at different barriers: thread " + describe(first.index) + " " +
             describe_wait(first) + "; thread " + describe(thread.index) + " " + describe_wait(thread));
      }
    }
    if (observer) observer->barrier();
    launched.at_barrier = 0;
    for (size_t i = 0; i < launched.threads.size(); ++i) make_ready(int(i));
  }
  suspend();
}

uint64_t meet(Collective operation, unsigned mask, uint64_t value, int lane, int width, Site site) {
  const int running = launched.running;
  Thread& self = launched.threads[running];
  self.state = State::at_collective;
  self.site = site;
  self.operation = operation;
  self.mask = mask;
  self.value = value;
  self.lane = lane;
  self.width = width;
  if (!(mask >> lane_of(running) & 1)) {
    fail("thread " + describe(self.index) + " " + describe_wait(self) + ": the mask does not name its own lane");
  }
  launched.warps[warp_of(running)].waiting |= 1u << lane_of(running);
  try_to_complete(warp_of(running), mask);
  suspend();
  return self.value;
}

void leave_kernel() {
  const int warp_index = warp_of(launched.running);
  Warp& warp = launched.warps[warp_index];
  launched.threads[launched.running].state = State::gone;
  ++launched.gone;
  warp.gone |= 1u << lane_of(launched.running);
  for (int lane = 0; lane < warp_size && warp.waiting; ++lane) {
    if (warp.waiting >> lane & 1) try_to_complete(warp_index, launched.threads[warp_index * warp_size + lane].mask);
  }
}

std::string deadlock() {
  const std::vector<Thread>& threads = launched.threads;
  int waiting = -1, missing = -1;
  for (State state : {State::at_barrier, State::at_collective}) {
    for (size_t i = 0; i < threads.size() && waiting < 0; ++i) {
      if (threads[i].state == state) waiting = int(i);
    }
  }
  const Thread& stuck = threads[waiting];
  for (size_t i = 0; i < threads.size() && missing < 0; ++i) {
    const Thread& other = threads[i];
    const bool arrived = stuck.state == State::at_barrier
                             ? other.state == State::at_barrier
                             : warp_of(int(i)) != warp_of(waiting) || !(stuck.mask >> lane_of(int(i)) & 1) ||
                                   other.state == State::gone ||
                                   (other.state == State::at_collective && other.mask == stuck.mask);
    if (!arrived) missing = int(i);
  }
  return "deadlock: thread " + describe(stuck.index) + " " + describe_wait(stuck) + "; thread " +
         describe(threads[missing].index) + " " + describe_wait(threads[missing]);
}

void fence(bool whole_device) {
  if (observer) observer->fence(whole_device);
}

}  // namespace cuda_host

template <class T, class Change>
static T change_atomically(T* address, void* code, Change change) {
  if (cuda_host::observer) cuda_host::observer->atomic(address, sizeof(T), code);
  const T before = *address;
  *address = change(before);
  return before;
}

int atomicAdd(int* address, int value) {
  return change_atomically(address, __builtin_return_address(0), [=](int old) { return int(unsigned(old) + value); });
}
unsigned int atomicAdd(unsigned int* address, unsigned int value) {
  return change_atomically(address, __builtin_return_address(0), [=](unsigned int old) { return old + value; });
}
unsigned long long atomicAdd(unsigned long long* address, unsigned long long value) {
  return change_atomically(address, __builtin_return_address(0), [=](unsigned long long old) { return old + value; });
}
unsigned int atomicInc(unsigned int* address, unsigned int limit) {
  return change_atomically(address, __builtin_return_address(0),
                           [=](unsigned int old) { return old >= limit ? 0 : old + 1; });
}
