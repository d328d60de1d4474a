#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>

#include "kernels/cuda/probe/cold_weights.h"
#include "kernels/cuda/probe/cublas_lt.h"
#include "kernels/cuda/probe/number_type.h"
#include "kernels/cuda/probe/report.h"

namespace nestor::probe {

// A linear layer: y[m] = W[m, n] x[n].
struct LayerShape {
  int64_t m = 0;
  int64_t n = 0;

  int64_t max_rank() const { return m < n ? m : n; }
  // The rank at a fraction of the largest, in eighths; rounded up to what fp8 products align to.
  int64_t RankAtEighths(int eighths) const { return RoundUp(max_rank() * eighths / 8, 16); }
};

inline constexpr LayerShape kLayers[] = {{576, 1536},  {2048, 2048},  {2048, 8192},
                                         {4096, 4096}, {4096, 14336}, {128256, 4096}};
inline constexpr int64_t kRows[] = {1, 4, 16, 64, 256, 2048};
inline constexpr int kEighths[] = {1, 2, 3, 4};

// Bars of the checks, as ‖out − ref‖ / ‖ref‖. Every product sums in float and rounds once to bf16
// (relative step 2^-8, so 1.7e-3 in the mean square); pairs round twice. An fp8 intermediate has a
// step of 2^-3, so 2.6e-2 in the mean square.
inline constexpr double kBf16Bar = 1e-2;
inline constexpr double kFp8PairBar = 5e-2;

// What every part of the probe works with: the device, activations and weights of random numbers,
// and the report. The buffers are shared: a part overwrites only y.
struct Probe {
  cudaDeviceProp device;
  cudaStream_t stream;
  const CublasLt* lt;
  const WeightPool* bf16_weights;
  const WeightPool* fp8_weights;
  const void* bf16_x;  // [max rows, max inputs]
  const void* fp8_x;
  void* y;  // room for [max rows, max outputs] in bf16
  Report* report;
  std::string weights_path;  // of real weights (export_weights.py); empty: none

  const WeightPool& weights(NumberType type) const {
    return type == NumberType::kFp8 ? *fp8_weights : *bf16_weights;
  }
  const void* x(NumberType type) const { return type == NumberType::kFp8 ? fp8_x : bf16_x; }
};

// Enough invocations that the copies' round is complete and the graph is worth a sample.
inline int64_t MinInvocations(const ColdWeights& weights) {
  return weights.copies > 4 ? weights.copies : 4;
}

// One function per question, each in a file of its own.
void MeasureCeilings(const Probe& probe);
void MeasureLaunchCost(const Probe& probe);
void MeasureLayers(const Probe& probe);
void MeasureCrossover(const Probe& probe);
void MeasureStridedPrefixes(const Probe& probe);
void MeasurePlanes(const Probe& probe);
void MeasureGemv4(const Probe& probe);
void MeasureSwitching(const Probe& probe);

}  // namespace nestor::probe
