#include "machine.h"

#include <link.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

// All shared memory is thread-local (cuda_runtime.h): this is the dynamic part.
constexpr size_t kMaxShared = 227 * 1024;
alignas(16) thread_local unsigned char dynamic_shared[kMaxShared];
cuda_on_host::Dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_host {
namespace {

constexpr unsigned char kPoison = 0xff;  // NaN, -1, and more than any key
constexpr size_t kStackBytes = 64 * 1024;
constexpr int kWarp = 32;

enum class State { kReady, kWaiting, kExited };

struct Fibre {
  ucontext_t context;
  jmp_buf resume;
  bool started;
  State state;
  unsigned thread;
  // What it waits for.
  Collective kind;
  uint32_t mask, value, result;
  int operand, line;
};

enum class Schedule { kForward, kBackward, kRandom };

struct Machine {
  std::vector<Fibre> fibres;
  std::unique_ptr<char[]> stacks;
  size_t stack_count = 0;
  const std::function<void()>* kernel = nullptr;
  Fibre* current = nullptr;
  jmp_buf scheduler;
  Schedule schedule = Schedule::kForward;
  std::mt19937 random;
  std::string error;
  int64_t meetings = 0;  // of all threads in the last launch
};

// Not thread-local: that is what kernels call shared memory, and it is poisoned.
Machine machine;

const char* name_of(Collective kind) {
  switch (kind) {
    case Collective::kSyncThreads: return "__syncthreads";
    case Collective::kSyncThreadsOr: return "__syncthreads_or";
    case Collective::kSyncWarp: return "__syncwarp";
    case Collective::kBallot: return "__ballot_sync";
    case Collective::kShuffle: return "__shfl_sync";
    case Collective::kShuffleUp: return "__shfl_up_sync";
    default: return "__shfl_xor_sync";
  }
}

bool is_of_block(Collective kind) { return kind == Collective::kSyncThreads || kind == Collective::kSyncThreadsOr; }

std::string describe(const Fibre& fibre) {
  const std::string thread = "thread " + std::to_string(fibre.thread);
  if (fibre.state == State::kExited) return thread + " has ended";
  return thread + " waits at " + name_of(fibre.kind) + " on line " + std::to_string(fibre.line);
}

void set_error(const std::string& what) {
  if (machine.error.empty()) machine.error = what;
}

void enter() {
  (*machine.kernel)();
  machine.current->state = State::kExited;
  _longjmp(machine.scheduler, 1);
}

// Runs a fibre until it waits or ends. Only the first entry goes through ucontext, whose switches are system calls.
void resume(Fibre& fibre) {
  machine.current = &fibre;
  threadIdx.x = fibre.thread;
  if (_setjmp(machine.scheduler) != 0) return;
  if (fibre.started) _longjmp(fibre.resume, 1);
  fibre.started = true;
  setcontext(&fibre.context);
}

// The result of a warp's collective for one lane; false if it reads a lane that does not take part.
bool result_for(std::vector<Fibre>& fibres, size_t first, Fibre& fibre) {
  uint32_t votes = 0;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (fibre.mask >> lane & 1u && fibres[first + lane].value != 0) votes |= 1u << lane;
  }
  const int lane = static_cast<int>(fibre.thread % kWarp);
  int source = lane;
  switch (fibre.kind) {
    case Collective::kSyncWarp: return true;
    case Collective::kBallot: fibre.result = votes; return true;
    case Collective::kShuffle: source = fibre.operand; break;
    case Collective::kShuffleUp: source = lane >= fibre.operand ? lane - fibre.operand : lane; break;
    default: source = lane ^ fibre.operand; break;
  }
  if (source < 0 || source >= kWarp || !(fibre.mask >> source & 1u)) {
    set_error(describe(fibre) + " and reads lane " + std::to_string(source) + ", which takes no part");
    return false;
  }
  fibre.result = fibres[first + source].value;
  return true;
}

// Lets lanes go on that have met. Returns whether any did.
bool resolve_warp(size_t first) {
  auto& fibres = machine.fibres;
  bool any = false;
  for (int lane = 0; lane < kWarp; ++lane) {
    Fibre& leader = fibres[first + lane];
    if (leader.state != State::kWaiting || is_of_block(leader.kind)) continue;
    if (!(leader.mask >> lane & 1u)) {
      set_error(describe(leader) + ", whose mask leaves it out");
      return false;
    }
    bool complete = true;
    for (int other = 0; other < kWarp && complete; ++other) {
      if (!(leader.mask >> other & 1u)) continue;
      const Fibre& fibre = fibres[first + other];
      if (fibre.state == State::kReady) {
        complete = false;
      } else if (fibre.state == State::kExited || fibre.kind != leader.kind || fibre.mask != leader.mask ||
                 fibre.line != leader.line) {
        set_error("divergent warp: " + describe(leader) + ", " + describe(fibre));
        return false;
      }
    }
    if (!complete) continue;
    for (int other = 0; other < kWarp; ++other) {
      if (leader.mask >> other & 1u && !result_for(fibres, first, fibres[first + other])) return false;
    }
    const uint32_t mask = leader.mask;
    for (int other = 0; other < kWarp; ++other) {
      if (mask >> other & 1u) fibres[first + other].state = State::kReady;
    }
    any = true;
  }
  return any;
}

bool resolve_block() {
  auto& fibres = machine.fibres;
  uint32_t any = 0;
  for (const Fibre& fibre : fibres) {
    if (fibre.state == State::kExited || fibre.kind != fibres[0].kind || fibre.line != fibres[0].line) {
      set_error("divergent block: " + describe(fibres[0]) + ", " + describe(fibre));
      return false;
    }
    any |= fibre.value;
  }
  for (Fibre& fibre : fibres) {
    fibre.result = any != 0;
    fibre.state = State::kReady;
  }
  return true;
}

std::vector<size_t> order_of(size_t count) {
  std::vector<size_t> order(count);
  for (size_t i = 0; i < count; ++i) order[i] = machine.schedule == Schedule::kBackward ? count - 1 - i : i;
  if (machine.schedule == Schedule::kRandom) std::shuffle(order.begin(), order.end(), machine.random);
  return order;
}

// Every lane of a warp that can run does, once. Returns whether there was one.
bool step_warp(size_t first) {
  bool ran = false;
  for (const size_t lane : order_of(kWarp)) {
    Fibre& fibre = machine.fibres[first + lane];
    if (fibre.state != State::kReady) continue;
    resume(fibre);
    if (!machine.error.empty()) return false;
    ran = true;
  }
  return resolve_warp(first) || ran;
}

// Runs warps until all of them wait at a barrier or have ended. In order, each runs as far ahead of the others as it
// can; at random, they take turns.
void run_to_barrier() {
  const size_t warps = machine.fibres.size() / kWarp;
  std::vector<size_t> live = order_of(warps);
  while (!live.empty() && machine.error.empty()) {
    const size_t at = machine.schedule == Schedule::kRandom ? machine.random() % live.size() : 0;
    if (!step_warp(live[at] * kWarp)) live.erase(live.begin() + static_cast<std::ptrdiff_t>(at));
  }
}

void prepare(Dim3 index) {
  blockIdx = index;
  ucontext_t fresh;
  getcontext(&fresh);
  for (size_t i = 0; i < machine.fibres.size(); ++i) {
    Fibre& fibre = machine.fibres[i];
    fibre.context = fresh;
    fibre.context.uc_stack.ss_sp = machine.stacks.get() + i * kStackBytes;
    fibre.context.uc_stack.ss_size = kStackBytes;
    fibre.context.uc_link = nullptr;
    makecontext(&fibre.context, enter, 0);
    fibre.started = false;
    fibre.state = State::kReady;
    fibre.thread = static_cast<unsigned>(i);
  }
}

// This library's thread-local variables, all of them shared memory.
int poison_if_ours(dl_phdr_info* info, size_t, void*) {
  const auto* mine = dynamic_shared;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& header = info->dlpi_phdr[i];
    auto* data = static_cast<unsigned char*>(info->dlpi_tls_data);
    if (header.p_type != PT_TLS || data == nullptr) continue;
    if (mine < data || mine >= data + header.p_memsz) continue;
    std::memset(data, kPoison, header.p_memsz);
    return 1;
  }
  return 0;
}

