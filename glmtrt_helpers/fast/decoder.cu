// A decode step of ChatGLM as one persistent kernel: embedding, all layers, scores, the best token, and the state of the
// next step, for 1 to 8 rows (a row is a new token: of different chats, or several of one). One block a multiprocessor.
//
// Weights. A matrix is cut into groups of 8 rows, dealt out to the blocks in turn. The last warp of a block, its producer,
// copies the block's groups of all matrices, in order, into a ring of stages in shared memory. It waits for free stages
// and for nothing else, so the memory goes on delivering while the grid meets at a barrier.
// Activations. Each of the other warps keeps its columns of the activations in registers, for a whole matrix, and multiplies
// them with its columns of every stage on the tensor cores (sums in fp32). Partial sums of a group meet in shared memory.
// A row of activations is a row of the tile, and computed alike however many rows there are.
// Grid barriers stand where all of a result is needed: five a layer.
//
// Compiled with -D for HIDDEN, HEADS, INNER, WARPS (that multiply), UNIT (columns of a stage), STAGES, BLOCKS, RESERVED
// (bytes of shared memory after the stages), and BULK where the card has it.

#define THREADS (32 * WARPS)
#define PITCH (2 * UNIT + 64)       // bytes from row to row of a stage: rows that are read at once lie in other banks
#define STAGE (8 * PITCH)           // bytes
#define UNITS (HIDDEN / UNIT)       // stages of a group
#define STEPS (UNIT / WARPS / 32)   // tiles of 32 columns of a stage that are a warp's
#define VECTORS (UNITS * STEPS)     // of 8 activations in a lane
#define CHUNKS (INNER / HIDDEN)     // the last matrix of a layer is multiplied in pieces as wide as the others
#define PIECES 4                    // of a head's past, for as many blocks
#define PIECE (SIZE + 4)            // floats: weighted values, maximum, sum

struct Step {
  const Layer *layers;
  const half_t *embedding, *head, *norm, *norm_bias, *cos, *sin; // cos, sin: (positions, SIZE / 4)
  half_t *cache;                                                 // (layers, 2, slots, room, HEADS, SIZE)
  Row *rows;
  int *tokens;                                // chosen
  float *hidden, *middle, *query, *pieces;    // (rows, HIDDEN), .., (rows, HEADS, SHARES, PIECE)
  half_t *inner;                              // (rows, INNER)
  float *logits;                              // (rows, vocabulary)
  Best *best;                                 // (8, BLOCKS)
  unsigned *arrived;                          // at grid barriers, since the beginning of time
  unsigned epoch;                             // what it was before this step
  int layer_count, row_count, slots, room, vocabulary, blank; // blank: the token where a score is no number
  float epsilon, alpha;
};
// Mean of some numbers, and the sum of their squared distances from it.
struct Spread {
  float mean, squares;
  DEVICE void join(float other_mean, float other_squares, float count) { // of as many numbers each
    const float apart = other_mean - mean;
    mean = 0.5f * (mean + other_mean), squares = fmaf(apart * apart, 0.5f * count, squares + other_squares);
  }
};
struct Shared {
  float scratch[WARPS * (PIECES * PIECE > 128 ? PIECES * PIECE : 128)]; // of every warp: sums of two groups, or its pieces
  float joined[PIECES][PIECE];
  Spread spreads[2][WARPS * 8];                          // of the two LayerNorms of a layer, of each warp and row
  float mean[2][8], scale[2][8];                        // .. of each row
  float kept[64 * ((HIDDEN / 8 + BLOCKS - 1) / BLOCKS)]; // sums of the pieces of a group of the last matrix
  Best best[THREADS / 64][8];
  Row rows[8]; // as they were when the step began
  unsigned long long full[STAGES], empty[STAGES];
};
static_assert(sizeof(Shared) <= RESERVED, "RESERVED");
static_assert(UNIT % (32 * WARPS) == 0 && HIDDEN % UNIT == 0 && INNER % HIDDEN == 0 && THREADS % 64 == 0, "sizes");

