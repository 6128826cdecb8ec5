// Attention of one new token over the cache, and the cache's own bookkeeping.
//
// One head's past is shared out to blocks, so that the whole card reads the cache also where there is one sequence with
// 32 heads. A block goes through its part TOKENS at a time and keeps a partial softmax (the maximum, the sum, the
// weighted values); the block that arrives last puts those of a head together. What comes in is the product that makes
// query, key and value: its bias and the rotary embedding are added here, and the block that has the new token's place in
// the cache writes key and value there. Nothing else of the cache ever moves.
//
// Compiled with -DD=<head size> and, in fp16, -DHALF; -DTHREADS=<of a block>, -DTOKENS=<of a round of a block> and
// -DMOST=<blocks of a head>, as `kernels.defines` has them. Products and sums are made in fp32.

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

// A lane's share of a query or a key with its bias, turned by the rotary embedding: x * cos + swapped(x) * sin, where
// swapped exchanges the quarters of a head, first and second, third and fourth, and sin has the signs.
__device__ inline void turn(float *turned, const T *x, const T *bias, const T *cos, const T *sin, int lane) {
  const int far = (lane * VEC ^ D / 4) / VEC; // the lane that has the other quarter
  const Numbers near_x = ((const Numbers *)x)[lane], near_bias = ((const Numbers *)bias)[lane];
  const Numbers far_x = ((const Numbers *)x)[far], far_bias = ((const Numbers *)bias)[far];
  const Numbers c = ((const Numbers *)cos)[lane], s = ((const Numbers *)sin)[lane];
  for (int i = 0; i < VEC; i++) {
    const int j = D / 4 < VEC ? i ^ D / 4 : i; // or it has both itself
    turned[i] = (to_float(near_x.at[i]) + to_float(near_bias.at[i])) * to_float(c.at[i]) +
                (to_float(far_x.at[j]) + to_float(far_bias.at[j])) * to_float(s.at[i]);
  }
}

