// t0: what one more dependent kernel costs inside a graph, and one more barrier inside a kernel.
//
// A chain of kernels, each reading what the one before wrote: empty ones, and a 512 × 512 GEMV in
// bf16 (0.5 MB of weights, in the cache: about 0.1 µs of work). With programmatic dependent launch
// a kernel starts while the one before still runs and waits only before it reads that one's output;
// `prefetched` loads its weights ahead of that wait.
#include <cooperative_groups.h>
#include <cuda_bf16.h>

#include <cmath>
#include <vector>

#include "kernels/cuda/probe/probe.h"
#include "kernels/cuda/probe/random_fill.h"
#include "kernels/cuda/probe/reference.h"
#include "kernels/cuda/probe/timing.h"

namespace nestor::probe {
namespace {

constexpr const char* kQuestion = "launch cost";
constexpr int kSize = 512;    // of the tiny GEMV
constexpr int kMatrices = 8;  // that the chain goes round
constexpr int kWarps = 8;     // a block
constexpr int kThreads = kWarps * 32;
constexpr int64_t kChain = 256;  // kernels, at least
constexpr int kCheckedChain = 32;

enum class Overlap { kNone, kProgrammatic, kPrefetched };

template <Overlap kOverlap>
__global__ void EmptyKernel() {
  if constexpr (kOverlap != Overlap::kNone) {
    cudaTriggerProgrammaticLaunchCompletion();
    cudaGridDependencySynchronize();
  }
}

__device__ float Dot(uint4 a, uint4 b) {
  const auto* left = reinterpret_cast<const __nv_bfloat162*>(&a);
  const auto* right = reinterpret_cast<const __nv_bfloat162*>(&b);
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 l = __bfloat1622float2(left[i]), r = __bfloat1622float2(right[i]);
    sum += l.x * r.x + l.y * r.y;
  }
  return sum;
}

// y = W x, W is [kSize, kSize]; one warp per output.
template <Overlap kOverlap>
__global__ void TinyGemvKernel(const __nv_bfloat16* w, const __nv_bfloat16* x, __nv_bfloat16* y) {
  constexpr int kChunks = kSize / 8 / 32;
  const int lane = threadIdx.x % 32;
  const int output = blockIdx.x * kWarps + threadIdx.x / 32;
  const auto* weights = reinterpret_cast<const uint4*>(w + output * kSize);
  const auto* inputs = reinterpret_cast<const uint4*>(x);
  uint4 loaded[kChunks];
  if constexpr (kOverlap != Overlap::kNone) cudaTriggerProgrammaticLaunchCompletion();
  if constexpr (kOverlap == Overlap::kPrefetched) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) loaded[c] = weights[c * 32 + lane];
  }
  if constexpr (kOverlap != Overlap::kNone) cudaGridDependencySynchronize();
  if constexpr (kOverlap != Overlap::kPrefetched) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) loaded[c] = weights[c * 32 + lane];
  }
  float sum = 0;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) sum += Dot(loaded[c], inputs[c * 32 + lane]);
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  if (lane == 0) y[output] = __float2bfloat16(sum);
}

template <Overlap kOverlap, typename... Parameters, typename... Arguments>
void Launch(cudaStream_t stream, unsigned blocks, unsigned threads, void (*kernel)(Parameters...),
            Arguments... arguments) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t configuration = {};
  configuration.gridDim = dim3(blocks);
  configuration.blockDim = dim3(threads);
  configuration.stream = stream;
  configuration.attrs = &attribute;
  configuration.numAttrs = kOverlap == Overlap::kNone ? 0 : 1;
  Check(cudaLaunchKernelEx(&configuration, kernel, arguments...));
}

template <Overlap kOverlap>
void MeasureEmpty(const Probe& probe, const char* form, unsigned blocks, unsigned threads) {
  const Timing timing = TimeInGraph(probe.stream, kChain, [&](cudaStream_t stream, int64_t) {
    Launch<kOverlap>(stream, blocks, threads, EmptyKernel<kOverlap>);
  });
  probe.report->Add(
      Record(kQuestion, form).Set("blocks", static_cast<int64_t>(blocks)).Set(timing));
}

