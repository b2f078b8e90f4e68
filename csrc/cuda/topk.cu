// LSE + exact top-K of rows on CUDA. NOT YET RUN ON A GPU: compiled, inspected, and run thread by thread on a CPU.
//
// One read of the logits, in 16-byte vectors, two a thread at a time. A vector is added to the thread's sum (row.cuh);
// if its largest logit beats the threshold, what beats it is appended to the candidates in shared memory. Where they
// might not hold another chunk, the K best stay and the threshold rises (select.cuh). Ids come in ascending order from
// chunk to chunk, so a logit that equals the threshold is no candidate. For K up to 256 the threshold begins at the
// K-th largest of the first 512 vectors' maxima, each a logit of its own.
//
// Cost of a row, V = 151,936 in bf16, K = 64 (37 chunks of 4096, 594 warp loads of 512 bytes), as a model; instructions
// are those of the sm_90 code, counts of candidates those of normally distributed logits in random order:
//   bytes         1 read: 303,872. An SM's share of an H100's 3.35 TB/s is 14.5 bytes a cycle (at 1.75 GHz): 16 bytes
//                 about every cycle, a warp load every 35, behind which 140 issue slots of its four schedulers hide.
//   sum           71 instructions a warp load (per column: convert, max, subtract, scale, exp2, add): 42,000.
//                 8 exp2 a lane take 16 of the 35 cycles of the special function units.
//   candidates    660, where K + K ln(V / K) = 560 are the least; they come in half of the warp loads, 80 instructions
//                 each: 24,000.
//   choices       the first threshold, 3 choices among 270 keys on average, the sort: about 10,000.
//   together      about 76,000 of the 84,000 slots of a row that arrives at full bandwidth, which is close; of the
//                 117,000 at 2.4 TB/s, the target.
//   in flight     4 blocks of 256 threads an SM, two loads each: 32 KiB; 3.35 TB/s times 700 ns are 17 KiB an SM.
//   shared        8 bytes a key, room for K + max(K, 256) and a chunk: 34.5 KiB a block, 48 KiB for K = 1024, of which
//                 an A100 takes three blocks.
// A larger K costs: 1,800 candidates and 6 choices for K = 256, 9,600 and 7 for K = 1024, where all of the first chunk
// are candidates. The worst case is a rising row: all are candidates and every chunk ends with a choice among all of
// its columns: linear in V, about 10 times the instructions.
//
// Few rows are split into parts, each a block's: whole segments of two chunks, whose sums are kept apart and added in
// their order. So the same numbers are added in the same order whatever the number of parts, which only the address
// of a row modulo 16 changes. A second kernel chooses among the parts' K best and adds the segments up.

#include "topk.h"

#include "../cpu/codes.h"
#include "row.cuh"
#include "select.cuh"

extern __shared__ __align__(16) unsigned char dynamic_shared[];

