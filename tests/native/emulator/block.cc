#include "block.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

// Leaves the calling thread, whose stack pointer is to be kept in `from`, and goes on with the one
// whose was `to`. swapcontext does the same by two system calls, four times as slow.
extern "C" void SwitchStacks(void** from, void* to);
asm(R"(
.text
.globl SwitchStacks
.hidden SwitchStacks
SwitchStacks:
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

Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {
namespace {

// What threads wait at is open once this number is another.
struct Gate {
  int arrived = 0;
  unsigned opened = 0;
};
struct Place : Gate {
  bool any = false, result = false;
};
struct Warp : Gate {
  float given[2][kWarp];
};
struct Copy {
  void* to;
  const void* from;
  int bytes, all, sent;
};
struct Thread {
  std::vector<Copy> copies;
  int sent = 0;  // how often
  void* stack_pointer = nullptr;
  const Gate* waits_at = nullptr;
  unsigned until_after = 0;
  bool ended = false;
  bool CanGoOn() const { return !ended && !(waits_at && waits_at->opened == until_after); }
};

constexpr int kPlaces = 16, kMostThreads = 1024;
constexpr size_t kStack = 128 * 1024;

Place places[kPlaces];
std::vector<Warp> warps;
std::vector<Thread> threads;
void* scheduler;  // its stack pointer
const std::function<void()>* running;

// Opens the gate if all have come, and waits for that otherwise.
void Arrive(Gate& gate, int expected) {
  if (++gate.arrived == expected) {
    gate.arrived = 0, ++gate.opened;
    return;
  }
  Thread& self = threads[threadIdx.x];
  self.waits_at = &gate, self.until_after = gate.opened;
  SwitchStacks(&self.stack_pointer, scheduler);
}

void RunThread() {
  (*running)();
  Thread& self = threads[threadIdx.x];
  self.ended = true;
  SwitchStacks(&self.stack_pointer, scheduler);
}

// Lets a warp's threads go on that can. Whether there are any.
bool RunWarp(int warp, int& left) {
  bool moved = false;
  for (int i = warp * kWarp; i < (warp + 1) * kWarp; ++i) {
    if (!threads[i].CanGoOn()) continue;
    moved = true;
    threadIdx.x = static_cast<unsigned>(i);
    SwitchStacks(&scheduler, threads[i].stack_pointer);
    left -= threads[i].ended;
  }
  return moved;
}

}  // namespace

void Fail(const char* what) {
  std::fprintf(stderr, "emulator: %s (block %u, thread %u)\n", what, blockIdx.x, threadIdx.x);
  std::abort();
}

bool Meet(int at, int expected, bool x) {
  Place& place = places[at];
  place.any |= x;
  if (place.arrived + 1 == expected) place.result = place.any, place.any = false;
  Arrive(place, expected);
  return place.result;
}

const float* Exchange(float x) {
  Warp& warp = warps[threadIdx.x / kWarp];
  float* const given = warp.given[warp.opened % 2];
  given[Lane()] = x;
  Arrive(warp, kWarp);
  return given;
}

void CopyLater(void* to, const void* from, int bytes, int all) {
  Thread& self = threads[threadIdx.x];
  self.copies.push_back({to, from, bytes, all, self.sent});
}

void SendCopies() { ++threads[threadIdx.x].sent; }

void WaitForCopies(int sent_later) {
  Thread& self = threads[threadIdx.x];
  auto& copies = self.copies;
  auto copy = copies.begin();
  for (; copy != copies.end() && copy->sent < self.sent - sent_later; ++copy) {
    if (copy->bytes) std::memcpy(copy->to, copy->from, copy->bytes);
    std::memset(static_cast<char*>(copy->to) + copy->bytes, 0, copy->all - copy->bytes);
  }
  copies.erase(copies.begin(), copy);
}

void Run(int64_t blocks, int count, const std::function<void()>& kernel) {
  if (count > kMostThreads || count % kWarp) Fail("no such block can be launched");
  static std::vector<char> stacks(kMostThreads * kStack);
  static uint32_t runs = 0;
  ++runs;
  running = &kernel;
  gridDim.x = static_cast<unsigned>(blocks), blockDim.x = static_cast<unsigned>(count);
  for (int64_t block = 0; block < blocks; ++block) {
    blockIdx.x = static_cast<unsigned>(block);
    for (Place& place : places) place = {};
    warps.assign(count / kWarp, {});
    threads.assign(count, {});
    for (int i = 0; i < count; ++i) {
      // As if it had called SwitchStacks, to return to RunThread, which never returns.
      const uintptr_t end = reinterpret_cast<uintptr_t>(stacks.data() + kStack * (i + 1));
      void** const top = reinterpret_cast<void**>(end / 64 * 64) - 8;
      std::fill_n(top, 8, nullptr);
      top[6] = reinterpret_cast<void*>(&RunThread);
      threads[i].stack_pointer = top;
    }
    // Of the warps that can go on always the first, or always the last.
    const bool last_first = ((runs * 2654435761u >> 31) + block) % 2;
    int left = count;
    while (left) {
      int warp = 0;
      while (warp < count / kWarp && !RunWarp(last_first ? count / kWarp - 1 - warp : warp, left))
        ++warp;
      if (warp == count / kWarp) Fail("all threads wait for each other");
    }
    for (const Place& place : places)
      if (place.arrived) Fail("a thread ended that others had come to meet");
  }
}

}  // namespace emulator