// turn: groups that were multiplied so far.
struct Ring {
  byte_t *stages;
  Shared *shared;
  int rows, slot, turn;
  unsigned parity;
  DEVICE void next() {
    if (++slot == STAGES) slot = 0, parity ^= 1;
  }
};

// The row of a matrix that is number j of a group. In the product that makes query, key and value, the rotary embedding
// turns dimensions d and d + SIZE / 4 of half a head together: a group holds four such pairs.
template <bool ROTARY> DEVICE int row_of(int group, int j) {
  if (!ROTARY) return 8 * group + j;
  const int half = group / (SIZE / 16), four = group % (SIZE / 16); // SIZE / 16 groups for half a head
  return half * (SIZE / 2) + 4 * four + j % 4 + (j < 4 ? 0 : SIZE / 4);
}
// The first group of a matrix that is this block's. The groups of a layer's four matrices, and those of the scores after the
// last layer, are dealt one after the other.
enum Matrix { QKV = 0, DENSE = 3 * HIDDEN / 8, UP = 4 * HIDDEN / 8, DOWN = (4 * HIDDEN + INNER) / 8, ALL = (5 * HIDDEN + INNER) / 8 };
DEVICE int first_of(int layer, Matrix matrix) { return (int)((block_id() + BLOCKS - (layer * ALL + matrix) % BLOCKS) % BLOCKS); }

// ---- The producer

template <bool ROTARY> DEVICE void produce(Ring &ring, const half_t *weights, int rows, int width, int first) {
  for (int group = first; group < rows / 8; group += BLOCKS)
    for (int unit = 0; unit < UNITS; unit++, ring.next()) {
      barrier_wait(&ring.shared->empty[ring.slot], ring.parity ^ 1);
      copy_stage(ring.stages + ring.slot * STAGE, 2 * UNIT, PITCH, &ring.shared->full[ring.slot],
                 [=](int j) { return weights + (long long)row_of<ROTARY>(group, j) * width + unit * UNIT; });
    }
}
DEVICE void produce_all(const Step &step, Ring ring) {
  for (int l = 0; l < step.layer_count; l++) {
    const Layer &layer = step.layers[l];
    produce<true>(ring, layer.qkv, 3 * HIDDEN, HIDDEN, first_of(l, QKV));
    produce<false>(ring, layer.dense, HIDDEN, HIDDEN, first_of(l, DENSE));
    produce<false>(ring, layer.up, INNER, HIDDEN, first_of(l, UP));
    for (int chunk = 0; chunk < CHUNKS; chunk++)
      produce<false>(ring, layer.down + chunk * HIDDEN, HIDDEN, INNER, first_of(l, DOWN));
  }
  produce<false>(ring, step.head, step.vocabulary, HIDDEN, first_of(step.layer_count, QKV));
}

// ---- Those that multiply

// What a thread knows of itself. g, q: its row and column of a tile. Made afresh by every phase: kept over phases, what the
// compiler derives from it would fill the registers.
struct Worker {
  Shared *shared;
  int rows, thread, warp, lane, g, q;
  DEVICE Worker(const Ring &ring) : shared(ring.shared), rows(ring.rows), thread((int)thread_id()) {
    warp = thread / 32, lane = thread % 32, g = lane / 4, q = lane % 4;
  }
  DEVICE void meet() const { sync_threads(THREADS); }
};

