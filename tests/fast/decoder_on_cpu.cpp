// decoder.cu as a program for the host.
#include "host.hpp"

#include "attention.cuh"
#include "decoder.cu"

extern "C" int run_step(const Step *step, int rows) {
  auto kernel = rows == 1 ? step1 : rows == 2 ? step2 : rows == 4 ? step4 : step8;
  run_grid(BLOCKS, THREADS + 32, THREADS, STAGES * STAGE + sizeof(Shared), [&] { kernel(*step); });
  return sizeof(Step);
}
