// What lies between the matrix products of a prompt, or of a step of more rows than decoder.cu takes. The products are
// cuBLASLt's; here are the embedding, LayerNorm, the rotary embedding with the cache, attention, and the choice of a token.
// A row is a token, of whatever chat; rows: (tokens) of `Row`. Compiled with -D for HIDDEN, HEADS and INNER.

#define WIDE 256                             // threads of the kernels that take a row each
#define TILE 64                              // rows, and keys, of a tile of attention: 16 rows a warp
#define KEY_PITCH (2 * SIZE + 64)            // bytes from key to key in shared memory, so that no two that are read at
#define VALUE_PITCH (2 * SIZE + 16)          // once share a bank; values are read another way
#define VECTORS_OF_ROW (HIDDEN / 8)

// hidden (rows, HIDDEN) of the tokens.
KERNEL void __launch_bounds__(WIDE) embed(const half_t *embedding, const Row *rows, float *hidden) {
  const long long row = block_id();
  for (int i = thread_id(); i < VECTORS_OF_ROW; i += WIDE) {
    const Vec from = ((const Vec *)(embedding + (long long)rows[row].id * HIDDEN))[i];
    Quad *to = (Quad *)(hidden + row * HIDDEN) + 2 * i;
    UNROLL for (int k = 0; k < 2; k++)
      to[k] = {{low(from.w[2 * k]), high(from.w[2 * k]), low(from.w[2 * k + 1]), high(from.w[2 * k + 1])}};
  }
}

// The sum over all threads of a block; places: a number for each warp.
DEVICE float sum_of_block(float mine, float *places) {
  UNROLL for (int far = 16; far; far /= 2) mine += swap_with(mine, far);
  sync_block();
  if (thread_id() % 32 == 0) places[thread_id() / 32] = mine;
  sync_block();
  float sum = 0;
  UNROLL for (int warp = 0; warp < WIDE / 32; warp++) sum += places[warp];
  return sum;
}
// LayerNorm of hidden (rows, HIDDEN), as activations x of a product. In hidden stays what that product is added to: the
// LayerNorm times alpha, and the product's bias. which: the rows, one for each block, or null for all in order.
KERNEL void __launch_bounds__(WIDE)
    normalize(float *hidden, half_t *x, const half_t *weight, const half_t *bias, const half_t *next_bias, float epsilon, float alpha,
              const int *which) {
  constexpr int COUNT = (VECTORS_OF_ROW + WIDE - 1) / WIDE;
  float *places = (float *)shared_memory(), v[COUNT][8], sum = 0, squares = 0;
  Quad *row = (Quad *)(hidden + (long long)(which ? which[block_id()] : block_id()) * HIDDEN);
  UNROLL for (int i = 0; i < COUNT; i++) {
    const int at = thread_id() + i * WIDE;
    UNROLL for (int k = 0; k < 8; k++) sum += v[i][k] = at < VECTORS_OF_ROW ? row[2 * at + k / 4].f[k % 4] : 0;
  }
  const float mean = sum_of_block(sum, places) / HIDDEN;
  UNROLL for (int i = 0; i < COUNT; i++)
    UNROLL for (int k = 0; k < 8; k++) {
      v[i][k] -= mean;
      if (thread_id() + i * WIDE < VECTORS_OF_ROW) squares = fmaf(v[i][k], v[i][k], squares);
    }
  const float scale = rsqrtf(sum_of_block(squares, places) / HIDDEN + epsilon);
  UNROLL for (int i = 0; i < COUNT; i++) {
    const int at = thread_id() + i * WIDE;
    if (at >= VECTORS_OF_ROW) continue;
    const Vec gamma = ((const Vec *)weight)[at], beta = ((const Vec *)bias)[at];
    Vec out;
    UNROLL for (int k = 0; k < 8; k++)
      v[i][k] = fmaf(v[i][k] * scale, k % 2 ? high(gamma.w[k / 2]) : low(gamma.w[k / 2]), k % 2 ? high(beta.w[k / 2]) : low(beta.w[k / 2]));
    UNROLL for (int k = 0; k < 4; k++) out.w[k] = pack(v[i][2 * k], v[i][2 * k + 1]);
    ((Vec *)(x + (long long)block_id() * HIDDEN))[at] = out;
    if (!next_bias) continue;
    const Vec add = ((const Vec *)next_bias)[at];
    UNROLL for (int k = 0; k < 8; k++) v[i][k] = fmaf(alpha, v[i][k], k % 2 ? high(add.w[k / 2]) : low(add.w[k / 2]));
    UNROLL for (int k = 0; k < 2; k++) row[2 * at + k] = {{v[i][4 * k], v[i][4 * k + 1], v[i][4 * k + 2], v[i][4 * k + 3]}};
  }
}