// The chain's input, its matrices with elements of variance 1 / kSize so that norms stay, and two
// vectors that its kernels write in turn.
struct Chain {
  DeviceBuffer<__nv_bfloat16> weights{int64_t{kMatrices} * kSize * kSize};
  DeviceBuffer<__nv_bfloat16> input{kSize};
  DeviceBuffer<__nv_bfloat16> vectors{2 * kSize};

  template <Overlap kOverlap>
  void Enqueue(cudaStream_t stream, int64_t i) const {
    const __nv_bfloat16* x = i == 0 ? input.data() : vectors.data() + (i + 1) % 2 * kSize;
    Launch<kOverlap>(
        stream, kSize / kWarps, kThreads, TinyGemvKernel<kOverlap>,
        static_cast<const __nv_bfloat16*>(weights.data()) + i % kMatrices * kSize * kSize, x,
        vectors.data() + i % 2 * kSize);
  }
};

// The chain's result in double, rounded to bf16 after every product like the kernels'.
std::vector<double> ReferenceChain(const Chain& chain) {
  std::vector<__nv_bfloat16> weights(chain.weights.size()), input(kSize);
  chain.weights.CopyToHost(weights.data());
  chain.input.CopyToHost(input.data());
  std::vector<double> x(kSize), y(kSize);
  for (int k = 0; k < kSize; ++k) x[k] = static_cast<float>(input[k]);
  for (int i = 0; i < kCheckedChain; ++i) {
    const __nv_bfloat16* w = weights.data() + static_cast<size_t>(i % kMatrices) * kSize * kSize;
    for (int j = 0; j < kSize; ++j) {
      double sum = 0;
      for (int k = 0; k < kSize; ++k) sum += static_cast<double>(float(w[j * kSize + k])) * x[k];
      y[j] = static_cast<float>(__float2bfloat16(static_cast<float>(sum)));
    }
    std::swap(x, y);
  }
  return x;
}

template <Overlap kOverlap>
void MeasureTinyGemv(const Probe& probe, const char* form, Chain* chain,
                     const std::vector<double>& expected) {
  chain->vectors.Poison();
  const Graph graph(probe.stream, [&](cudaStream_t stream) {
    for (int i = 0; i < kCheckedChain; ++i) chain->Enqueue<kOverlap>(stream, i);
  });
  graph.Launch(probe.stream);
  Check(cudaStreamSynchronize(probe.stream));
  std::vector<__nv_bfloat16> vectors(chain->vectors.size());
  chain->vectors.CopyToHost(vectors.data());
  double difference = 0, norm = 0;
  for (int j = 0; j < kSize; ++j) {
    const double actual = static_cast<float>(vectors[(kCheckedChain - 1) % 2 * kSize + j]);
    difference += (actual - expected[j]) * (actual - expected[j]);
    norm += expected[j] * expected[j];
  }
  const Timing timing = TimeInGraph(probe.stream, kChain, [&](cudaStream_t stream, int64_t i) {
    chain->Enqueue<kOverlap>(stream, i);
  });
  probe.report->Add(Record(kQuestion, form)
                        .Set("blocks", kSize / kWarps)
                        .Set(timing)
                        .SetError(std::sqrt(difference / norm), kBf16Bar));
}

// Of all blocks: `counter` only grows, and `target` is what it reaches when all have arrived.
__device__ void CounterBarrier(unsigned* counter, unsigned target) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(counter, 1u);
    unsigned seen;
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
    } while (seen < target);
  }
  __syncthreads();
}