// ROWS: 1, 2, 4 or 8, as many as there are or more. The rest of the tile repeats them, and its sums go nowhere. Where
// there are fewer than 8, the lanes of the rest take a part of the work on the activations: SHARERS of them a row.
template <int ROWS> struct Part {
  static constexpr int SHARERS = 8 / ROWS < VECTORS ? 8 / ROWS : VECTORS, COUNT = VECTORS / SHARERS;
  int row, share;
  DEVICE Part(const Worker &w) : row(w.g % ROWS < w.rows ? w.g % ROWS : w.rows - 1), share(w.g / ROWS % SHARERS) {}
};
// The column at which a lane's vector begins.
DEVICE int column(const Worker &w, int vector) {
  return vector / STEPS * UNIT + (w.warp * STEPS + vector % STEPS) * 32 + w.q * 8;
}
template <int ROWS> DEVICE void spread(const Worker &w, const Vec (&mine)[Part<ROWS>::COUNT], Vec (&x)[VECTORS]) {
  constexpr int COUNT = Part<ROWS>::COUNT;
  UNROLL for (int v = 0; v < VECTORS; v++) {
    if (COUNT == VECTORS) x[v] = mine[v % COUNT];
    else
      UNROLL for (int k = 0; k < 4; k++)
        x[v].w[k] = from_lane(mine[v % COUNT].w[k], (v / COUNT * ROWS + w.g % ROWS) * 4 + w.q);
  }
}
// Activations of all rows for one matrix; make(row, column): 8 of them.
template <int ROWS, class Make> DEVICE void take(const Ring &ring, Vec (&x)[VECTORS], Make make) {
  const Worker w(ring);
  const Part<ROWS> part(w);
  Vec mine[Part<ROWS>::COUNT];
  UNROLL for (int i = 0; i < Part<ROWS>::COUNT; i++) mine[i] = make(part.row, column(w, part.share * Part<ROWS>::COUNT + i));
  spread<ROWS>(w, mine, x);
}
// LayerNorm of source (rows, HIDDEN) as activations; its means and scales are kept for `normed`. The order in which the
// numbers of a row are joined does not depend on ROWS.
template <int ROWS>
DEVICE void norm(const Ring &ring, Vec (&x)[VECTORS], const float *source, const half_t *weight, const half_t *bias, float epsilon,
                 int which) {
  const Worker w(ring);
  constexpr int COUNT = Part<ROWS>::COUNT;
  constexpr bool KEEP = COUNT <= 4; // or they are read a second time, for registers are few
  const Part<ROWS> part(w);
  auto at = [&](int i) { return column(w, part.share * COUNT + i); };
  auto read = [&](Quad(&v)[2], int i) {
    UNROLL for (int k = 0; k < 2; k++) v[k] = fresh((const Quad *)(source + part.row * HIDDEN + at(i)) + k);
  };
  Quad v[KEEP ? COUNT : 1][2];
  Spread parts[COUNT];
  if (KEEP)
    UNROLL for (int i = 0; i < COUNT; i++) read(v[KEEP ? i : 0], i);
  UNROLL for (int i = 0; i < COUNT; i++) {
    Quad(&mine)[2] = v[KEEP ? i : 0];
    if (!KEEP) read(mine, i);
    Spread &all = parts[i] = {};
    UNROLL for (int k = 0; k < 8; k++) all.mean = fmaf(mine[k / 4].f[k % 4], 0.125f, all.mean);
    UNROLL for (int k = 0; k < 8; k++) {
      const float apart = mine[k / 4].f[k % 4] - all.mean;
      all.squares = fmaf(apart, apart, all.squares);
    }
  }
  float count = 8;
  UNROLL for (int by = 1; by < COUNT; by *= 2, count *= 2)
    UNROLL for (int i = 0; i + by < COUNT; i += 2 * by) parts[i].join(parts[i + by].mean, parts[i + by].squares, count);
  Spread all = parts[0];
  auto join_lanes = [&](int far) {
    all.join(swap_with(all.mean, far), swap_with(all.squares, far), count);
    count *= 2;
  };
  UNROLL for (int by = 1; by < Part<ROWS>::SHARERS; by *= 2) join_lanes(by * ROWS * 4);
  join_lanes(1), join_lanes(2);
  Spread *spreads = w.shared->spreads[which];
  if (w.g < ROWS && w.q == 0) spreads[w.warp * 8 + w.g] = all;
  w.meet();
  float mean = 0, squares = 0; // of the warps, which have as many numbers each
  for (int warp = 0; warp < WARPS; warp++) mean += spreads[warp * 8 + w.g % ROWS].mean;
  mean *= 1.0f / WARPS;
  for (int warp = 0; warp < WARPS; warp++) {
    const float apart = spreads[warp * 8 + w.g % ROWS].mean - mean;
    squares += fmaf(apart * apart, (float)(HIDDEN / WARPS), spreads[warp * 8 + w.g % ROWS].squares);
  }
  const float scale = rsqrtf(squares * (1.0f / HIDDEN) + epsilon);
  Vec mine[COUNT];
  UNROLL for (int i = 0; i < COUNT; i++) {
    if (!KEEP) read(v[0], i);
    const Vec gamma = *(const Vec *)(weight + at(i)), beta = *(const Vec *)(bias + at(i));
    UNROLL for (int k = 0; k < 4; k++) {
      const float *two = v[KEEP ? i : 0][k / 2].f + k % 2 * 2;
      const float a = (two[0] - mean) * scale, b = (two[1] - mean) * scale;
      mine[i].w[k] = pack(fmaf(a, low(gamma.w[k]), low(beta.w[k])), fmaf(b, high(gamma.w[k]), high(beta.w[k])));
    }
  }
  if (w.warp == 0 && w.g < ROWS && w.q == 0) w.shared->mean[which][w.g] = mean, w.shared->scale[which][w.g] = scale;
  spread<ROWS>(w, mine, x);
}
// One number of it, again; given: bias of a product, and what went into the LayerNorm with its weight and bias.
DEVICE float normed(const Shared *shared, int which, int row, const Quad &given) {
  return fmaf((given.f[1] - shared->mean[which][row]) * shared->scale[which][row], given.f[2], given.f[3]);
}

