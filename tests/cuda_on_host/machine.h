// A CUDA device made of fibres: the threads of a block take turns on one host thread and wait for each other where
// CUDA's would, at the collective functions. __init__.py says what it is for.
#pragma once

#include <cstdint>
#include <functional>

namespace cuda_on_host {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr Dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum class Collective { kSyncThreads, kSyncThreadsOr, kSyncWarp, kBallot, kShuffle, kShuffleUp, kShuffleXor };

// Waits until every thread of the block, or every lane in `mask`, has come to the same collective on the same line.
// Returns the collective's result. operand: of shuffles, the lane or the distance.
uint32_t meet(Collective kind, uint32_t mask, uint32_t value, int operand, int line);

// Stops the launch: for what is an error on the spot.
[[noreturn]] void fail(const char* what, int line);

// Runs a grid. 0, or 1 after an error that `message` tells.
int run(Dim3 grid, Dim3 block, size_t shared_bytes, const std::function<void()>& kernel);

}  // namespace cuda_on_host