// qkv (rows, HEADS, 3, SIZE) with its bias: query and key turned; query (rows, HIDDEN), the others into the cache of a layer.
KERNEL void __launch_bounds__(WIDE)
    rotate(const half_t *qkv, const half_t *cos, const half_t *sin, const Row *rows, half_t *query, half_t *keys, half_t *values, int room) {
  const long long row = block_id();
  const Row own = rows[row];
  const long long place = ((long long)own.slot * room + own.place) * HIDDEN;
  for (int i = thread_id(); i < VECTORS_OF_ROW; i += WIDE) { // 8 dimensions of a head; their partners are SIZE / 4 away
    const int head = 8 * i / SIZE, d = 8 * i % SIZE, far = d ^ SIZE / 4;
    const half_t *from = qkv + (row * HEADS + head) * 3 * SIZE;
    const long long angle = (long long)(d < SIZE / 2 ? own.position : own.block_position) * (SIZE / 4) + d % (SIZE / 4);
    const Vec c = *(const Vec *)(cos + angle), s = *(const Vec *)(sin + angle);
    UNROLL for (int part = 0; part < 2; part++) {
      const Vec near = *(const Vec *)(from + part * SIZE + d), other = *(const Vec *)(from + part * SIZE + far);
      Vec out;
      UNROLL for (int k = 0; k < 4; k++) {
        const float sign = far > d ? -1 : 1;
        out.w[k] = pack(fmaf(low(near.w[k]), low(c.w[k]), sign * low(other.w[k]) * low(s.w[k])),
                        fmaf(high(near.w[k]), high(c.w[k]), sign * high(other.w[k]) * high(s.w[k])));
      }
      *(Vec *)((part ? keys + place : query + row * HIDDEN) + 8 * i) = out;
    }
    *(Vec *)(values + place + 8 * i) = *(const Vec *)(from + 2 * SIZE + d);
  }
}

// Attention of up to TILE successive rows of one slot. tiles: of each its first row and their number.
// Grid (tiles, HEADS), 128 threads. seen: (rows, HIDDEN).
KERNEL void __launch_bounds__(128)
    attend_tiles(const half_t *query, const half_t *keys, const half_t *values, const Row *rows, const int *tiles, half_t *seen, int room) {
  constexpr int STEPS = SIZE / 32, COLUMNS = SIZE / 8;
  const int lane = thread_id() % 32, warp = thread_id() / 32, g = lane / 4, q = lane % 4, head = block_id(1);
  const int first = tiles[2 * block_id()], count = tiles[2 * block_id() + 1];
  byte_t *key_tile = shared_memory(), *value_tile = key_tile + TILE * KEY_PITCH;
  const long long slot = (long long)rows[first].slot * room * HIDDEN + head * SIZE;
  Vec a[2][STEPS];
  int end[2], all = 0; // tokens that a row sees; the rows of the tile together
  UNROLL for (int half = 0; half < 2; half++) {
    const int row = 16 * warp + g + 8 * half;
    end[half] = row < count ? rows[first + row].end : 0;
    UNROLL for (int s = 0; s < STEPS; s++)
      a[half][s] = *(const Vec *)(query + (long long)(first + (row < count ? row : 0)) * HIDDEN + head * SIZE + 32 * s + 8 * q);
  }
  for (int row = 0; row < count; row++) all = rows[first + row].end > all ? rows[first + row].end : all;
  float most[2] = {NEVER, NEVER}, sum[2] = {}, out[COLUMNS][4] = {};
  for (int from = 0; from < all; from += TILE) {
    sync_block();
    for (int i = thread_id(); i < TILE * LANES; i += 128) { // what does not exist is read as the last
      const long long token = from + i / LANES < all ? from + i / LANES : all - 1, at = slot + token * HIDDEN + i % LANES * 8;
      *(Vec *)(key_tile + i / LANES * KEY_PITCH + i % LANES * 16) = *(const Vec *)(keys + at);
      *(Vec *)(value_tile + i / LANES * VALUE_PITCH + i % LANES * 16) = *(const Vec *)(values + at);
    }
    sync_block();
    float score[TILE / 8][4] = {}, top[2] = {most[0], most[1]};
    UNROLL for (int n = 0; n < TILE / 8; n++)
      UNROLL for (int s = 0; s < STEPS; s++) {
        const Vec b = *(const Vec *)(key_tile + (8 * n + g) * KEY_PITCH + 64 * s + 16 * q);
        multiply_tile(score[n], a[0][s].w[0], a[1][s].w[0], a[0][s].w[1], a[1][s].w[1], b.w[0], b.w[1]);
        multiply_tile(score[n], a[0][s].w[2], a[1][s].w[2], a[0][s].w[3], a[1][s].w[3], b.w[2], b.w[3]);
      }
    UNROLL for (int n = 0; n < TILE / 8; n++)
      UNROLL for (int k = 0; k < 4; k++) {
        score[n][k] = from + 8 * n + 2 * q + k % 2 < end[k / 2] ? score[n][k] * SCALE : NEVER;
        top[k / 2] = fmaxf(top[k / 2], score[n][k]);
      }
    UNROLL for (int half = 0; half < 2; half++) {
      UNROLL for (int far = 1; far < 4; far *= 2) top[half] = fmaxf(top[half], swap_with(top[half], far));
      const float less = exp2_fast(most[half] - top[half]);
      most[half] = top[half], sum[half] *= less;
      UNROLL for (int n = 0; n < COLUMNS; n++) out[n][2 * half] *= less, out[n][2 * half + 1] *= less;
    }
    UNROLL for (int n = 0; n < TILE / 8; n++)
      UNROLL for (int k = 0; k < 4; k++) sum[k / 2] += score[n][k] = exp2_fast(score[n][k] - most[k / 2]);
    UNROLL for (int j = 0; j < TILE / 16; j++) {
      const float(*s)[4] = score + 2 * j;
      const unsigned w[4] = {pack(s[0][0], s[0][1]), pack(s[0][2], s[0][3]), pack(s[1][0], s[1][1]), pack(s[1][2], s[1][3])};
      UNROLL for (int n = 0; n < COLUMNS; n += 2) {
        unsigned b[4];
        load_transposed(b, value_tile + 16 * j * VALUE_PITCH + 16 * n, VALUE_PITCH);
        multiply_tile(out[n], w[0], w[1], w[2], w[3], b[0], b[1]);
        multiply_tile(out[n + 1], w[0], w[1], w[2], w[3], b[2], b[3]);
      }
    }
  }
  UNROLL for (int half = 0; half < 2; half++) {
    UNROLL for (int far = 1; far < 4; far *= 2) sum[half] += swap_with(sum[half], far);
    const int row = 16 * warp + g + 8 * half;
    if (row >= count) continue;
    UNROLL for (int n = 0; n < COLUMNS; n++)
      *(unsigned *)(seen + (long long)(first + row) * HIDDEN + head * SIZE + 8 * n + 2 * q) =
          pack(out[n][2 * half] / sum[half], out[n][2 * half + 1] / sum[half]);
  }
}

