// Switching levels between steps: replaying another level's graph, against one graph whose kernels
// read their rank from device memory.
//
// A step is a chain of 16 layers of 2048 × 2048 as prefix pairs, one row, by plain GEMV kernels;
// the two levels are half and an eighth of the rank. B is [m, R] with ld = R in every variant.
#include <cuda_bf16.h>

#include <cmath>
#include <functional>
#include <vector>

#include "kernels/cuda/probe/probe.h"
#include "kernels/cuda/probe/reference.h"
#include "kernels/cuda/probe/timing.h"

namespace nestor::probe {
namespace {

constexpr const char* kQuestion = "switching";
constexpr int kWidth = 2048;  // inputs and outputs of every layer
constexpr int kHighRank = 1024;
constexpr int kLowRank = 256;
constexpr int kNumLayers = 16;
constexpr int kWarps = 8;
constexpr int64_t kSteps = 32;                            // a sample
constexpr int64_t kFactor = int64_t{kHighRank} * kWidth;  // elements of A, and of B

// y[j] = alpha Σ_k w[j, k] x[k]; one warp per output; `inputs` divisible by 8.
__device__ void WarpGemv(const __nv_bfloat16* w, const __nv_bfloat16* x, int inputs, float alpha,
                         __nv_bfloat16* y) {
  const int lane = threadIdx.x % 32;
  float sum = 0;
  for (int k = lane * 8; k < inputs; k += 32 * 8) {
    const uint4 weights = *reinterpret_cast<const uint4*>(w + k);
    const uint4 values = *reinterpret_cast<const uint4*>(x + k);
    const auto* a = reinterpret_cast<const __nv_bfloat162*>(&weights);
    const auto* b = reinterpret_cast<const __nv_bfloat162*>(&values);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 l = __bfloat1622float2(a[i]), r = __bfloat1622float2(b[i]);
      sum += l.x * r.x + l.y * r.y;
    }
  }
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  if (lane == 0) *y = __float2bfloat16(alpha * sum);
}

// Rank: `fixed` where `in_memory` is null.
__device__ int Rank(int fixed, const int* in_memory) {
  return in_memory == nullptr ? fixed : *in_memory;
}

// z = A_r x / √n: norms stay along the chain.
__global__ void DownKernel(const __nv_bfloat16* a, const __nv_bfloat16* x, int fixed,
                           const int* in_memory, __nv_bfloat16* z) {
  const int component = blockIdx.x * kWarps + threadIdx.x / 32;
  if (component >= Rank(fixed, in_memory)) return;
  WarpGemv(a + int64_t{component} * kWidth, x, kWidth, rsqrtf(kWidth), z + component);
}

// y = B_r z / √r.
__global__ void UpKernel(const __nv_bfloat16* b, const __nv_bfloat16* z, int fixed,
                         const int* in_memory, __nv_bfloat16* y) {
  const int output = blockIdx.x * kWarps + threadIdx.x / 32;
  const int rank = Rank(fixed, in_memory);
  WarpGemv(b + int64_t{output} * kHighRank, z, rank, rsqrtf(static_cast<float>(rank)), y + output);
}

__global__ void SetRankKernel(int rank, int* in_memory) { *in_memory = rank; }

class Chain {
 public:
  explicit Chain(const Probe& probe)
      : weights_(reinterpret_cast<const __nv_bfloat16*>(probe.bf16_weights->data())),
        input_(static_cast<const __nv_bfloat16*>(probe.bf16_x)),
        vectors_(2 * kWidth),
        z_(kHighRank),
        rank_(1) {}

  // One step. `rank` 0: the kernels read it from memory, with a grid that fits the largest.
  void Enqueue(cudaStream_t stream, int rank) const {
    const int* in_memory = rank == 0 ? rank_.data() : nullptr;
    const unsigned components = static_cast<unsigned>(rank == 0 ? kHighRank : rank);
    for (int layer = 0; layer < kNumLayers; ++layer) {
      const __nv_bfloat16* a = weights_ + 2 * kFactor * layer;
      const __nv_bfloat16* x = layer == 0 ? input_ : vectors_.data() + (layer + 1) % 2 * kWidth;
      DownKernel<<<components / kWarps, kWarps * 32, 0, stream>>>(a, x, rank, in_memory, z_.data());
      CheckLaunch();
      UpKernel<<<kWidth / kWarps, kWarps * 32, 0, stream>>>(a + kFactor, z_.data(), rank, in_memory,
                                                            vectors_.data() + layer % 2 * kWidth);
      CheckLaunch();
    }
  }

  void SetRankByKernel(cudaStream_t stream, int rank) const {
    SetRankKernel<<<1, 1, 0, stream>>>(rank, rank_.data());
    CheckLaunch();
  }

  // `rank` must stay as it is until the copy is over.
  void SetRankByCopy(cudaStream_t stream, const int* pinned_rank) const {
    Check(cudaMemcpyAsync(rank_.data(), pinned_rank, sizeof(int), cudaMemcpyHostToDevice, stream));
  }

