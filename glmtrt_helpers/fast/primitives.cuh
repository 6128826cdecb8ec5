// What the kernels take from the machine: fp16 as bits, shuffles, barriers, copies into shared memory, tensor cores.
// Compiled by NVRTC, which has no headers; the tests have the same functions for a host (tests/fast/host.hpp).
//
// Compiled with BULK (compute capability 9.0 and later), the copy engine moves whole rows and counts their bytes on an
// mbarrier; without it, as from 8.0 on, each lane of the producer's warp copies 16 bytes at a time (cp.async).
typedef unsigned short half_t; // an fp16 number, as bits
typedef unsigned char byte_t;

#define KERNEL extern "C" __global__
#define DEVICE __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#define ROLLED _Pragma("unroll 1")

struct alignas(16) Vec { // 8 fp16 numbers
  unsigned w[4];
};
struct alignas(16) Quad {
  float f[4];
};

DEVICE int thread_id() { // volatile: what follows from it is worked out where it is used, and takes no register until then
  int id;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(id));
  return id;
}
DEVICE unsigned block_id(int axis = 0) { return axis == 0 ? blockIdx.x : axis == 1 ? blockIdx.y : blockIdx.z; }
DEVICE byte_t *shared_memory() {
  extern __shared__ __align__(128) byte_t memory[];
  return memory;
}
DEVICE float minus_infinity() { return __int_as_float(0xff800000); }
DEVICE float to_float(half_t x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
  return y;
}
DEVICE half_t to_half(float x) {
  half_t y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}
DEVICE float low(unsigned w) { return to_float((half_t)w); }
DEVICE float high(unsigned w) { return to_float((half_t)(w >> 16)); }
DEVICE unsigned pack(float lower, float upper) {
  unsigned w;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(upper), "f"(lower));
  return w;
}
DEVICE float exp2_fast(float x) { return exp2f(x); }

// Past the first-level cache, which may hold what another block has overwritten since.
DEVICE float fresh(const float *p) { return __ldcg(p); }
DEVICE Quad fresh(const Quad *p) {
  const float4 v = __ldcg((const float4 *)p);
  return {{v.x, v.y, v.z, v.w}};
}
DEVICE Vec fresh(const Vec *p) {
  const uint4 v = __ldcg((const uint4 *)p);
  return {{v.x, v.y, v.z, v.w}};
}

// What is read once a step, and would push out of the second-level cache what is read again: it is the first to go there.
DEVICE unsigned long long read_once() {
  unsigned long long policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
DEVICE Vec fresh_once(const Vec *p) {
  Vec v;
  asm volatile("ld.global.L1::no_allocate.L2::cache_hint.v4.u32 {%0,%1,%2,%3}, [%4], %5;"
               : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
               : "l"(p), "l"(read_once())
               : "memory");
  return v;
}

DEVICE float swap_with(float x, int other) { return __shfl_xor_sync(~0u, x, other); } // the lane whose number differs so
DEVICE int swap_with(int x, int other) { return __shfl_xor_sync(~0u, x, other); }
DEVICE unsigned from_lane(unsigned x, int lane) { return __shfl_sync(~0u, x, lane); }
DEVICE void sync_warp() { __syncwarp(); }
DEVICE void sync_block() { __syncthreads(); }
// The first `count` threads of a block: all but the producer's warp.
DEVICE void sync_threads(int count) { asm volatile("bar.sync 1, %0;" ::"r"(count) : "memory"); }

// All blocks of a grid that runs at once: called by one thread of each, between two barriers of its block.
DEVICE void sync_grid(unsigned *arrived, unsigned target) {
  __threadfence();
  atomicAdd(arrived, 1u);
  unsigned seen;
  do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(arrived) : "memory");
  while ((int)(seen - target) < 0);
}

DEVICE unsigned address(const void *p) { return (unsigned)__cvta_generic_to_shared(p); }
DEVICE void barrier_init(unsigned long long *b, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(b)), "r"(arrivals) : "memory");
}
DEVICE void barrier_init_done() {
#ifdef BULK
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
// What the caller's warp has read from shared memory is read: the copy engine may write there. Without the fence a load that
// waits in a queue is overtaken by the arrival, and finds what was copied since (seen on an H100: sums off by a thousandth).
DEVICE void reads_done() {
#ifdef BULK
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
DEVICE void barrier_arrive(unsigned long long *b) {
  asm volatile("{\n.reg .b64 s;\nmbarrier.arrive.shared::cta.b64 s, [%0];\n}" ::"r"(address(b)) : "memory");
}
DEVICE void barrier_wait(unsigned long long *b, unsigned parity) {
#ifdef BULK
#define WAIT "mbarrier.try_wait.parity.shared::cta.b64"
#else
#define WAIT "mbarrier.test_wait.parity.shared::cta.b64"
#endif
  asm volatile("{\n.reg .pred p;\nAGAIN:\n" WAIT " p, [%0], %1;\n@!p bra AGAIN;\n}" ::"r"(address(b)), "r"(parity)
               : "memory");
}

// A stage of the ring: 8 rows of `bytes` each, `pitch` apart in shared memory; called by a whole warp. The barrier is
// complete when all have come: it waits for STAGE_ARRIVALS arrivals.
#ifdef BULK
#define STAGE_ARRIVALS 1
#else
#define STAGE_ARRIVALS 32
#endif
template <class F> DEVICE void copy_stage(byte_t *stage, int bytes, int pitch, unsigned long long *full, F row) {
  const int lane = thread_id() % 32;
#ifdef BULK
  if (lane == 0)
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(full)), "r"(8 * bytes) : "memory");
  __syncwarp();
  if (lane < 8)
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
                     address(stage + lane * pitch)),
                 "l"(row(lane)), "r"(bytes), "r"(address(full)), "l"(read_once())
                 : "memory");
#else
  for (int j = 0; j < 8; j++) {
    const byte_t *source = (const byte_t *)row(j);
    for (int at = 16 * lane; at < bytes; at += 512)
      asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(address(stage + j * pitch + at)),
                   "l"(source + at), "l"(read_once())
                   : "memory");
  }
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(address(full)) : "memory");
#endif
}

// c += a b on the tensor cores, sums in fp32: a 16 x 16, b 16 x 8, c 16 x 8. With g = lane / 4 and q = lane % 4, a lane
// has of a: rows g (a0, a2) and g + 8 (a1, a3); of b: column g; of c: columns 2q and 2q + 1 of both rows.
DEVICE void multiply_tile(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// Two such b side by side, from a tile of 16 rows of at least 16 columns, `pitch` bytes apart in shared memory, where row r of
// the tile holds row r of both b: b[0], b[1] are those of the first 8 columns.
DEVICE void load_transposed(unsigned (&b)[4], const byte_t *tile, int pitch) {
  const int lane = thread_id() % 32;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
               : "r"(address(tile + lane % 16 * pitch + lane / 16 * 16))
               : "memory");
}