void run_block(size_t shared_bytes) {
  dynamic_shared[0] = 0;  // so that the thread has its copy of them
  if (dl_iterate_phdr(poison_if_ours, nullptr) == 0) return set_error("found no shared memory to poison");
  const auto has_ended = [](const Fibre& fibre) { return fibre.state == State::kExited; };
  while (true) {
    run_to_barrier();
    if (!machine.error.empty()) return;
    if (std::all_of(machine.fibres.begin(), machine.fibres.end(), has_ended)) break;
    if (!resolve_block()) return;
  }
  for (size_t i = shared_bytes; i < kMaxShared; ++i) {
    if (dynamic_shared[i] != kPoison) {
      return set_error("byte " + std::to_string(i) + " of dynamic shared memory was written, the launch has " +
                       std::to_string(shared_bytes));
    }
  }
}

}  // namespace

uint32_t meet(Collective kind, uint32_t mask, uint32_t value, int operand, int line) {
  Fibre& fibre = *machine.current;
  ++machine.meetings;
  fibre.kind = kind;
  fibre.mask = mask;
  fibre.value = value;
  fibre.operand = operand;
  fibre.line = line;
  fibre.state = State::kWaiting;
  if (_setjmp(fibre.resume) == 0) _longjmp(machine.scheduler, 1);
  return machine.current->result;
}

