#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include "kernels/cuda/probe/random_fill.h"

namespace nestor::probe {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 2048;

// The finaliser of splitmix64 (Steele, Lea, Flood, OOPSLA 2014).
__device__ uint64_t Hash(uint64_t index, uint32_t seed) {
  uint64_t z = index + seed * 0x9e3779b97f4a7c15ull + 0x632be59bd9b4e019ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

// Box-Muller on the two halves of one hash.
__device__ float Normal(uint64_t index, uint32_t seed) {
  const uint64_t bits = Hash(index, seed);
  const float u = (static_cast<float>(bits >> 40) + 1.0f) * 0x1p-24f;  // (0, 1]
  const float v = static_cast<float>(bits & 0xffffff) * 0x1p-24f;      // [0, 1)
  return sqrtf(-2.0f * logf(u)) * cospif(2.0f * v);
}

template <typename T>
__global__ void FillNormalKernel(T* out, int64_t count, float scale, uint32_t seed) {
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < count;
       i += int64_t{kThreads} * gridDim.x) {
    out[i] = static_cast<T>(scale * Normal(i, seed));
  }
}

__global__ void FillNibblesKernel(uint8_t* out, int64_t count, uint32_t seed) {
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < count;
       i += int64_t{kThreads} * gridDim.x) {
    const uint64_t bits = Hash(i, seed);
    const uint32_t low = 1 + static_cast<uint32_t>(bits >> 32) % 15;
    const uint32_t high = 1 + static_cast<uint32_t>(bits) % 15;
    out[i] = static_cast<uint8_t>(low | high << 4);
  }
}

}  // namespace

cudaError_t FillNormal(void* out, NumberType type, int64_t count, float scale, uint32_t seed,
                       cudaStream_t stream) {
  switch (type) {
    case NumberType::kBf16:
      FillNormalKernel<<<kBlocks, kThreads, 0, stream>>>(static_cast<__nv_bfloat16*>(out), count,
                                                         scale, seed);
      break;
    case NumberType::kFp8:
      FillNormalKernel<<<kBlocks, kThreads, 0, stream>>>(static_cast<__nv_fp8_e4m3*>(out), count,
                                                         scale, seed);
      break;
    case NumberType::kFloat:
      FillNormalKernel<<<kBlocks, kThreads, 0, stream>>>(static_cast<float*>(out), count, scale,
                                                         seed);
      break;
    case NumberType::kDouble:
      FillNormalKernel<<<kBlocks, kThreads, 0, stream>>>(static_cast<double*>(out), count, scale,
                                                         seed);
      break;
  }
  return cudaGetLastError();
}

cudaError_t FillNibbles(uint8_t* out, int64_t count, uint32_t seed, cudaStream_t stream) {
  FillNibblesKernel<<<kBlocks, kThreads, 0, stream>>>(out, count, seed);
  return cudaGetLastError();
}

}  // namespace nestor::probe