namespace {

using namespace asyncopd;

constexpr int kThreads = 256;
constexpr int kBlocks = 4;         // of a multiprocessor: 64 registers a thread
constexpr int kVectors = 2;        // a thread has in flight
constexpr int kSegmentChunks = 2;  // chunks whose exponentials are summed on their own
constexpr int kChunkSlots = kThreads * kVectors;
constexpr int kSegmentSlots = kChunkSlots * kSegmentChunks;
constexpr int kMaxK = 1024;
constexpr int kMaxMergeKeys = 8192;  // of all parts of a row, which one block reads
constexpr int kMaxParts = 65535;

using Buffer = Candidates<kThreads>;

// How many candidates there may be before the next chunk, and how many a choice before the last leaves at most.
// It leaves far fewer than there may be, or it would have to be repeated at once.
__host__ __device__ constexpr int room_for(int k) { return k + (k > 256 ? k : 256); }
__host__ __device__ constexpr int leave_for(int k) { return k + (k > 256 ? k : 256) / 8; }

template <typename T>
constexpr int kChunkColumns = kChunkSlots * Row<T>::kColumns;

template <typename T>
size_t shared_bytes(int64_t k) {
  return sizeof(Key) * (room_for(static_cast<int>(k)) + kChunkColumns<T>);
}

// Leaves the k best of the buffer (all of them if there are no more) on the last call. Before it there are always more
// than it leaves, so nobody can append while somebody still reads the count.
__device__ __forceinline__ Buffer::Bound choose(const Buffer& buffer, int k, bool last, Buffer::Bound bound) {
  const int count = buffer.state.count;
  const int limit = last ? k : leave_for(k);
  if (count <= limit) return bound;
  bound = buffer.find_bound(count, k, limit, 0);
  buffer.keep(bound, count);
  return bound;
}

// Writes a row's results from its k best keys, in any order, and its pair.
template <typename T>
__device__ __forceinline__ void write_row(const Buffer& buffer, int k, int id_bits, Pair pair, Scale scale, int64_t n,
                                          int64_t* ids, float* logprobs, float* lse) {
  int size = 1;
  while (size < k) size *= 2;
  buffer.sort(k, size);
  const RowLogSumExp row(pair, scale);
  if (threadIdx.x == 0) lse[n] = row.lse;
  for (int i = threadIdx.x; i < k; i += kThreads) {
    const Key key = buffer.keys[i];
    ids[n * k + i] = key_id(key, id_bits);
    logprobs[n * k + i] = row.logprob(key_value<T>(static_cast<uint32_t>(key >> id_bits)));
  }
}

// Grid: rows, parts. A part other than the only one writes its k best and the sums of its segments to the scratch.
// max-registers: topk_kernel 64
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    topk_kernel(const T* __restrict__ logits,  // [N, V], row stride `row_stride`
                int64_t row_stride, int64_t vocab, int k,
                int id_bits,  // that V - 1 has
                Scale scale,
                int segment_stride,               // of part_sums: the most segments that a row can have
                Key* __restrict__ part_keys,      // [N, parts, k], 0 where a part has fewer columns
                Pair* __restrict__ part_sums,     // [N, segment_stride, kThreads]
                int64_t* __restrict__ ids,        // [N, k]
                float* __restrict__ logprobs,     // [N, k]
                float* __restrict__ lse) {        // [N]
  constexpr int kColumns = Row<T>::kColumns;
  __shared__ Buffer::State state;
  __shared__ Pair partial[kThreads / 32];
  const Buffer buffer{reinterpret_cast<Key*>(dynamic_shared), state, kValueBits<T> + id_bits};
  const int64_t n = blockIdx.x;
  const int part = blockIdx.y, parts = gridDim.y;
  const Row<T> row(logits + n * row_stride, vocab);
  const int slots = row.slots();
  const int segments = (slots + kSegmentSlots - 1) / kSegmentSlots;
  int segment = static_cast<int>(int64_t{segments} * part / parts);
  const int end = min(static_cast<int>(int64_t{segments} * (part + 1) / parts) * kSegmentSlots, slots);

  int slot = segment * kSegmentSlots + static_cast<int>(threadIdx.x);
  uint4 ahead[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) ahead[v] = row.load(slot + v * kThreads, end);

  // What does not beat the threshold is no candidate; NaN lets everything pass, and a NaN always passes.
  float threshold = quiet_nan();
  if (k <= kThreads) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      float z[kColumns];
      Row<T>::unpack(ahead[v], z);
      buffer.keys[v * kThreads + threadIdx.x] = make_key(value_key<T>(largest(z)), 0, id_bits);
    }
    const Key lowest = buffer.find_bound(kChunkSlots, k, k, id_bits).lowest();
    threshold = value_below<T>(static_cast<uint32_t>(lowest >> id_bits));
  }
  buffer.clear();
  __syncthreads();

  Pair total{-kInf, 0.0f};
  Accumulator sum;
  Buffer::Bound bound;
  int chunk = 0;
  for (int begin = segment * kSegmentSlots; begin < end; begin += kChunkSlots, ++chunk) {
    int appended = 0;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      float z[kColumns];
      Row<T>::unpack(ahead[v], z);
      const int mine = slot + v * kThreads;
      ahead[v] = row.load(mine + kChunkSlots, end);
      const Accumulator::Seen seen = sum.add(z, scale.scale, scale.slack);
      if (seen.top <= threshold && !seen.nan) continue;
      // Few lanes get here. A bit for each column that passes.
      unsigned passing = 0;
#pragma unroll
      for (int j = 0; j < kColumns; ++j) passing |= z[j] <= threshold ? 0u : 1u << j;
      for (; passing != 0; passing &= passing - 1) {
        const int column = row.first_column(mine) + __ffs(passing) - 1;
        // Before the row begins, or beyond its end: a chunk is never two parts'.
        if (static_cast<unsigned>(column) >= static_cast<unsigned>(row.vocab)) continue;
        // The value is read again, from L1: that is shorter than to pick it from eight registers.
        const Key key = make_key(value_key<T>(to_float(row.start[column])), column, id_bits);
        appended = buffer.append(true, key);
      }
    }
    slot += kChunkSlots;
    const bool last = begin + kChunkSlots >= end;
    if (last || chunk % kSegmentChunks == kSegmentChunks - 1) {
      if (parts == 1) {
        total = merge(total, sum.pair(), scale.scale);
      } else {
        part_sums[(n * segment_stride + segment) * kThreads + threadIdx.x] = sum.pair();
      }
      sum = Accumulator();
      ++segment;
    }
    // Whoever appended last knows how many there are. One barrier: who passes it may append again.
    if (__syncthreads_or(last || appended > room_for(k))) {
      bound = choose(buffer, k, last, bound);
      threshold = key_value<T>(static_cast<uint32_t>(bound.lowest() >> id_bits));
    }
  }
  if (parts == 1) {
    write_row<T>(buffer, k, id_bits, merge_block<kThreads>(total, partial, scale.scale), scale, n, ids, logprobs, lse);
  } else {
    const int count = state.count;
    Key* out = part_keys + (n * parts + part) * k;
    for (int i = threadIdx.x; i < k; i += kThreads) out[i] = i < count ? buffer.keys[i] : 0;
  }
}

