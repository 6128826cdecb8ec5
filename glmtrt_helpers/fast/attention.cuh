// What the two programs, decoder.cu and prompt.cu, have in common. Compiled with -D for HIDDEN, HEADS and INNER.
#define SIZE (HIDDEN / HEADS) // of a head
#define LANES (SIZE / 8)      // that share a key
#define AT_ONCE 4             // keys that such lanes load before they use the first
#define NEVER (-1e30f)
#define SCALE (rsqrtf(SIZE) * 1.44269504f) // of scores that are powers of 2, which are quicker than those of e

struct Layer {
  const half_t *qkv, *dense, *up, *down, *qkv_bias, *dense_bias, *up_bias, *down_bias;
  const half_t *norm1, *norm1_bias, *norm2, *norm2_bias;
};
// A new token: its two positions, its slot of the cache and its place there, and how many tokens of the slot it sees.
struct Row {
  int id, position, block_position, slot, place, end;
};

DEVICE float gelu(float x) { return 0.5f * x * (1 + tanhf(0.79788456f * x * (1 + 0.044715f * x * x))); }

// What two parts of a past make together: scores that are powers of 2, of which `most` is the largest and `sum` the sum of
// 2^(score - most); seen: the values, weighted likewise.
template <int N> DEVICE void join(float &most, float &sum, float (&seen)[N], float other_most, float other_sum, const float (&other)[N]) {
  const float top = fmaxf(most, other_most), less = exp2_fast(most - top), more = exp2_fast(other_most - top);
  most = top, sum = fmaf(sum, less, other_sum * more);
  UNROLL for (int n = 0; n < N; n++) seen[n] = fmaf(seen[n], less, other[n] * more);
}

// The threads' look at the keys of a head from `start` to `end`, HIDDEN numbers apart: LANES of them share a key, and each
// has 8 numbers of the query and of what is seen. At the end, lanes of a warp have its part of the softmax.
template <int THREADS_>
DEVICE void look(const half_t *keys, const half_t *values, const Quad (&query)[2], int start, int end, float &most, float &sum,
                 float (&seen)[8]) {
  constexpr int AT_A_TIME = THREADS_ / LANES;
  const int lane = thread_id() % LANES;
  most = NEVER, sum = 0;
  UNROLL for (int n = 0; n < 8; n++) seen[n] = 0;
  ROLLED for (int first = start; first < end; first += AT_ONCE * AT_A_TIME) {
    const int from = first + thread_id() / LANES;
    Vec k[AT_ONCE], v[AT_ONCE];
    float score[AT_ONCE], top = most;
    UNROLL for (int i = 0; i < AT_ONCE; i++) { // what does not exist is read as the last, and not counted
      const int token = from + i * AT_A_TIME < end ? from + i * AT_A_TIME : end - 1;
      k[i] = fresh_once((const Vec *)(keys + (long long)token * HIDDEN) + lane);
      v[i] = fresh_once((const Vec *)(values + (long long)token * HIDDEN) + lane);
    }
    UNROLL for (int i = 0; i < AT_ONCE; i++) {
      float s = 0;
      UNROLL for (int n = 0; n < 4; n++) {
        s = fmaf(query[n / 2].f[n % 2 * 2], low(k[i].w[n]), s);
        s = fmaf(query[n / 2].f[n % 2 * 2 + 1], high(k[i].w[n]), s);
      }
      UNROLL for (int far = LANES / 2; far; far /= 2) s += swap_with(s, far);
      score[i] = from + i * AT_A_TIME < end ? s : NEVER;
      top = fmaxf(top, score[i]);
    }
    const float less = exp2_fast(most - top);
    most = top, sum *= less;
    UNROLL for (int n = 0; n < 8; n++) seen[n] *= less;
    UNROLL for (int i = 0; i < AT_ONCE; i++) {
      const float part = from + i * AT_A_TIME < end ? exp2_fast(score[i] - most) : 0;
      sum += part;
      UNROLL for (int n = 0; n < 8; n++) seen[n] = fmaf(part, n % 2 ? high(v[i].w[n / 2]) : low(v[i].w[n / 2]), seen[n]);
    }
  }
  UNROLL for (int far = LANES; far < 32; far *= 2) { // those of a warp
    const float other_most = swap_with(most, far), other_sum = swap_with(sum, far);
    float other[8];
    UNROLL for (int n = 0; n < 8; n++) other[n] = swap_with(seen[n], far);
    join(most, sum, seen, other_most, other_sum, other);
  }
}

struct Best {
  float score;
  int id, bad;
};
DEVICE Best no_best() { return {-3.4e38f, 0x7fffffff, 0}; }
DEVICE void better(Best &mine, float score, int id, int bad) { // the lower id of two that are equal
  if (score > mine.score || (score == mine.score && id < mine.id)) mine.score = score, mine.id = id;
  mine.bad |= bad;
}
DEVICE void better_of_lanes(Best &mine, int far) {
  const float score = swap_with(mine.score, far);
  const int id = swap_with(mine.id, far), bad = swap_with(mine.bad, far);
  better(mine, score, id, bad);
}
// The state of a row after a token was chosen.
DEVICE void advance(Row &row, int id) { row.id = id, row.block_position++, row.place++, row.end = row.place + 1; }