void fail(const char* what, int line) {
  set_error("thread " + std::to_string(machine.current->thread) + ": " + what + " on line " +
            std::to_string(line));
  machine.current->state = State::kExited;
  _longjmp(machine.scheduler, 1);
}

int run(Dim3 grid, Dim3 block, size_t shared_bytes, const std::function<void()>& kernel) {
  machine.error.clear();
  machine.meetings = 0;
  if (block.y != 1 || block.z != 1 || block.x % kWarp != 0 || block.x == 0 || block.x > 1024) {
    set_error("blocks are rows of whole warps here, up to 1024 threads");
  } else if (grid.x == 0 || grid.y == 0 || grid.z == 0 || shared_bytes > kMaxShared) {
    set_error("an empty grid, or more shared memory than a block can have");
  }
  if (!machine.error.empty()) return 1;
  machine.kernel = &kernel;
  gridDim = grid;
  blockDim = block;
  machine.fibres.resize(block.x);
  if (machine.stack_count < block.x) {
    machine.stacks.reset(new char[block.x * kStackBytes]);
    machine.stack_count = block.x;
  }
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        prepare(Dim3(x, y, z));
        run_block(shared_bytes);
        if (machine.error.empty()) continue;
        machine.error = "block (" + std::to_string(x) + ", " + std::to_string(y) + "): " + machine.error;
        return 1;
      }
    }
  }
  return 0;
}

}  // namespace cuda_on_host

size_t& cuda_dynamic_shared_limit(const void* kernel) {
  static std::map<const void*, size_t> limits;
  return limits.try_emplace(kernel, 48 * 1024).first->second;
}

extern "C" {

// seed < 0: threads and warps backward; 0: forward; above: at random from this seed.
void cuda_on_host_schedule(int seed) {
  using namespace cuda_on_host;
  machine.schedule = seed < 0 ? Schedule::kBackward : seed == 0 ? Schedule::kForward : Schedule::kRandom;
  machine.random.seed(static_cast<unsigned>(seed));
}

// What the last launch failed with; empty if it did not.
const char* cuda_on_host_message() {
  return cuda_on_host::machine.error.c_str();
}

// How often the threads of the last launch came to a collective: a measure of what a kernel does beside streaming.
int64_t cuda_on_host_meetings() { return cuda_on_host::machine.meetings; }
}