// One block a row.
// max-registers: topk_merge_kernel 48
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    topk_merge_kernel(const T* __restrict__ logits,  // whose addresses say how many segments a row has
                      int64_t row_stride, int64_t vocab, int k, int id_bits, Scale scale, int parts,
                      int segment_stride,
                      const Key* __restrict__ part_keys,   // [N, parts, k]
                      const Pair* __restrict__ part_sums,  // [N, segment_stride, kThreads]
                      int64_t* __restrict__ ids,           // [N, k]
                      float* __restrict__ logprobs,        // [N, k]
                      float* __restrict__ lse) {           // [N]
  __shared__ Buffer::State state;
  __shared__ Pair partial[kThreads / 32];
  const Buffer buffer{reinterpret_cast<Key*>(dynamic_shared), state, kValueBits<T> + id_bits};
  const int64_t n = blockIdx.x;
  buffer.clear();
  __syncthreads();

  const int count = parts * k;
  Buffer::Bound bound;
  for (int begin = 0; begin < count; begin += kThreads) {
    const int i = begin + threadIdx.x;
    const Key key = i < count ? part_keys[n * count + i] : 0;
    const int appended = buffer.append(key != 0 && key >= bound.lowest(), key);
    const bool last = begin + kThreads >= count;
    if (__syncthreads_or(last || appended > room_for(k))) bound = choose(buffer, k, last, bound);
  }

  const Row<T> row(logits + n * row_stride, vocab);
  const int segments = (row.slots() + kSegmentSlots - 1) / kSegmentSlots;
  Pair total{-kInf, 0.0f};
  for (int segment = 0; segment < segments; ++segment) {
    total = merge(total, part_sums[(n * segment_stride + segment) * kThreads + threadIdx.x], scale.scale);
  }
  write_row<T>(buffer, k, id_bits, merge_block<kThreads>(total, partial, scale.scale), scale, n, ids, logprobs, lse);
}

// ------------------------------------------------------------------------------------------------------------- host

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t columns_of(int dtype) { return dtype == kFloat32 ? 4 : 8; }

// Of a row at any address.
int64_t most_segments(int dtype, int64_t vocab) {
  const int64_t columns = columns_of(dtype);
  return ceil_div(ceil_div(vocab + columns - 1, columns), kSegmentSlots);
}

struct Problem {
  const void* logits;
  int64_t row_stride, rows, vocab, k, parts, segment_stride;
  Scale scale;
  Key* part_keys;
  Pair* part_sums;
  int64_t* ids;
  float* logprobs;
  float* lse;
  cudaStream_t stream;
};

