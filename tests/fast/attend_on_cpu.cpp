// attend.cu as a program for the host: a block's threads are threads of the system, its blocks run one by one.
#include <barrier>
#include <cmath>
#include <cstring>
#include <thread>
#include <vector>

struct Index {
  unsigned x, y, z;
};
static thread_local Index threadIdx;
static Index blockIdx, gridDim, blockDim;
static std::barrier<> *whole;
static std::vector<std::barrier<> *> warps;
static float exchanged[1024];

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(n)
#define NEVER (-INFINITY)
#define FRESH(place) (*(place))
static void __syncthreads() { whole->arrive_and_wait(); }
static void __threadfence() {}
static unsigned atomicAdd(unsigned *at, unsigned n) { return (*at += n) - n; }
static float __shfl_xor_sync(unsigned, float mine, int other) {
  auto &warp = *warps[threadIdx.x / 32];
  exchanged[threadIdx.x] = mine;
  warp.arrive_and_wait();
  const float theirs = exchanged[threadIdx.x ^ other];
  warp.arrive_and_wait();
  return theirs;
}
static float to_float(float x) { return x; }
static void from_float(float &y, float x) { y = x; }
static float to_float(unsigned short x) {
  _Float16 y;
  std::memcpy(&y, &x, 2);
  return y;
}
static void from_float(unsigned short &y, float x) {
  const _Float16 z = (_Float16)x;
  std::memcpy(&y, &z, 2);
}

#include "attend.cu"

// order: the blocks of the grid, in the order in which they are to run.
extern "C" void run(const int *order, int count, int blocks, int heads, int batch, const T *mixed, const T *bias,
                    const T *cos, const T *sin, T *keys, T *values, T *seen, const long long *places, float *partial,
                    unsigned *arrived, int room, int span, float scale) {
  gridDim = {(unsigned)blocks, (unsigned)heads, (unsigned)batch};
  std::barrier<> all(THREADS);
  std::barrier<> one(32), two(32), three(32), four(32);
  whole = &all, warps = {&one, &two, &three, &four};
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < THREADS; i++)
    threads.emplace_back([=, &all] {
      threadIdx = {i, 0, 0};
      for (int n = 0; n < count; n++) {
        if (i == 0) blockIdx = {order[n] % (unsigned)blocks, order[n] / blocks % (unsigned)heads, order[n] / (unsigned)(blocks * heads)};
        all.arrive_and_wait();
        attend(mixed, bias, cos, sin, keys, values, seen, places, partial, arrived, heads, room, span, scale);
        all.arrive_and_wait();
      }
    });
  for (auto &thread : threads) thread.join();
}
