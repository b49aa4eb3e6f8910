// The threads of a block as fibers, their barriers and shuffles, and the order in which they run.
//
// Errors: a barrier that part of the block does not reach, or reaches at another line; a shuffle that a lane of its
// mask does not reach, or reaches at another line or with another mask; a lane that is not in its own mask, or takes
// from one that is not; an access that the system refuses.
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <csetjmp>
#include <stdexcept>

#include "emulator.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_emulation {
namespace {

constexpr unsigned WARP = 32;
constexpr unsigned MOST_THREADS = 1024;
constexpr size_t STACK_BYTES = 128 * 1024;  // of a fiber; the page below is left unreadable

enum class State { ready, at_barrier, at_shuffle, ended };

struct Fiber {
  jmp_buf context;
  bool started = false;
  State state = State::ended;
  Place place = {};
  uint3 index = {};
  unsigned mask = 0;
  int source = 0;  // the lane that it takes from
  uint64_t value = 0;
};

Fiber fibers[MOST_THREADS];
unsigned count = 0;                   // threads of the block
unsigned ready[MOST_THREADS / WARP];  // lanes of each warp that can run
unsigned order[MOST_THREADS / WARP];  // of the warps
unsigned turn = 0;                    // the warp that ran last, by its place in `order`
Fiber* current = nullptr;
jmp_buf scheduler;
ucontext_t start_context;
const std::function<void()>* body = nullptr;
std::string error;
uint64_t random_state = 1;

std::string name(const Place& place) { return std::string(place.file) + ":" + std::to_string(place.line); }
std::string name(unsigned x, unsigned y, unsigned z) {
  return "(" + std::to_string(x) + ", " + std::to_string(y) + ", " + std::to_string(z) + ")";
}
unsigned number_of(const Fiber& fiber) { return static_cast<unsigned>(&fiber - fibers); }

char* stacks() {
  static char* const all = [] {
    const size_t bytes = MOST_THREADS * STACK_BYTES;
    void* const memory =
        mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("CUDA emulation: no memory for the stacks of the threads");
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    for (size_t i = 0; i < MOST_THREADS; ++i) mprotect(static_cast<char*>(memory) + i * STACK_BYTES, page, PROT_NONE);
    return static_cast<char*>(memory);
  }();
  return all;
}

// A fiber is made once and then runs a thread of every block.
void fiber_main() {
  for (;;) {
    (*body)();
    current->state = State::ended;
    if (_setjmp(current->context) == 0) _longjmp(scheduler, 1);
  }
}

// Lets a fiber run until it waits or ends. The context of a fiber that has not started is made by the system's slow
// functions, everything after that by setjmp, which does not enter the kernel.
__attribute__((noinline)) void resume(Fiber* fiber) {
  current = fiber;
  threadIdx = fiber->index;
  if (_setjmp(scheduler) != 0) return;
  if (fiber->started) _longjmp(fiber->context, 1);
  fiber->started = true;
  getcontext(&start_context);
  start_context.uc_stack.ss_sp = stacks() + number_of(*fiber) * STACK_BYTES;
  start_context.uc_stack.ss_size = STACK_BYTES;
  start_context.uc_link = nullptr;
  makecontext(&start_context, fiber_main, 0);
  setcontext(&start_context);
}

__attribute__((noinline)) void suspend() {
  if (_setjmp(current->context) == 0) _longjmp(scheduler, 1);
}

void make_ready(unsigned number) {
  fibers[number].state = State::ready;
  ready[number / WARP] |= 1u << number % WARP;
}

// The next thread to run, or null where none can.
Fiber* next() {
  const unsigned warps = (count + WARP - 1) / WARP;
  const bool any = settings.schedule != 0 && settings.schedule % 2 == 0;
  const unsigned first = any ? random_below(warps) : settings.schedule == 0 ? turn : 0;
  for (unsigned i = 0; i < warps; ++i) {
    const unsigned position = (first + i) % warps;
    const unsigned warp = order[position];
    if (ready[warp] == 0) continue;
    turn = position;
    unsigned lane = settings.schedule == 0 ? 0 : random_below(WARP);
    while ((ready[warp] >> lane & 1) == 0) lane = (lane + 1) % WARP;
    ready[warp] &= ~(1u << lane);
    return &fibers[warp * WARP + lane];
  }
  return nullptr;
}

// All lanes of the mask that the fiber waits with have come: each takes the value of its source.
void complete_shuffle(const Fiber& last) {
  const unsigned first = number_of(last) / WARP * WARP;
  uint64_t values[WARP];
  for (unsigned lane = 0; lane < WARP; ++lane) values[lane] = fibers[first + lane].value;
  for (unsigned lane = 0; lane < WARP; ++lane) {
    if ((last.mask >> lane & 1) == 0) continue;
    Fiber& fiber = fibers[first + lane];
    fiber.value = values[fiber.source];
    make_ready(first + lane);
  }
}

// Nothing can run: a barrier that all threads wait at opens; anything else never will.
void open_barrier() {
  const Fiber* waiting = nullptr;
  unsigned arrived = 0;
  for (unsigned i = 0; i < count; ++i) {
    const Fiber& fiber = fibers[i];
    current = &fibers[i];
    if (fiber.state == State::at_shuffle) {
      error = "waits for ever for other lanes of its mask at the shuffle of " + name(fiber.place);
      return;
    }
    if (fiber.state != State::at_barrier) continue;
    if (waiting != nullptr &&
        (waiting->place.line != fiber.place.line || strcmp(waiting->place.file, fiber.place.file))) {
      error = "waits at the barrier of " + name(fiber.place) + ", others at that of " + name(waiting->place);
      return;
    }
    waiting = &fiber;
    ++arrived;
  }
  if (arrived < count) {
    current = &fibers[number_of(*waiting)];
    error = "waits at the barrier of " + name(waiting->place) + ", which only " + std::to_string(arrived) + " of " +
            std::to_string(count) + " threads reach: the others have ended";
    return;
  }
  for (unsigned i = 0; i < count; ++i) make_ready(i);
}

[[noreturn]] void stop() {
  current->state = State::ended;
  _longjmp(scheduler, 1);
}

void prepare() {
  count = blockDim.x * blockDim.y * blockDim.z;
  const unsigned warps = (count + WARP - 1) / WARP;
  for (unsigned i = 0; i < warps; ++i) {
    ready[i] = 0;
    order[i] = i;
  }
  if (settings.schedule != 0) {
    for (unsigned i = warps; i > 1; --i) std::swap(order[i - 1], order[random_below(i)]);
  }
  for (unsigned i = 0; i < count; ++i) {
    fibers[i].index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    make_ready(i);
  }
  for (unsigned i = count; i < warps * WARP; ++i) fibers[i].state = State::ended;  // the last warp is not full
  turn = 0;
  error.clear();
}

// The threads that have not ended are never heard of again.
[[noreturn]] void abandon() {
  const uint3 thread = current->index;
  for (unsigned i = 0; i < count; ++i) fibers[i].started = false;
  current = nullptr;
  throw std::runtime_error("thread " + name(thread.x, thread.y, thread.z) + " of block " +
                           name(blockIdx.x, blockIdx.y, blockIdx.z) + " " + error);
}

}  // namespace

