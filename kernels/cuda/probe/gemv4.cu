// One straightforward fused dequantise-GEMV over a 4-bit plane, untuned: how near the bandwidth
// does the obvious kernel come?
//
// y[t, j] = Σ_g s[j, g] Σ_{k in g} (c[j, k] − 8) x[t, k], groups g of 32 inputs.
// Bytes: m n / 2 of codes, m n / 16 of bf16 scales; 4.5 bits a weight. 2 m n operations a row.
#include <cuda_bf16.h>

#include <cmath>
#include <vector>

#include "kernels/cuda/probe/probe.h"
#include "kernels/cuda/probe/random_fill.h"
#include "kernels/cuda/probe/reference.h"
#include "kernels/cuda/probe/timing.h"

namespace nestor::probe {
namespace {

constexpr int kWarps = 8;  // a block; one warp per output
constexpr int kGroup = 32;

__device__ float2 Widen(uint32_t pair) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}

// Of the eight codes in a word, nibble p < 4 is input 2p and nibble p + 4 is input 2p + 1, so that
// one mask yields two neighbours. 0x4300 | c is 128 + c in bf16, exactly.
__device__ float2 Codes(uint32_t word, int p) {
  const uint32_t pair = ((word >> (4 * p)) & 0x000f000fu) | 0x43004300u;
  const __nv_bfloat162 biased = reinterpret_cast<const __nv_bfloat162&>(pair);
  const __nv_bfloat162 code = __hsub2(biased, __float2bfloat162_rn(136.0f));
  return Widen(reinterpret_cast<const uint32_t&>(code));
}

template <int kRows>
__global__ void Gemv4Kernel(const uint4* codes, const __nv_bfloat16* scales, const __nv_bfloat16* x,
                            int64_t outputs, int64_t inputs, __nv_bfloat16* y) {
  const int lane = threadIdx.x % 32;
  const int64_t output = blockIdx.x * int64_t{kWarps} + threadIdx.x / 32;
  if (output >= outputs) return;
  const int64_t groups = inputs / kGroup;
  float sums[kRows] = {};
  for (int64_t g = lane; g < groups; g += 32) {
    const uint4 chunk = __ldcs(codes + output * groups + g);
    const float scale = __bfloat162float(scales[output * groups + g]);
    const uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
    float partial[kRows] = {};
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      float2 decoded[4];
#pragma unroll
      for (int p = 0; p < 4; ++p) decoded[p] = Codes(words[w], p);
#pragma unroll
      for (int t = 0; t < kRows; ++t) {
        const uint4 loaded = *reinterpret_cast<const uint4*>(x + t * inputs + g * kGroup + w * 8);
        const uint32_t pairs[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
#pragma unroll
        for (int p = 0; p < 4; ++p) {
          const float2 value = Widen(pairs[p]);
          partial[t] += decoded[p].x * value.x + decoded[p].y * value.y;
        }
      }
    }
#pragma unroll
    for (int t = 0; t < kRows; ++t) sums[t] += scale * partial[t];
  }
#pragma unroll
  for (int t = 0; t < kRows; ++t) {
    for (int offset = 16; offset > 0; offset /= 2) {
      sums[t] += __shfl_xor_sync(~0u, sums[t], offset);
    }
    if (lane == 0) y[t * outputs + output] = __float2bfloat16(sums[t]);
  }
}

// Plain loops in double; one thread per sampled output of row t = blockIdx.y.
__global__ void ReferenceGemv4Kernel(const uint32_t* codes, const __nv_bfloat16* scales,
                                     const __nv_bfloat16* x, const int64_t* sampled, int count,
                                     int64_t inputs, double* out) {
  const int sample = blockIdx.x * blockDim.x + threadIdx.x;
  if (sample >= count) return;
  const int64_t output = sampled[sample];
  double sum = 0;
  for (int64_t k = 0; k < inputs; ++k) {
    const uint32_t word = codes[(output * inputs + k) / 8];
    const int in_word = static_cast<int>(k % 8);
    const int nibble = in_word / 2 + (in_word % 2) * 4;
    const double code = static_cast<double>((word >> (4 * nibble)) & 15u) - 8;
    const double scale = static_cast<float>(scales[(output * inputs + k) / kGroup]);
    sum += scale * code * static_cast<double>(static_cast<float>(x[blockIdx.y * inputs + k]));
  }
  out[blockIdx.y * count + sample] = sum;
}

struct Plane {
  ColdWeights codes;
  ColdWeights scales;
};

cudaError_t LaunchGemv4(const Probe& probe, const LayerShape& layer, int64_t rows,
                        const Plane& plane, int64_t invocation, cudaStream_t stream) {
  const auto* codes = reinterpret_cast<const uint4*>(plane.codes.copy(invocation));
  const auto* scales = reinterpret_cast<const __nv_bfloat16*>(plane.scales.copy(invocation));
  const auto* x = static_cast<const __nv_bfloat16*>(probe.bf16_x);
  auto* y = static_cast<__nv_bfloat16*>(probe.y);
  const unsigned blocks = static_cast<unsigned>((layer.m + kWarps - 1) / kWarps);
  if (rows == 1) {
    Gemv4Kernel<1><<<blocks, kWarps * 32, 0, stream>>>(codes, scales, x, layer.m, layer.n, y);
  } else if (rows == 4) {
    Gemv4Kernel<4><<<blocks, kWarps * 32, 0, stream>>>(codes, scales, x, layer.m, layer.n, y);
  } else {
    return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

double CheckedGemv4Error(const Probe& probe, const LayerShape& layer, int64_t rows,
                         const Plane& plane) {
  Check(cudaMemsetAsync(probe.y, 0xff, rows * layer.m * 2, probe.stream));
  Check(LaunchGemv4(probe, layer, rows, plane, 0, probe.stream));
  const std::vector<int64_t> outputs = SpreadIndices(layer.m, 256);
  const int count = static_cast<int>(outputs.size());
  DeviceBuffer<int64_t> sampled(count);
  sampled.CopyFromHost(outputs.data());
  DeviceBuffer<double> reference(rows * count);
  ReferenceGemv4Kernel<<<dim3((count + 63) / 64, static_cast<unsigned>(rows)), 64, 0,
                         probe.stream>>>(
      reinterpret_cast<const uint32_t*>(plane.codes.copy(0)),
      reinterpret_cast<const __nv_bfloat16*>(plane.scales.copy(0)),
      static_cast<const __nv_bfloat16*>(probe.bf16_x), sampled.data(), count, layer.n,
      reference.data());
  CheckLaunch();
  MatrixView y;
  y.data = probe.y;
  y.type = NumberType::kBf16;
  y.ld = layer.m;
  return RelativeError(probe.stream, reference, y, rows, SpreadIndices(rows, rows), layer.m,
                       outputs);
}

}  // namespace

void MeasureGemv4(const Probe& probe) {
  constexpr int64_t kPoolBytes = 640 << 20;  // two copies of the largest layer's codes
  const WeightPool codes(NumberType::kFp8, kPoolBytes, probe.device.l2CacheSize);
  Check(FillNibbles(reinterpret_cast<uint8_t*>(codes.data()), kPoolBytes, 31, probe.stream));
  for (const LayerShape& layer : kLayers) {
    const int64_t code_bytes = layer.m * layer.n / 2, scale_bytes = layer.m * layer.n / kGroup * 2;
    const Plane plane{codes.Carve(code_bytes),
                      probe.bf16_weights->Carve(scale_bytes, code_bytes + scale_bytes)};
    for (const int64_t rows : {int64_t{1}, int64_t{4}}) {
      const double error = CheckedGemv4Error(probe, layer, rows, plane);
      const Timing timing = TimeInGraph(
          probe.stream, MinInvocations(plane.codes), [&](cudaStream_t stream, int64_t invocation) {
            Check(LaunchGemv4(probe, layer, rows, plane, invocation, stream));
          });
      probe.report->Add(Record("gemv4", "fused dequantise-GEMV")
                            .Set("m", layer.m)
                            .Set("n", layer.n)
                            .Set("rows", rows)
                            .Set("bytes", code_bytes + scale_bytes + rows * (layer.m + layer.n) * 2)
                            .Set("flops", 2.0 * layer.m * layer.n * rows)
                            .Set(timing)
                            .SetError(error, kBf16Bar));
    }
  }
}

}  // namespace nestor::probe