// Passes `barriers` barriers. kVerify: before each, every block writes the barrier's number into
// its slot, and after it counts the blocks whose neighbour's slot is behind.
template <bool kCooperativeGroups, bool kVerify>
__global__ void BarrierKernel(int barriers, unsigned* counter, volatile int* slots,
                              int* violations) {
  for (int i = 1; i <= barriers; ++i) {
    if (kVerify && threadIdx.x == 0) slots[blockIdx.x] = i;
    if constexpr (kCooperativeGroups) {
      cooperative_groups::this_grid().sync();
    } else {
      CounterBarrier(counter, static_cast<unsigned>(i) * gridDim.x);
    }
    if (kVerify && threadIdx.x == 0 && slots[(blockIdx.x + 1) % gridDim.x] < i) {
      atomicAdd(violations, 1);
    }
  }
}

template <bool kCooperativeGroups>
void MeasureBarrier(const Probe& probe, const char* form) {
  constexpr int kFew = 1000, kMany = 2000;
  const int blocks = probe.device.multiProcessorCount;
  DeviceBuffer<unsigned> counter(1);
  DeviceBuffer<int> slots(blocks), violations(1);
  const auto launch = [&](const void* kernel, int barriers) {
    Check(cudaMemsetAsync(counter.data(), 0, counter.bytes(), probe.stream));
    unsigned* counter_data = counter.data();
    int* slots_data = slots.data();
    int* violations_data = violations.data();
    void* arguments[] = {&barriers, &counter_data, &slots_data, &violations_data};
    Check(cudaLaunchCooperativeKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads),
                                      arguments, 0, probe.stream));
  };
  Check(cudaMemset(slots.data(), 0, slots.bytes()));
  Check(cudaMemset(violations.data(), 0, violations.bytes()));
  launch(reinterpret_cast<const void*>(&BarrierKernel<kCooperativeGroups, true>), kFew);
  Check(cudaStreamSynchronize(probe.stream));
  int violated = -1;
  violations.CopyToHost(&violated);

  const auto* timed = reinterpret_cast<const void*>(&BarrierKernel<kCooperativeGroups, false>);
  const Timing few =
      TimeInStream(probe.stream, 1, [&](cudaStream_t, int64_t) { launch(timed, kFew); });
  const Timing many =
      TimeInStream(probe.stream, 1, [&](cudaStream_t, int64_t) { launch(timed, kMany); });
  Timing slope;  // a launch costs the same in both
  slope.first = (many.first - few.first) / (kMany - kFew);
  slope.second = (many.second - few.second) / (kMany - kFew);
  slope.invocations = kMany - kFew;
  probe.report->Add(Record(kQuestion, form).Set("blocks", blocks).Set(slope).SetError(violated, 0));
}

}  // namespace

void MeasureLaunchCost(const Probe& probe) {
  const unsigned all = static_cast<unsigned>(probe.device.multiProcessorCount);
  MeasureEmpty<Overlap::kNone>(probe, "empty, 1 block", 1, 32);
  MeasureEmpty<Overlap::kProgrammatic>(probe, "empty, 1 block, programmatic", 1, 32);
  MeasureEmpty<Overlap::kNone>(probe, "empty, all SMs", all, kThreads);
  MeasureEmpty<Overlap::kProgrammatic>(probe, "empty, all SMs, programmatic", all, kThreads);

  Chain chain;
  Check(FillNormal(chain.weights.data(), NumberType::kBf16, chain.weights.size(),
                   1 / std::sqrt(static_cast<float>(kSize)), 21, probe.stream));
  Check(FillNormal(chain.input.data(), NumberType::kBf16, kSize, 1.0f, 22, probe.stream));
  Check(cudaStreamSynchronize(probe.stream));
  const std::vector<double> expected = ReferenceChain(chain);
  MeasureTinyGemv<Overlap::kNone>(probe, "tiny GEMV", &chain, expected);
  MeasureTinyGemv<Overlap::kProgrammatic>(probe, "tiny GEMV, programmatic", &chain, expected);
  MeasureTinyGemv<Overlap::kPrefetched>(probe, "tiny GEMV, programmatic, prefetched", &chain,
                                        expected);

  MeasureBarrier<true>(probe, "grid barrier of cooperative groups");
  MeasureBarrier<false>(probe, "grid barrier by a counter");
}

}  // namespace nestor::probe