void seed_random(unsigned seed) { random_state = (seed + 1) * 0x9e3779b97f4a7c15u; }

unsigned random_below(unsigned bound) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return static_cast<unsigned>((random_state >> 32) % bound);
}

void fault(const std::string& what) {
  if (current == nullptr) return;
  error = what;
  stop();
}

void wait_at_barrier(Place place) {
  current->state = State::at_barrier;
  current->place = place;
  suspend();
}

uint64_t exchange(unsigned mask, uint64_t value, int lane_mask, Place place) {
  Fiber& own = *current;
  const unsigned lane = number_of(own) % WARP;
  const unsigned first = number_of(own) - lane;
  own.source = static_cast<int>(lane) ^ lane_mask;
  if ((mask >> lane & 1) == 0) fault("is not in its own mask at the shuffle of " + name(place));
  if (own.source < 0 || own.source >= static_cast<int>(WARP) || (mask >> own.source & 1) == 0) {
    fault("takes from a lane that is not in the mask at the shuffle of " + name(place));
  }
  own.state = State::at_shuffle;
  own.place = place;
  own.mask = mask;
  own.value = value;
  bool complete = true;
  for (unsigned i = 0; i < WARP; ++i) {
    if ((mask >> i & 1) == 0) continue;
    const Fiber& other = fibers[first + i];
    if (other.state != State::at_shuffle) {
      complete = false;
    } else if (other.mask != mask || other.place.line != place.line || strcmp(other.place.file, place.file) != 0) {
      fault("shuffles at " + name(place) + " with another mask, or at another line, than a lane that waits at " +
            name(other.place));
    }
  }
  if (complete) complete_shuffle(own);
  suspend();
  return own.value;
}

void run_block(const std::function<void()>& thread) {
  const RefusedAccesses signals;
  body = &thread;
  prepare();
  unsigned running = count;
  while (running > 0) {
    Fiber* const fiber = next();
    if (fiber == nullptr) {
      open_barrier();
    } else {
      resume(fiber);
      if (fiber->state == State::ended) --running;
    }
    if (!error.empty()) abandon();
  }
  current = nullptr;
}

}  // namespace cuda_emulation
