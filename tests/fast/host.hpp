// primitives.cuh for a host: every thread of every block is a thread of the system, barriers are barriers, and a copy into
// shared memory is made by the threads that ask for it.
#include <atomic>
#include <barrier>
#include <cmath>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

typedef unsigned short half_t;
typedef unsigned char byte_t;
#define KERNEL extern "C"
#define DEVICE inline
#define UNROLL
#define ROLLED
#define __launch_bounds__(...)

struct alignas(16) Vec {
  unsigned w[4];
};
struct alignas(16) Quad {
  float f[4];
};

struct Warp {
  std::barrier<> meet{32};
  unsigned words[32];
  unsigned tile[32][6];
};
struct Block {
  std::vector<byte_t> memory;
  std::vector<std::unique_ptr<Warp>> warps;
  std::barrier<> all, some;
  Block(size_t bytes, int threads, int workers) : memory(bytes, 0xff), all(threads), some(workers) {
    for (int i = 0; i < threads / 32; i++) warps.push_back(std::make_unique<Warp>());
  }
};
static thread_local unsigned own_thread, own_block[3];
static thread_local Block *block;

inline int thread_id() { return own_thread; }
inline unsigned block_id(int axis = 0) { return own_block[axis]; }
inline byte_t *shared_memory() { return block->memory.data(); }
inline Warp &warp() { return *block->warps[own_thread / 32]; }
inline float to_float(half_t x) {
  _Float16 y;
  std::memcpy(&y, &x, 2);
  return y;
}
inline half_t to_half(float x) {
  const _Float16 z = (_Float16)x;
  half_t y;
  std::memcpy(&y, &z, 2);
  return y;
}
inline float low(unsigned w) { return to_float((half_t)w); }
inline float high(unsigned w) { return to_float((half_t)(w >> 16)); }
inline unsigned pack(float lower, float upper) { return to_half(lower) | (unsigned)to_half(upper) << 16; }
inline float exp2_fast(float x) { return std::exp2(x); }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
template <class T> T fresh(const T *p) { return *p; }
template <class T> T fresh_once(const T *p) { return *p; }

inline unsigned from_lane(unsigned x, int lane) {
  warp().words[own_thread % 32] = x;
  warp().meet.arrive_and_wait();
  const unsigned theirs = warp().words[lane];
  warp().meet.arrive_and_wait();
  return theirs;
}
inline int swap_with(int x, int other) { return (int)from_lane((unsigned)x, own_thread % 32 ^ other); }
inline float swap_with(float x, int other) {
  unsigned bits;
  std::memcpy(&bits, &x, 4);
  bits = from_lane(bits, own_thread % 32 ^ other);
  std::memcpy(&x, &bits, 4);
  return x;
}
inline void sync_warp() { warp().meet.arrive_and_wait(); }
inline void sync_block() { block->all.arrive_and_wait(); }
inline void sync_threads(int) { block->some.arrive_and_wait(); }
inline void sync_grid(unsigned *arrived, unsigned target) {
  std::atomic_ref<unsigned> count(*arrived);
  count.fetch_add(1);
  count.notify_all();
  for (unsigned seen; (int)((seen = count.load()) - target) < 0;) count.wait(seen);
}

// An mbarrier: arrivals that are missing in the low half, those of a phase in the middle, the phase in the highest bit.
inline void barrier_init(unsigned long long *b, int arrivals) { *b = (unsigned long long)arrivals | (unsigned long long)arrivals << 16; }
inline void barrier_init_done() {}
inline void reads_done() {}
inline void barrier_arrive(unsigned long long *b) {
  std::atomic_ref<unsigned long long> state(*b);
  unsigned long long old = state.load(), next;
  do {
    next = old - 1;
    if ((next & 0xffff) == 0) next = ((next ^ 1ull << 63) & ~0xffffull) | (next >> 16 & 0xffff);
  } while (!state.compare_exchange_weak(old, next));
  state.notify_all();
}
inline void barrier_wait(unsigned long long *b, unsigned parity) {
  std::atomic_ref<unsigned long long> state(*b);
  for (unsigned long long seen; ((seen = state.load()) >> 63) == parity;) state.wait(seen);
}
#define STAGE_ARRIVALS 32
template <class F> void copy_stage(byte_t *stage, int bytes, int pitch, unsigned long long *full, F row) {
  const int lane = own_thread % 32;
  for (int j = 0; j < 8; j++)
    for (int at = 16 * lane; at < bytes; at += 512) std::memcpy(stage + j * pitch + at, (const byte_t *)row(j) + at, 16);
  barrier_arrive(full);
}

inline void multiply_tile(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  const int lane = own_thread % 32, g = lane / 4, q = lane % 4;
  const unsigned words[6] = {a0, a1, a2, a3, b0, b1};
  Warp &w = warp();
  std::memcpy(w.tile[lane], words, sizeof words);
  w.meet.arrive_and_wait();
  for (int k = 0; k < 4; k++) {
    const int column = 2 * q + k % 2;
    float sum = c[k];
    for (int at = 0; at < 16; at++) {
      const unsigned a = w.tile[4 * g + at % 8 / 2][at / 8 * 2 + k / 2], b = w.tile[4 * column + at % 8 / 2][4 + at / 8];
      sum += (at % 2 ? high(a) : low(a)) * (at % 2 ? high(b) : low(b));
    }
    c[k] = sum;
  }
  w.meet.arrive_and_wait();
}

inline void load_transposed(unsigned (&b)[4], const byte_t *tile, int pitch) {
  const int lane = own_thread % 32, g = lane / 4, q = lane % 4;
  for (int k = 0; k < 4; k++) {
    half_t two[2];
    for (int n = 0; n < 2; n++) std::memcpy(two + n, tile + (k % 2 * 8 + 2 * q + n) * pitch + (k / 2 * 8 + g) * 2, 2);
    b[k] = two[0] | (unsigned)two[1] << 16;
  }
}

// Run a kernel as a grid of blocks, all there at once.
template <class F> void run_grid(unsigned blocks, int threads, int workers, size_t bytes, F kernel) {
  std::vector<std::unique_ptr<Block>> all;
  std::vector<std::thread> running;
  for (unsigned b = 0; b < blocks; b++) all.push_back(std::make_unique<Block>(bytes, threads, workers));
  for (unsigned b = 0; b < blocks; b++)
    for (int t = 0; t < threads; t++)
      running.emplace_back([&, b, t] {
        own_thread = t, own_block[0] = b, block = all[b].get();
        kernel();
      });
  for (auto &thread : running) thread.join();
}
