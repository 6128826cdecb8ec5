// Attention of one new token over the cache, and the cache's own bookkeeping.
//
// One head's past is shared out to blocks, so that the whole card reads the cache also where there is one sequence with
// 32 heads. A block goes through its part TOKENS at a time and keeps a partial softmax (the maximum, the sum, the weighted
// values); the block that arrives last puts those of a head together. The new token's key and value are taken from where
// the engine left them, and the block that has their place in the cache writes them there: nothing else ever moves.
//
// Compiled with -DD=<head size> and, in fp16, -DHALF. Products and sums are made in fp32.

#define THREADS 128
#define TOKENS 64                 // of a round of a block
#define MOST 128                  // blocks of a head
#define VEC (16 / (int)sizeof(T)) // numbers of one load
#define LANES (D / VEC)           // threads that share a row of D numbers
#define GROUPS (THREADS / LANES)  // rows that a block reads at once
#define ROUNDS ((TOKENS + GROUPS - 1) / GROUPS)

#ifdef HALF
typedef unsigned short T;
#else
typedef float T;
#endif

#ifdef __CUDACC_RTC__ // elsewhere a test supplies these
__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(unsigned short x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
  return y;
}
__device__ inline void from_float(float &y, float x) { y = x; }
__device__ inline void from_float(unsigned short &y, float x) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x)); }
#define NEVER __int_as_float(0xff800000)
#define FRESH(place) __ldcg(place) // past the first cache, which may hold what another block has overwritten since
#endif

struct alignas(16) Numbers {
  T at[VEC];
};

// query, key, value, seen: (batch, heads, D). keys, values: (batch, heads, room, D).
// visible: (batch, 2), the first token of the cache that may be seen and the place of the new one, which is seen, too.
// partial: (batch * heads, blocks, D + 2) fp32. arrived: (batch * heads), zero between launches.
// span: tokens of a block, a multiple of TOKENS. Grid (blocks, heads, batch), blocks * span > the largest place.
extern "C" __global__ void __launch_bounds__(THREADS)
    attend(const T *query, const T *key, const T *value, T *keys, T *values, T *seen, const long long *visible,
           float *partial, unsigned int *arrived, int heads, int room, int span, float scale) {
  const int first = (int)visible[2 * blockIdx.z], place = (int)visible[2 * blockIdx.z + 1];
  const int start = (int)blockIdx.x * span, end = start + span < place + 1 ? start + span : place + 1;
  if (start > place) return;
  const int blocks = place / span + 1; // that do not return above
  const long long head = (long long)blockIdx.z * heads + blockIdx.y;
  const int thread = (int)threadIdx.x, lane = thread % LANES, group = thread / LANES;
  T *my_keys = keys + head * room * D, *my_values = values + head * room * D;
  const Numbers q = ((const Numbers *)(query + head * D))[lane];

  float most = NEVER, total = 0, sums[VEC] = {};
  for (int from = start; from < end; from += TOKENS) {
    // All loads first: they travel together.
    Numbers k[ROUNDS], v[ROUNDS];
#pragma unroll
    for (int round = 0; round < ROUNDS; round++) {
      const int row = round * GROUPS + group, token = from + row;
      if (row < TOKENS && token >= first && token < place) {
        k[round] = ((const Numbers *)(my_keys + (long long)token * D))[lane];
        v[round] = ((const Numbers *)(my_values + (long long)token * D))[lane];
      } else if (row < TOKENS && token == place) {
        k[round] = ((const Numbers *)(key + head * D))[lane];
        v[round] = ((const Numbers *)(value + head * D))[lane];
        ((Numbers *)(my_keys + (long long)token * D))[lane] = k[round];
        ((Numbers *)(my_values + (long long)token * D))[lane] = v[round];
      }
    }
    // Scores; a row's product is summed over its lanes.
    float score[ROUNDS], higher = most;
#pragma unroll
    for (int round = 0; round < ROUNDS; round++) {
      const int row = round * GROUPS + group, token = from + row;
      const bool is_seen = row < TOKENS && token >= first && token <= place;
      float sum = 0;
      if (is_seen)
        for (int i = 0; i < VEC; i++) sum += to_float(q.at[i]) * to_float(k[round].at[i]);
      for (int far = LANES / 2; far; far /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, far);
      score[round] = is_seen ? sum * scale : NEVER;
      higher = score[round] > higher ? score[round] : higher;
    }
    if (higher == NEVER) continue; // all padding so far
    const float less = most == NEVER ? 0 : expf(most - higher);
    most = higher, total *= less;
    for (int i = 0; i < VEC; i++) sums[i] *= less;
#pragma unroll
    for (int round = 0; round < ROUNDS; round++) {
      if (score[round] == NEVER) continue; // what is hidden may be anything, also not a number
      const float share = expf(score[round] - most);
      total += share;
      for (int i = 0; i < VEC; i++) sums[i] += share * to_float(v[round].at[i]);
    }
  }

  // The groups of this block together.
  __shared__ float group_most[GROUPS], group_total[GROUPS], group_sums[GROUPS][D];
  if (lane == 0) group_most[group] = most, group_total[group] = total;
  for (int i = 0; i < VEC; i++) group_sums[group][lane * VEC + i] = sums[i];
  __syncthreads();
  float block_most = NEVER, block_total = 0, sum = 0;
  for (int other = 0; other < GROUPS; other++)
    block_most = group_most[other] > block_most ? group_most[other] : block_most;
  if (thread < D)
    for (int other = 0; other < GROUPS; other++) {
      if (group_most[other] == NEVER) continue;
      const float weight = expf(group_most[other] - block_most);
      block_total += weight * group_total[other];
      sum += weight * group_sums[other][thread];
    }
  if (blocks == 1) {
    if (thread < D) from_float(seen[head * D + thread], sum / block_total);
    return;
  }

  // The blocks of this head together, by the last of them.
  float *all = partial + head * gridDim.x * (D + 2), *mine = all + blockIdx.x * (D + 2);
  if (thread < D) mine[thread] = sum;
  if (thread == 0) mine[D] = block_most, mine[D + 1] = block_total;
  __shared__ bool is_last;
  __shared__ float weights[MOST], totals[MOST];
  __threadfence();
  __syncthreads();
  if (thread == 0) is_last = atomicAdd(arrived + head, 1u) == (unsigned int)blocks - 1;
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  if (thread == 0) arrived[head] = 0;
  if (thread < blocks) {
    weights[thread] = FRESH(all + thread * (D + 2) + D);
    totals[thread] = FRESH(all + thread * (D + 2) + D + 1);
  }
  __syncthreads();
  float head_most = NEVER, head_total = 0;
  for (int other = 0; other < blocks; other++) head_most = weights[other] > head_most ? weights[other] : head_most;
  __syncthreads();
  if (thread < blocks) weights[thread] = weights[thread] == NEVER ? 0 : expf(weights[thread] - head_most);
  __syncthreads();
  if (thread >= D) return;
  sum = 0;
#pragma unroll 8
  for (int other = 0; other < blocks; other++) {
    head_total += weights[other] * totals[other];
    sum += weights[other] * FRESH(all + other * (D + 2) + thread);
  }
  from_float(seen[head * D + thread], sum / head_total);
}

// One token on: its block position (the second row of position_ids, (batch, 2, 1)) and its place in the cache.
extern "C" __global__ void advance(long long *position_ids, long long *visible, int batch) {
  const int row = (int)(blockIdx.x * blockDim.x + threadIdx.x);
  if (row < batch) position_ids[2 * row + 1]++, visible[2 * row + 1]++;
}
