// A block's buffer of candidates in shared memory, and the exact choice of the K best of them.
//
// A candidate is one integer, so that the order (value descending, id ascending, NaN first, -0 equal to +0) is the
// descending order of keys, none of which are equal:
//   key = value key << id bits | (2^id bits - 1 - id)
// bf16 needs 16 bits of value, fp16 as fp32 19 (its exponents and its mantissa), fp32 all 32; ids as many as V - 1 has.
//
// The choice is a radix selection, 8 bits at a time from the top: a histogram of the keys that share the prefix found
// so far, the bin that the K-th largest falls into, and the next 8 bits. It ends as soon as few enough keys reach the
// prefix, usually after two or three digits; only a tie across the K-th place has to look at ids. A digit costs about
// 10 instructions a key and 60 a thread, and four barriers; nothing is sorted before the K best are alone.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "row.cuh"

namespace asyncopd {

using Key = unsigned long long;  // 0 is the key of nothing: lower than any

template <typename T>
constexpr int kValueBits = sizeof(T) == 4 ? 32 : std::is_same_v<T, __half> ? 19 : 16;

// Integers in the order of the values, none of them 0; the sign is flipped, and all other bits of negative values.
template <typename T>
__device__ __forceinline__ uint32_t value_key(float z) {
  const uint32_t bits = __float_as_uint(z + 0.0f);  // -0 becomes +0
  const uint32_t ordered = isnan(z) ? ~0u : bits >> 31 ? ~bits : bits | 0x80000000u;
  return ordered >> (32 - kValueBits<T>);
}

// The value of a key, NaN if no value has it (0, say).
template <typename T>
__device__ __forceinline__ float key_value(uint32_t key) {
  constexpr int kDropped = 32 - kValueBits<T>;
  const uint32_t ordered = key << kDropped;
  return __uint_as_float(ordered >> 31 ? ordered ^ 0x80000000u : ~(ordered | ((1u << kDropped) - 1)));
}

// The largest float below all values of this key and above. The key below +0 is that of -0, which equals it.
template <typename T>
__device__ __forceinline__ float value_below(uint32_t key) {
  constexpr uint32_t kMinusZero = (1u << (kValueBits<T> - 1)) - 1;
  return key_value<T>(key - 1 == kMinusZero ? key - 2 : key - 1);
}

__device__ __forceinline__ Key make_key(uint32_t value, int id, int id_bits) {
  return Key{value} << id_bits | ((Key{1} << id_bits) - 1 - static_cast<Key>(id));
}

__device__ __forceinline__ int key_id(Key key, int id_bits) {
  const Key mask = (Key{1} << id_bits) - 1;
  return static_cast<int>(mask - (key & mask));
}

constexpr int kDigit = 8;  // bits

template <int kThreads>
struct Candidates {
  static constexpr int kWarps = kThreads / 32;
  static_assert(kThreads == 1 << kDigit, "a thread owns a bin");

  // In shared memory, beside the keys.
  struct State {
    int count;
    int histogram[kThreads];
    int totals[kWarps];         // of the warps' bins
    int bin, above, inside;     // that the K-th key falls into; keys in higher bins, and in this one
  };

  Key* keys;
  State& state;
  int bits;  // of a key

  // All keys that reach prefix << shift, at least the K best.
  struct Bound {
    Key prefix = 0;
    int shift = 0;
    __device__ __forceinline__ Key lowest() const { return prefix << shift; }
  };

  // Before the first append, and a barrier after it.
  __device__ __forceinline__ void clear() const {
    if (threadIdx.x == 0) state.count = 0;
  }

  // Returns how many keys there are after it, 0 if it was not wanted. The compiler makes one addition of a warp's, by a
  // vote. In what order threads come differs from run to run, and is forgotten: keys are chosen and sorted by value.
  __device__ __forceinline__ int append(bool wanted, Key key) const {
    if (!wanted) return 0;
    const int place = atomicAdd(&state.count, 1);
    keys[place] = key;
    return place + 1;
  }

  // A bound on the k-th largest of `count` > k keys that at most `limit` of them reach, or as many as equal it in the
  // bits down to `lowest_shift`. After a barrier that follows the last append.
  __device__ __forceinline__ Bound find_bound(int count, int k, int limit, int lowest_shift) const {
    Bound bound;
    bound.shift = bits;
    int needed = k, kept;
    do {
      const int old_shift = bound.shift;
      bound.shift = max(bound.shift - kDigit, lowest_shift);
      state.histogram[threadIdx.x] = 0;
      __syncthreads();
      const Key digit = (Key{1} << (old_shift - bound.shift)) - 1;
#pragma unroll 1
      for (int i = threadIdx.x; i < count; i += kThreads) {
        const Key key = keys[i];
        if (key >> old_shift == bound.prefix) atomicAdd(&state.histogram[key >> bound.shift & digit], 1);
      }
      __syncthreads();
      find_bin(needed);
      bound.prefix = bound.prefix << (old_shift - bound.shift) | static_cast<Key>(state.bin);
      needed -= state.above;
      kept = k - needed + state.inside;
    } while (kept > limit && bound.shift > lowest_shift);
    return bound;
  }

  // Drops the keys below the bound. The keys that stay move down, past none that has not been read.
  __device__ __forceinline__ void keep(Bound bound, int count) const {
    if (threadIdx.x == 0) state.count = 0;
    for (int start = 0; start < count; start += kThreads) {
      const int i = start + threadIdx.x;
      const Key key = i < count ? keys[i] : 0;
      __syncthreads();
      append(i < count && key >> bound.shift >= bound.prefix, key);
    }
    __syncthreads();
  }

  // Sorted descending, keys beyond `count` filled up with 0 to `size`, a power of two.
  __device__ __forceinline__ void sort(int count, int size) const {
    for (int i = count + threadIdx.x; i < size; i += kThreads) keys[i] = 0;
    for (int run = 2; run <= size; run *= 2) {
      for (int step = run / 2; step > 0; step /= 2) {
        __syncthreads();
        for (int pair = threadIdx.x; pair < size / 2; pair += kThreads) {
          const int i = 2 * pair - (pair & (step - 1)), j = i + step;
          const Key a = keys[i], b = keys[j];
          const bool descending = (i & run) == 0;
          if ((a < b) == descending) keys[i] = b, keys[j] = a;
        }
      }
    }
    __syncthreads();
  }

 private:
  // The bin that the needed-th largest key falls into: a scan of the histogram from the top, thread t at bin -1 - t.
  __device__ __forceinline__ void find_bin(int needed) const {
    const int bin = kThreads - 1 - threadIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int inside = state.histogram[bin];
    int reached = inside;
#pragma unroll
    for (int delta = 1; delta < 32; delta *= 2) {
      const int other = __shfl_up_sync(~0u, reached, delta);
      if (lane >= delta) reached += other;
    }
    if (lane == 31) state.totals[warp] = reached;
    __syncthreads();
#pragma unroll
    for (int w = 0; w < kWarps - 1; ++w) {
      if (w < warp) reached += state.totals[w];
    }
    if (reached >= needed && reached - inside < needed) {
      state.bin = bin;
      state.above = reached - inside;
      state.inside = inside;
    }
    __syncthreads();
  }
};

}  // namespace asyncopd