  // Error of the last step's output against the chain in double, rounded to bf16 like the kernels'.
  double Error(int rank) const {
    std::vector<__nv_bfloat16> weights(2 * kFactor * kNumLayers), input(kWidth);
    std::vector<__nv_bfloat16> output(2 * kWidth);
    Check(cudaMemcpy(weights.data(), weights_, weights.size() * 2, cudaMemcpyDeviceToHost));
    Check(cudaMemcpy(input.data(), input_, input.size() * 2, cudaMemcpyDeviceToHost));
    vectors_.CopyToHost(output.data());
    const auto rounded = [](double value) {
      return static_cast<double>(float(__float2bfloat16(static_cast<float>(value))));
    };
    std::vector<double> x(kWidth), z(rank);
    for (int k = 0; k < kWidth; ++k) x[k] = static_cast<float>(input[k]);
    for (int layer = 0; layer < kNumLayers; ++layer) {
      const __nv_bfloat16* a = weights.data() + 2 * kFactor * layer;
      const __nv_bfloat16* b = a + kFactor;
      for (int i = 0; i < rank; ++i) {
        double sum = 0;
        for (int k = 0; k < kWidth; ++k) sum += float(a[int64_t{i} * kWidth + k]) * x[k];
        z[i] = rounded(sum / std::sqrt(double{kWidth}));
      }
      for (int j = 0; j < kWidth; ++j) {
        double sum = 0;
        for (int i = 0; i < rank; ++i) sum += float(b[int64_t{j} * kHighRank + i]) * z[i];
        x[j] = rounded(sum / std::sqrt(static_cast<double>(rank)));
      }
    }
    double difference = 0, norm = 0;
    for (int j = 0; j < kWidth; ++j) {
      const double actual = float(output[(kNumLayers - 1) % 2 * kWidth + j]);
      difference += (actual - x[j]) * (actual - x[j]);
      norm += x[j] * x[j];
    }
    return std::sqrt(difference / norm);
  }

  void Poison() {
    vectors_.Poison();
    z_.Poison();
  }

 private:
  const __nv_bfloat16* weights_;         // per layer A [kHighRank, kWidth], B [kWidth, kHighRank]
  const __nv_bfloat16* input_;           // [kWidth]
  DeviceBuffer<__nv_bfloat16> vectors_;  // of even and of odd layers
  DeviceBuffer<__nv_bfloat16> z_;
  DeviceBuffer<int> rank_;
};

// Enqueues one step at a rank.
using Step = std::function<void(cudaStream_t, int rank)>;

void MeasureVariant(const Probe& probe, const char* form, Chain* chain, const Step& step) {
  double error = 0;
  for (const int rank : {kHighRank, kLowRank}) {
    chain->Poison();
    step(probe.stream, rank);
    Check(cudaStreamSynchronize(probe.stream));
    error = WorseError(error, chain->Error(rank));
  }
  const auto add = [&](const char* levels, const std::function<int(int64_t)>& rank_of) {
    const Timing timing = TimeInStream(
        probe.stream, kSteps,
        [&](cudaStream_t stream, int64_t invocation) { step(stream, rank_of(invocation)); });
    probe.report->Add(
        Record(kQuestion, form).Set("levels", levels).Set(timing).SetError(error, kBf16Bar));
  };
  add("high", [](int64_t) { return kHighRank; });
  add("low", [](int64_t) { return kLowRank; });
  add("alternating", [](int64_t i) { return i % 2 == 0 ? kHighRank : kLowRank; });
}

}  // namespace

void MeasureSwitching(const Probe& probe) {
  Chain chain(probe);
  const auto graph_of = [&](int rank) {
    return [&chain, rank](cudaStream_t stream) { chain.Enqueue(stream, rank); };
  };
  const Graph high(probe.stream, graph_of(kHighRank));
  const Graph low(probe.stream, graph_of(kLowRank));
  const Graph any(probe.stream, graph_of(0));
  int* pinned = nullptr;  // one number per level
  Check(cudaMallocHost(reinterpret_cast<void**>(&pinned), 2 * sizeof(int)));
  pinned[0] = kHighRank;
  pinned[1] = kLowRank;

  MeasureVariant(probe, "a graph per level", &chain, [&](cudaStream_t stream, int rank) {
    (rank == kHighRank ? high : low).Launch(stream);
  });
  MeasureVariant(probe, "one graph, rank copied from the host", &chain,
                 [&](cudaStream_t stream, int rank) {
                   chain.SetRankByCopy(stream, rank == kHighRank ? pinned : pinned + 1);
                   any.Launch(stream);
                 });
  MeasureVariant(probe, "one graph, rank set by a kernel", &chain,
                 [&](cudaStream_t stream, int rank) {
                   chain.SetRankByKernel(stream, rank);
                   any.Launch(stream);
                 });
  Check(cudaStreamSynchronize(probe.stream));
  Check(cudaFreeHost(pinned));
}

}  // namespace nestor::probe
