// Ceilings: what one device moves and multiplies at best.
//
// copy: bytes read plus bytes written. read: bytes read by a kernel that keeps a sum. Rates: 8192³
// products by cublasLt, 2 · 8192³ = 1.1e12 operations.
#include <vector>

#include "kernels/cuda/probe/probe.h"
#include "kernels/cuda/probe/product.h"
#include "kernels/cuda/probe/timing.h"

namespace nestor::probe {
namespace {

constexpr int kThreads = 512;
constexpr int64_t kBytes = int64_t{1} << 30;
constexpr int kLoadsInFlight = 8;

// Adds up 32-bit words modulo 2^32, so the order does not matter.
__global__ void ReadKernel(const uint4* data, int64_t chunks, uint32_t* sum) {
  uint32_t partial = 0;
  const int64_t stride = int64_t{kThreads} * gridDim.x;
  int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  for (; i + (kLoadsInFlight - 1) * stride < chunks; i += kLoadsInFlight * stride) {
    uint4 loaded[kLoadsInFlight];
#pragma unroll
    for (int k = 0; k < kLoadsInFlight; ++k) loaded[k] = __ldcs(data + i + k * stride);
#pragma unroll
    for (int k = 0; k < kLoadsInFlight; ++k) {
      partial += loaded[k].x + loaded[k].y + loaded[k].z + loaded[k].w;
    }
  }
  for (; i < chunks; i += stride) {
    const uint4 loaded = __ldcs(data + i);
    partial += loaded.x + loaded.y + loaded.z + loaded.w;
  }
  for (int offset = 16; offset > 0; offset /= 2) {
    partial += __shfl_xor_sync(~0u, partial, offset);
  }
  if (threadIdx.x % 32 == 0) atomicAdd(sum, partial);
}

__global__ void CopyKernel(uint4* out, const uint4* data, int64_t chunks) {
  const int64_t stride = int64_t{kThreads} * gridDim.x;
  int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  for (; i + 3 * stride < chunks; i += 4 * stride) {
    uint4 loaded[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) loaded[k] = __ldcs(data + i + k * stride);
#pragma unroll
    for (int k = 0; k < 4; ++k) __stcs(out + i + k * stride, loaded[k]);
  }
  for (; i < chunks; i += stride) __stcs(out + i, __ldcs(data + i));
}

unsigned Grid(const Probe& probe) {
  return static_cast<unsigned>(probe.device.multiProcessorCount) * 4;
}

uint32_t DeviceSum(const Probe& probe, const void* data, uint32_t* sum) {
  Check(cudaMemsetAsync(sum, 0, sizeof *sum, probe.stream));
  ReadKernel<<<Grid(probe), kThreads, 0, probe.stream>>>(static_cast<const uint4*>(data),
                                                         kBytes / 16, sum);
  CheckLaunch();
  uint32_t result = 0;
  Check(cudaMemcpyAsync(&result, sum, sizeof result, cudaMemcpyDeviceToHost, probe.stream));
  Check(cudaStreamSynchronize(probe.stream));
  return result;
}

uint32_t HostSum(const void* data) {
  std::vector<uint32_t> words(kBytes / 4);
  Check(cudaMemcpy(words.data(), data, kBytes, cudaMemcpyDeviceToHost));
  uint32_t sum = 0;
  for (const uint32_t word : words) sum += word;
  return sum;
}

void MeasureBandwidth(const Probe& probe) {
  const char* source = probe.bf16_weights->data();
  DeviceBuffer<char> target(kBytes);
  DeviceBuffer<uint32_t> sum(1);
  const uint32_t expected = HostSum(source);
  // Exact or wrong: sums of integers.
  const double read_error = DeviceSum(probe, source, sum.data()) == expected ? 0 : 1;
  const Timing read = TimeInStream(probe.stream, 4, [&](cudaStream_t stream, int64_t) {
    ReadKernel<<<Grid(probe), kThreads, 0, stream>>>(reinterpret_cast<const uint4*>(source),
                                                     kBytes / 16, sum.data());
    CheckLaunch();
  });
  probe.report->Add(
      Record("ceilings", "read").Set(read).Set("bytes", kBytes).SetError(read_error, 0));

  target.Poison();
  const Timing copy = TimeInStream(probe.stream, 4, [&](cudaStream_t stream, int64_t) {
    Check(cudaMemcpyAsync(target.data(), source, kBytes, cudaMemcpyDeviceToDevice, stream));
  });
  const double copy_error = DeviceSum(probe, target.data(), sum.data()) == expected ? 0 : 1;
  probe.report->Add(Record("ceilings", "copy by the driver")
                        .Set(copy)
                        .Set("bytes", 2 * kBytes)
                        .SetError(copy_error, 0));

  target.Poison();
  const Timing kernel = TimeInStream(probe.stream, 4, [&](cudaStream_t stream, int64_t) {
    CopyKernel<<<Grid(probe), kThreads, 0, stream>>>(reinterpret_cast<uint4*>(target.data()),
                                                     reinterpret_cast<const uint4*>(source),
                                                     kBytes / 16);
    CheckLaunch();
  });
  const double kernel_error = DeviceSum(probe, target.data(), sum.data()) == expected ? 0 : 1;
  probe.report->Add(Record("ceilings", "copy by a kernel")
                        .Set(kernel)
                        .Set("bytes", 2 * kBytes)
                        .SetError(kernel_error, 0));
}

void MeasureRate(const Probe& probe, NumberType type) {
  constexpr int64_t kSize = 8192;
  const std::string form = std::string(NameOf(type)) + " 8192^3";
  ProductShape shape;
  shape.outputs = shape.inputs = shape.rows = kSize;
  shape.type = type;
  const ColdWeights weights = probe.weights(type).Carve(shape.weight_bytes());
  // The activations have no room for 8192 rows of 8192: take another part of the random numbers.
  const void* x = probe.weights(type).data() + weights.copies * weights.stride_bytes;
  DeviceBuffer<char> y(kSize * kSize * 2);
  std::string reason;
  const auto product =
      Product::Create(*probe.lt, shape, probe.stream, weights, x, y.data(), &reason);
  if (product == nullptr) return probe.report->AddSkipped("ceilings", form, reason);
  const double error = CheckedError(*product, probe.stream, weights, x, y.data());
  const Timing timing = TimeInGraph(probe.stream, 8, [&](cudaStream_t stream, int64_t invocation) {
    product->Enqueue(stream, weights.copy(invocation), x, y.data());
  });
  probe.report->Add(
      Record("ceilings", form).Set(timing).Set("flops", shape.flops()).SetError(error, kBf16Bar));
}

}  // namespace

void MeasureCeilings(const Probe& probe) {
  MeasureBandwidth(probe);
  MeasureRate(probe, NumberType::kBf16);
  MeasureRate(probe, NumberType::kFp8);
}

}  // namespace nestor::probe