// All rows times this block's groups of a matrix. For each sum one thread is asked twice: load(output, row) early, so that
// what it reads comes while the group is multiplied, and done(output, row, sum, loaded).
template <int ROWS, bool ROTARY, class Load, class Done>
DEVICE void multiply(Ring &ring, int rows, int first, const Vec (&x)[VECTORS], Load load, Done done) {
  const Worker w(ring);
  const int row = w.thread % 64 / 8;
  ROLLED for (int group = first; group < rows / 8; group += BLOCKS, ring.turn++) {
    const bool adds = w.thread / 64 == ring.turn % (THREADS / 64); // in turn
    const int output = row_of<ROTARY>(group, w.thread % 8);
    Quad given = {};
    if (adds && row < w.rows) given = load(output, row);
    float c[2][4] = {};
    UNROLL for (int unit = 0; unit < UNITS; unit++, ring.next()) {
      barrier_wait(&ring.shared->full[ring.slot], ring.parity);
      const byte_t *stage = ring.stages + ring.slot * STAGE + w.g * PITCH + (w.warp * STEPS * 32 + w.q * 8) * 2;
      Vec b[STEPS];
      UNROLL for (int s = 0; s < STEPS; s++) b[s] = *(const Vec *)(stage + 64 * s);
      reads_done();
      sync_warp();
      if (w.lane == 0) barrier_arrive(&ring.shared->empty[ring.slot]);
      UNROLL for (int s = 0; s < STEPS; s++) {
        const Vec &a = x[unit * STEPS + s];
        multiply_tile(c[s % 2], a.w[0], 0, a.w[1], 0, b[s].w[0], b[s].w[1]);
        multiply_tile(c[s % 2], a.w[2], 0, a.w[3], 0, b[s].w[2], b[s].w[3]);
      }
    }
    float *sums = w.shared->scratch + ring.turn % 2 * WARPS * 64; // (warps, rows, 8)
    if (w.g < ROWS)
      UNROLL for (int k = 0; k < 2; k++) sums[w.warp * 64 + w.g * 8 + 2 * w.q + k] = c[0][k] + c[1][k];
    w.meet();
    if (!adds) continue;
    float sum = 0;
    if (row < ROWS)
      for (int warp = 0; warp < WARPS; warp++) sum += sums[warp * 64 + w.thread % 64];
    done(output, row, sum, given);
  }
}

// A head's past is cut into PIECES, alike for any number of rows. Where there are few rows, PIECES / SHARES of them are
// a block's, and whoever reads the result joins the SHARES.
template <int ROWS> constexpr int SHARES = ROWS < PIECES ? PIECES / ROWS : 1;