template <typename T>
cudaError_t launch_topk(const Problem& p) {
  int id_bits = 0;
  while ((p.vocab - 1) >> id_bits != 0) ++id_bits;
  const auto* logits = static_cast<const T*>(p.logits);
  const int k = static_cast<int>(p.k), parts = static_cast<int>(p.parts);
  const int segment_stride = static_cast<int>(p.segment_stride);
  const size_t bytes = shared_bytes<T>(k);
  // Above 48 KiB in all a kernel has to be told, once for each device; it costs nothing to tell it again. Of the largest
  // K, so that no other thread's call finds less than it needs.
  cudaError_t error = cudaFuncSetAttribute(topk_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           static_cast<int>(shared_bytes<T>(kMaxK)));
  if (error != cudaSuccess) return error;
  const unsigned rows = static_cast<unsigned>(p.rows);
  error = launch(topk_kernel<T>, dim3(rows, static_cast<unsigned>(parts)), kThreads, bytes, p.stream, logits,
                 p.row_stride, p.vocab, k, id_bits, p.scale, segment_stride, p.part_keys, p.part_sums, p.ids,
                 p.logprobs, p.lse);
  if (error != cudaSuccess || parts == 1) return error;
  const size_t merge_bytes = sizeof(Key) * (room_for(k) + kThreads);
  return launch(topk_merge_kernel<T>, dim3(rows), kThreads, merge_bytes, p.stream, logits, p.row_stride, p.vocab, k,
                id_bits, p.scale, parts, segment_stride, p.part_keys, p.part_sums, p.ids, p.logprobs, p.lse);
}

}  // namespace

int64_t asyncopd_cuda_topk_parts(int dtype, int64_t rows, int64_t vocab, int64_t k, int64_t multiprocessors) {
  if (rows < 1 || k < 1) return 1;
  const int64_t segments = ceil_div(vocab, columns_of(dtype) * kSegmentSlots);
  // As many segments to a part as leave about a block for each place on the device.
  const int64_t each = segments * rows / (multiprocessors * kBlocks);
  const int64_t parts = each > 1 ? ceil_div(segments, each) : segments;
  const int64_t most = kMaxMergeKeys / k < kMaxParts ? kMaxMergeKeys / k : kMaxParts;
  return parts < 1 ? 1 : parts < most ? parts : most;
}

int64_t asyncopd_cuda_topk_scratch_bytes(int dtype, int64_t rows, int64_t vocab, int64_t k, int64_t parts) {
  if (parts == 1) return 0;
  const int64_t sums = most_segments(dtype, vocab) * kThreads * static_cast<int64_t>(sizeof(Pair));
  return rows * (sums + parts * k * static_cast<int64_t>(sizeof(Key)));
}

int asyncopd_cuda_topk_logprobs(const void* logits, int dtype, int64_t row_stride, int64_t rows, int64_t vocab,
                                int64_t k, double inv_temperature, int64_t parts, void* scratch, int64_t* ids,
                                float* logprobs, float* lse, int device, void* stream) {
  const bool known = (dtype == kFloat32 || dtype == kBFloat16 || dtype == kFloat16) && rows >= 0 &&
                     rows <= INT32_MAX && vocab <= kMaxVocab && k >= 1 && k <= kMaxK && k <= vocab && parts >= 1 &&
                     parts <= kMaxParts && parts * k <= INT32_MAX && (parts == 1 || scratch != nullptr);
  if (!known) return kBadArgument;
  if (rows == 0) return kOk;  // an empty grid is a launch error
  // As in gather.cu: this library's runtime has a current device of its own.
  cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) return -static_cast<int>(error);
  const int64_t segment_stride = most_segments(dtype, vocab);
  auto* part_sums = static_cast<Pair*>(scratch);
  auto* part_keys = reinterpret_cast<Key*>(part_sums + rows * segment_stride * kThreads);
  const Problem problem{logits, row_stride, rows, vocab, k, parts, segment_stride, make_scale(inv_temperature),
                        part_keys, part_sums, ids, logprobs, lse, static_cast<cudaStream_t>(stream)};
  switch (dtype) {
    case kFloat32: error = launch_topk<float>(problem); break;
    case kBFloat16: error = launch_topk<__nv_bfloat16>(problem); break;
    default: error = launch_topk<__half>(problem); break;
  }
  return error == cudaSuccess ? kOk : -static_cast<int>(error);
}