// mixed: (batch, heads, 3, D), query, key and value as the product left them. bias: (heads, 3, D). cos, sin: (batch, D).
// keys, values: (batch, room, heads, D). seen: (batch, heads, D).
// places: (batch), the new token's place in its row of the cache: it sees all before it, and itself.
// partial: (batch * heads, blocks, D + 2) fp32. arrived: (batch * heads), zero between launches.
// span: tokens of a block, a multiple of TOKENS. Grid (blocks, heads, batch), blocks * span > the largest place.
extern "C" __global__ void __launch_bounds__(THREADS)
    attend(const T *mixed, const T *bias, const T *cos, const T *sin, T *keys, T *values, T *seen,
           const long long *places, float *partial, unsigned int *arrived, int heads, int room, int span, float scale) {
  const int place = (int)places[blockIdx.z];
  const int start = (int)blockIdx.x * span;
  if (start > place) return;
  const int blocks = place / span + 1; // that do not return above
  const int end = start + span < place ? start + span : place; // of the past
  const long long row = blockIdx.z, head = row * heads + blockIdx.y;
  const int thread = (int)threadIdx.x, lane = thread % LANES, group = thread / LANES;
  const long long step = (long long)heads * D; // from a token to the next
  T *my_keys = keys + (row * room * heads + blockIdx.y) * D, *my_values = values + (my_keys - keys);
  const T *query = mixed + head * 3 * D;
  bias += (long long)blockIdx.y * 3 * D, cos += row * D, sin += row * D;

  // A row that does not exist is read as the last one, and not counted: no load waits for a condition.
  Numbers k[ROUNDS], v[ROUNDS];
  auto load = [&](Numbers(&into)[ROUNDS], const T *rows, int from) {
#pragma unroll
    for (int round = 0; round < ROUNDS; round++) {
      const int token = from + round * GROUPS + group;
      into[round] = ((const Numbers *)(rows + (token < end ? token : end - 1) * step))[lane];
    }
  };
  if (start < end) load(k, my_keys, start);

  float q[VEC];
  turn(q, query, bias, cos, sin, lane);
  for (int i = 0; i < VEC; i++) q[i] *= scale * 1.4426950408889634f; // powers of 2 are quicker than those of e

  // The new token, which is the first that group 0 of one block sees.
  float most = NEVER, total = 0, sums[VEC] = {};
  if (place < start + span) {
    float turned[VEC], sum = 0;
    turn(turned, query + D, bias + D, cos, sin, lane);
    const Numbers value = ((const Numbers *)(query + 2 * D))[lane];
    const Numbers value_bias = ((const Numbers *)(bias + 2 * D))[lane];
    Numbers key_row, value_row;
    for (int i = 0; i < VEC; i++) {
      from_float(key_row.at[i], turned[i]);
      from_float(value_row.at[i], to_float(value.at[i]) + to_float(value_bias.at[i]));
      sum += q[i] * to_float(key_row.at[i]);
    }
    for (int far = LANES / 2; far; far /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, far);
    if (group == 0) {
      most = sum, total = 1;
      for (int i = 0; i < VEC; i++) sums[i] = to_float(value_row.at[i]);
      ((Numbers *)(my_keys + place * step))[lane] = key_row;
      ((Numbers *)(my_values + place * step))[lane] = value_row;
    }
  }
  for (int from = start; from < end; from += TOKENS) {
    load(v, my_values, from); // on their way while the scores are made
    float score[ROUNDS], higher = most;
#pragma unroll
    for (int round = 0; round < ROUNDS; round++) {
      const int slot = round * GROUPS + group;
      float sum = 0;
      for (int i = 0; i < VEC; i++) sum += q[i] * to_float(k[round].at[i]);
      for (int far = LANES / 2; far; far /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, far); // of the row's lanes
      score[round] = slot < TOKENS && from + slot < end ? sum : NEVER;
      higher = score[round] > higher ? score[round] : higher;
    }
    if (from + TOKENS < end) load(k, my_keys, from + TOKENS); // on their way while the values are weighted
    if (higher == NEVER) continue; // fewer rows than groups
    const float less = exp2f(most - higher);
    most = higher, total *= less;
    for (int i = 0; i < VEC; i++) sums[i] *= less;
#pragma unroll
    for (int round = 0; round < ROUNDS; round++) {
      const float share = exp2f(score[round] - most); // 0 for what does not exist
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
      const float weight = exp2f(group_most[other] - block_most);
      block_total += weight * group_total[other];
      sum += weight * group_sums[other][thread];
    }
  if (blocks == 1) {
    if (thread < D) from_float(seen[head * D + thread], sum / block_total);
    return;
  }

  // The blocks of this head together, by the last of them.
  float *all = partial + head * gridDim.x * (D + 2), *own = all + blockIdx.x * (D + 2);
  if (thread < D) own[thread] = sum;
  if (thread == 0) own[D] = block_most, own[D + 1] = block_total;
  __shared__ bool is_last;
  __shared__ float weights[MOST], totals[MOST];
  __syncthreads();
  if (thread == 0) {
    __threadfence(); // for what all threads wrote: they have met
    is_last = atomicAdd(arrived + head, 1u) == (unsigned int)blocks - 1;
    __threadfence();
  }
  __syncthreads();
  if (!is_last) return;
  if (thread == 0) arrived[head] = 0;
  if (thread < blocks) {
    weights[thread] = FRESH(all + thread * (D + 2) + D);
    totals[thread] = FRESH(all + thread * (D + 2) + D + 1);
  }
  __syncthreads();
  float head_most = NEVER, head_total = 0;
  for (int other = 0; other < blocks; other++) head_most = weights[other] > head_most ? weights[other] : head_most;
  __syncthreads();
  if (thread < blocks) weights[thread] = weights[thread] == NEVER ? 0 : exp2f(weights[thread] - head_most);
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
extern "C" __global__ void advance(long long *position_ids, long long *places, int batch) {
  const int row = (int)(blockIdx.x * blockDim.x + threadIdx.x);
  if (row < batch) position_ids[2 * row + 1]++, places[row]++;
}