template <int ROWS> DEVICE void attend(const Ring &ring, const Step &step, int layer) {
  const Worker w(ring);
  constexpr int OWN = PIECES / SHARES<ROWS>;
  const int lane = w.thread % LANES;
  const long long stride = (long long)step.slots * step.room * HIDDEN; // of the keys, or the values, of a layer
  ROLLED for (int item = block_id(); item < w.rows * HEADS * SHARES<ROWS>; item += BLOCKS) {
    const int share = item % SHARES<ROWS>, head = item / SHARES<ROWS> % HEADS, row = item / SHARES<ROWS> / HEADS;
    const int seen_tokens = w.shared->rows[row].end, span = (seen_tokens + PIECES - 1) / PIECES;
    const half_t *keys = step.cache + 2 * layer * stride + (long long)w.shared->rows[row].slot * step.room * HIDDEN + head * SIZE;
    const half_t *values = keys + stride;
    Quad query[2];
    UNROLL for (int k = 0; k < 2; k++) query[k] = fresh((const Quad *)(step.query + row * HIDDEN + head * SIZE + lane * 8) + k);
    ROLLED for (int p = 0; p < OWN; p++) {
      const int start = (share * OWN + p) * span, end = start + span < seen_tokens ? start + span : seen_tokens;
      float most, sum, seen[8];
      look<THREADS>(keys, values, query, start, end, most, sum, seen);
      float *own = w.shared->scratch + (p * WARPS + w.warp) * PIECE;
      if (w.lane < LANES) {
        UNROLL for (int n = 0; n < 8; n++) own[lane * 8 + n] = seen[n];
        if (lane == 0) own[SIZE] = most, own[SIZE + 1] = sum;
      }
    }
    w.meet();
    for (int at = w.thread; at < OWN * SIZE; at += THREADS) { // the warps of a piece
      const int d = at % SIZE;
      const float *all = w.shared->scratch + at / SIZE * WARPS * PIECE;
      float *piece = w.shared->joined[at / SIZE], most = NEVER, sum = 0, seen = 0;
      for (int n = 0; n < WARPS; n++) most = fmaxf(most, all[n * PIECE + SIZE]);
      for (int n = 0; n < WARPS; n++) {
        const float part = exp2_fast(all[n * PIECE + SIZE] - most);
        seen = fmaf(part, all[n * PIECE + d], seen), sum = fmaf(part, all[n * PIECE + SIZE + 1], sum);
      }
      piece[d] = seen;
      if (d == 0) piece[SIZE] = most, piece[SIZE + 1] = sum;
    }
    w.meet();
    if (w.thread < SIZE) { // the pieces, in pairs
      const int d = w.thread;
      float most[OWN], sum[OWN], seen[OWN][1];
      UNROLL for (int n = 0; n < OWN; n++) {
        const float *piece = w.shared->joined[n];
        most[n] = piece[SIZE], sum[n] = piece[SIZE + 1], seen[n][0] = piece[d];
      }
      UNROLL for (int by = 1; by < OWN; by *= 2)
        UNROLL for (int n = 0; n + by < OWN; n += 2 * by) join(most[n], sum[n], seen[n], most[n + by], sum[n + by], seen[n + by]);
      float *out = step.pieces + (long long)item * PIECE;
      out[d] = seen[0][0];
      if (d == 0) out[SIZE] = most[0], out[SIZE + 1] = sum[0];
    }
  }
}
// 8 numbers of a head's result, from column `at` on.
template <int ROWS> DEVICE Vec attended(const float *pieces, int at) {
  constexpr int COUNT = SHARES<ROWS>;
  float most[COUNT], sum[COUNT], seen[COUNT][8];
  UNROLL for (int p = 0; p < COUNT; p++) {
    most[p] = fresh(pieces + p * PIECE + SIZE), sum[p] = fresh(pieces + p * PIECE + SIZE + 1);
    UNROLL for (int k = 0; k < 2; k++) {
      const Quad quad = fresh((const Quad *)(pieces + p * PIECE + at) + k);
      UNROLL for (int n = 0; n < 4; n++) seen[p][4 * k + n] = quad.f[n];
    }
  }
  UNROLL for (int by = 1; by < COUNT; by *= 2)
    UNROLL for (int p = 0; p + by < COUNT; p += 2 * by) join(most[p], sum[p], seen[p], most[p + by], sum[p + by], seen[p + by]);
  Vec result;
  UNROLL for (int k = 0; k < 4; k++) result.w[k] = pack(seen[0][2 * k] / sum[0], seen[0][2 * k + 1] / sum[0]);
  return result;
}
template <int ROWS> DEVICE void work(const Step &step, Ring ring) {
  Shared *shared = ring.shared;
  auto meet_grid = [&](int layer, int number) { // the first time in layer 0, number 1; five times in every layer
    sync_threads(THREADS);
    if (thread_id() == 0) sync_grid(step.arrived, step.epoch + (5 * layer + number) * BLOCKS);
    sync_threads(THREADS);
  };
  auto nothing = [](int, int) { return Quad{}; };
  const long long stride = (long long)step.slots * step.room * HIDDEN; // of the keys, or the values, of a layer
  Vec x[VECTORS];

  if (thread_id() < step.row_count) shared->rows[thread_id()] = step.rows[thread_id()];
  sync_threads(THREADS);
  for (int i = block_id() * THREADS + thread_id(); i < step.row_count * HIDDEN / 8; i += BLOCKS * THREADS) {
    const Vec from = *(const Vec *)(step.embedding + (long long)shared->rows[i * 8 / HIDDEN].id * HIDDEN + i * 8 % HIDDEN);
    UNROLL for (int n = 0; n < 8; n++) step.hidden[i * 8 + n] = n % 2 ? high(from.w[n / 2]) : low(from.w[n / 2]);
  }
  meet_grid(0, 1);
  ROLLED for (int l = 0; l < step.layer_count; l++) {
    const Layer &layer = step.layers[l];
    norm<ROWS>(ring, x, step.hidden, layer.norm1, layer.norm1_bias, step.epsilon, 0);
    auto turns = [&](int output, int row) { // its bias, and cos and sin of its angle
      const int d = output % SIZE, position = d < SIZE / 2 ? shared->rows[row].position : shared->rows[row].block_position;
      const long long at = (long long)position * (SIZE / 4) + d % (SIZE / 4);
      return Quad{{to_float(layer.qkv_bias[output]), to_float(step.cos[at]), to_float(step.sin[at])}};
    };
    multiply<ROWS, true>(ring, 3 * HIDDEN, first_of(l, QKV), x, turns, [&](int output, int row, float sum, const Quad &given) {
      const int which = output / SIZE % 3, d = output % SIZE, at = output / (3 * SIZE) * SIZE + d;
      const float value = sum + given.f[0], other = swap_with(value, 4), sine = thread_id() % 8 < 4 ? -given.f[2] : given.f[2];
      const float turned = which == 2 ? value : fmaf(value, given.f[1], other * sine);
      if (row >= step.row_count) return;
      if (which == 0) step.query[row * HIDDEN + at] = turned * SCALE;
      else {
        const long long place = (long long)shared->rows[row].slot * step.room + shared->rows[row].place;
        step.cache[(2 * l + which - 1) * stride + place * HIDDEN + at] = to_half(turned);
      }
    });
    meet_grid(l, 2);
    attend<ROWS>(ring, step, l);
    meet_grid(l, 3);
    take<ROWS>(ring, x, [&](int row, int at) {
      return attended<ROWS>(step.pieces + (row * HEADS + at / SIZE) * SHARES<ROWS> * PIECE, at % SIZE);
    });
    multiply<ROWS, false>(
        ring, HIDDEN, first_of(l, DENSE), x,
        [&](int output, int row) {
          return Quad{{to_float(layer.dense_bias[output]), fresh(step.hidden + row * HIDDEN + output),
                       to_float(layer.norm1[output]), to_float(layer.norm1_bias[output])}};
        },
        [&](int output, int row, float sum, const Quad &given) {
          if (row < step.row_count)
            step.middle[row * HIDDEN + output] = fmaf(step.alpha, normed(shared, 0, row, given), sum + given.f[0]);
        });
    meet_grid(l, 4);
    norm<ROWS>(ring, x, step.middle, layer.norm2, layer.norm2_bias, step.epsilon, 1);
    multiply<ROWS, false>(
        ring, INNER, first_of(l, UP), x, [&](int output, int row) { return Quad{{to_float(layer.up_bias[output])}}; },
        [&](int output, int row, float sum, const Quad &given) {
          if (row < step.row_count) step.inner[row * INNER + output] = to_half(gelu(sum + given.f[0]));
        });
    meet_grid(l, 5);
    const int first = first_of(l, DOWN);
    ROLLED for (int chunk = 0; chunk < CHUNKS; chunk++) {
      take<ROWS>(ring, x, [&](int row, int at) { return fresh((const Vec *)(step.inner + row * INNER + chunk * HIDDEN + at)); });
      multiply<ROWS, false>(
          ring, HIDDEN, first, x,
          [&](int output, int row) {
            if (chunk + 1 < CHUNKS) return Quad{};
            return Quad{{to_float(layer.down_bias[output]), fresh(step.middle + row * HIDDEN + output),
                         to_float(layer.norm2[output]), to_float(layer.norm2_bias[output])}};
          },
          [&](int output, int row, float sum, const Quad &given) {
            float &kept = shared->kept[(output / 8 - first) / BLOCKS * 64 + thread_id() % 64];
            if (chunk) sum += kept;
            if (chunk + 1 < CHUNKS) kept = sum;
            else if (row < step.row_count)
              step.hidden[row * HIDDEN + output] = fmaf(step.alpha, normed(shared, 1, row, given), sum + given.f[0]);
          });
    }
    meet_grid(l, 6);
  }
  norm<ROWS>(ring, x, step.hidden, step.norm, step.norm_bias, step.epsilon, 0);
  Best best = no_best();
  multiply<ROWS, false>(ring, step.vocabulary, first_of(step.layer_count, QKV), x, nothing,
                        [&](int output, int row, float sum, const Quad &) {
                          if (row < step.row_count) step.logits[(long long)row * step.vocabulary + output] = sum;
                          better(best, sum, output, !(sum - sum == 0));
                        });
  const Worker w(ring);
  // The best of a thread, of 8 lanes, of a block, of all.
  UNROLL for (int far = 1; far < 8; far *= 2) better_of_lanes(best, far);
  if (w.lane % 8 == 0) w.shared->best[w.thread / 64][w.thread % 64 / 8] = best;
  w.meet();
  if (w.thread < w.rows) {
    for (int n = 0; n < THREADS / 64; n++) {
      const Best &other = w.shared->best[n][w.thread];
      if (n == 0) best = other;
      else better(best, other.score, other.id, other.bad);
    }
    step.best[w.thread * BLOCKS + block_id()] = best;
  }
  meet_grid(step.layer_count, 2);
  if (block_id() == 0)
    for (int row = w.warp; row < w.rows; row += WARPS) {
      best = no_best();
      for (int n = w.lane; n < BLOCKS; n += 32) {
        const volatile Best &other = step.best[row * BLOCKS + n];
        better(best, other.score, other.id, other.bad);
      }
      UNROLL for (int far = 1; far < 32; far *= 2) better_of_lanes(best, far);
      if (w.lane == 0) {
        step.tokens[row] = best.bad ? step.blank : best.id;
        advance(step.rows[row], step.tokens[row]);
      }
    }
}

template <int ROWS> DEVICE void run(const Step &step) {
  Ring ring = {shared_memory(), (Shared *)(shared_memory() + STAGES * STAGE), step.row_count, 0, 0, 0};
  if (thread_id() == 0) {
    for (int i = 0; i < STAGES; i++)
      barrier_init(&ring.shared->full[i], STAGE_ARRIVALS), barrier_init(&ring.shared->empty[i], WARPS);
    barrier_init_done();
  }
  sync_block();
  if (thread_id() >= THREADS) produce_all(step, ring);
  else work<ROWS>(step, ring);
}
KERNEL void __launch_bounds__(THREADS + 32, 1) step1(const Step step) { run<1>(step); }
KERNEL void __launch_bounds__(THREADS + 32, 1) step2(const Step step) { run<2>(step); }
KERNEL void __launch_bounds__(THREADS + 32, 1) step4(const Step step) { run<4>(step); }
KERNEL void __launch_bounds__(THREADS + 32, 1) step8(const Step step) { run<8>(step); }
