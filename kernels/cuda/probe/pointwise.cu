#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include "kernels/cuda/probe/pointwise.h"

namespace nestor::probe {
namespace {

constexpr int kThreads = 256;
constexpr float kFp8Max = 448.0f;

unsigned Blocks(int64_t threads) {
  return static_cast<unsigned>((threads + kThreads - 1) / kThreads);
}

union Chunk {  // 16 bytes of bf16
  uint4 bits;
  __nv_bfloat162 pairs[4];
};

__global__ void AddKernel(uint4* y, const uint4* t, int64_t chunks) {
  const int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (i >= chunks) return;
  Chunk a, b;
  a.bits = y[i];
  b.bits = t[i];
#pragma unroll
  for (int k = 0; k < 4; ++k) a.pairs[k] = __hadd2(a.pairs[k], b.pairs[k]);
  y[i] = a.bits;
}

// The largest of the block's values, in every thread.
__device__ float BlockMax(float value) {
  __shared__ float of_warp[kThreads / 32];
  for (int offset = 16; offset > 0; offset /= 2) {
    value = fmaxf(value, __shfl_xor_sync(~0u, value, offset));
  }
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  for (int warp = 0; warp < kThreads / 32; ++warp) value = fmaxf(value, of_warp[warp]);
  return value;
}

// One block per row.
template <typename T>
__global__ void QuantiseRowsKernel(const T* x, int64_t columns, __nv_fp8_e4m3* out, float* scales) {
  const T* row = x + blockIdx.x * columns;
  float largest = 0;
  for (int64_t k = threadIdx.x; k < columns; k += kThreads) {
    largest = fmaxf(largest, fabsf(static_cast<float>(row[k])));
  }
  largest = BlockMax(largest);
  const float scale = largest > 0 ? largest / kFp8Max : 1.0f;
  if (threadIdx.x == 0) scales[blockIdx.x] = scale;
  for (int64_t k = threadIdx.x; k < columns; k += kThreads) {
    out[blockIdx.x * columns + k] = __nv_fp8_e4m3(static_cast<float>(row[k]) / scale);
  }
}

__global__ void SubtractPlaneKernel(const float* w, const __nv_fp8_e4m3* plane, const float* scales,
                                    int64_t rows, int64_t columns, float* residual) {
  const int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (i >= rows * columns) return;
  residual[i] = w[i] - scales[i / columns] * static_cast<float>(plane[i]);
}

__global__ void CombinePlanesKernel(PlaneSums planes, int64_t rows, int64_t outputs,
                                    __nv_bfloat16* y) {
  const int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (i >= rows * outputs) return;
  const int64_t j = i % outputs;
  float sum = planes.scales0[j] * planes.sums0[i];
  if (planes.sums1 != nullptr) sum += planes.scales1[j] * planes.sums1[i];
  y[i] = __float2bfloat16(planes.row_scales[i / outputs] * sum);
}

__global__ void WidenKernel(const __nv_bfloat16* x, int64_t count, float* out) {
  const int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (i < count) out[i] = static_cast<float>(x[i]);
}

}  // namespace

cudaError_t AddInto(void* y, const void* t, int64_t count, cudaStream_t stream) {
  AddKernel<<<Blocks(count / 8), kThreads, 0, stream>>>(static_cast<uint4*>(y),
                                                        static_cast<const uint4*>(t), count / 8);
  return cudaGetLastError();
}

cudaError_t QuantiseRows(const void* x, NumberType type, int64_t rows, int64_t columns, void* out,
                         float* scales, cudaStream_t stream) {
  auto* codes = static_cast<__nv_fp8_e4m3*>(out);
  const unsigned blocks = static_cast<unsigned>(rows);
  if (type == NumberType::kBf16) {
    QuantiseRowsKernel<<<blocks, kThreads, 0, stream>>>(static_cast<const __nv_bfloat16*>(x),
                                                        columns, codes, scales);
  } else if (type == NumberType::kFloat) {
    QuantiseRowsKernel<<<blocks, kThreads, 0, stream>>>(static_cast<const float*>(x), columns,
                                                        codes, scales);
  } else {
    return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

cudaError_t SubtractPlane(const float* w, const void* plane, const float* scales, int64_t rows,
                          int64_t columns, float* residual, cudaStream_t stream) {
  SubtractPlaneKernel<<<Blocks(rows * columns), kThreads, 0, stream>>>(
      w, static_cast<const __nv_fp8_e4m3*>(plane), scales, rows, columns, residual);
  return cudaGetLastError();
}

cudaError_t CombinePlanes(const PlaneSums& planes, int64_t rows, int64_t outputs, void* y,
                          cudaStream_t stream) {
  CombinePlanesKernel<<<Blocks(rows * outputs), kThreads, 0, stream>>>(
      planes, rows, outputs, static_cast<__nv_bfloat16*>(y));
  return cudaGetLastError();
}

cudaError_t Widen(const void* x, int64_t count, float* out, cudaStream_t stream) {
  WidenKernel<<<Blocks(count), kThreads, 0, stream>>>(static_cast<const __nv_bfloat16*>(x), count,
                                                      out);
  return cudaGetLastError();
}

}  // namespace nestor::probe