// Attention of rows of different slots. Grid (HEADS, rows), 128 threads: what runs at once reads whole tokens of the cache,
// which lie side by side, and registers are for 8 blocks of a multiprocessor.
KERNEL void __launch_bounds__(128, 8)
    attend_rows(const half_t *query, const half_t *keys, const half_t *values, const Row *rows, half_t *seen, int room) {
  const int lane = thread_id() % 32, warp = thread_id() / 32, head = block_id();
  const long long at = (long long)block_id(1) * HIDDEN + head * SIZE, slot = (long long)rows[block_id(1)].slot * room * HIDDEN + head * SIZE;
  const Vec from = *(const Vec *)(query + at + lane % LANES * 8);
  Quad scaled[2];
  UNROLL for (int n = 0; n < 8; n++) scaled[n / 4].f[n % 4] = SCALE * (n % 2 ? high(from.w[n / 2]) : low(from.w[n / 2]));
  float most, sum, mine[8], *all = (float *)shared_memory();
  look<128>(keys + slot, values + slot, scaled, 0, rows[block_id(1)].end, most, sum, mine);
  if (lane < LANES) {
    UNROLL for (int n = 0; n < 8; n++) all[warp * (SIZE + 2) + lane * 8 + n] = mine[n];
    if (lane == 0) all[warp * (SIZE + 2) + SIZE] = most, all[warp * (SIZE + 2) + SIZE + 1] = sum;
  }
  sync_block();
  for (int d = thread_id(); d < SIZE; d += 128) {
    float result[1] = {};
    most = NEVER, sum = 0;
    UNROLL for (int n = 0; n < 4; n++) {
      const float *part = all + n * (SIZE + 2), value[1] = {part[d]};
      join(most, sum, result, part[SIZE], part[SIZE + 1], value);
    }
    seen[at + d] = to_half(result[0] / sum);
  }
}

// The best token of each row of logits (rows, vocabulary), and the row's next state. which: as for `normalize`.
KERNEL void __launch_bounds__(WIDE)
    choose(const float *logits, int vocabulary, int blank, const int *which, Row *rows, Row *next, int *tokens) {
  Best *places = (Best *)shared_memory(), best = no_best();
  const float *mine = logits + (long long)block_id() * vocabulary;
  for (int id = thread_id(); id < vocabulary; id += WIDE) better(best, mine[id], id, !(mine[id] - mine[id] == 0));
  UNROLL for (int far = 1; far < 32; far *= 2) better_of_lanes(best, far);
  if (thread_id() % 32 == 0) places[thread_id() / 32] = best;
  sync_block();
  if (thread_id() > 0) return;
  for (int warp = 1; warp < WIDE / 32; warp++) better(best, places[warp].score, places[warp].id, places[warp].bad);
  Row row = rows[which ? which[block_id()] : block_id()];
  advance(row, tokens[block_id()] = best.bad ? blank : best.id);
  next[block_id()] = row;
}
