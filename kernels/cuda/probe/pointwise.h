#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/cuda/probe/number_type.h"

namespace nestor::probe {

// Launchers of plain kernels. Nothing is allocated or synchronised.

// y += t, both bf16. Bytes moved: 6 · count. REQUIRES: count divisible by 8.
cudaError_t AddInto(void* y, const void* t, int64_t count, cudaStream_t stream);

// Quantises every row of x [rows, columns] on its own: scales[i] = max_k |x(i, k)| / 448 (1 for a
// row of zeros), out(i, k) = e4m3(x(i, k) / scales[i]). x is bf16 or float. Bytes moved: the row is
// read twice, the second time from the cache, and written once.
cudaError_t QuantiseRows(const void* x, NumberType type, int64_t rows, int64_t columns, void* out,
                         float* scales, cudaStream_t stream);

// residual(i, k) = w(i, k) − scales[i] · plane(i, k); w and residual float, plane e4m3.
cudaError_t SubtractPlane(const float* w, const void* plane, const float* scales, int64_t rows,
                          int64_t columns, float* residual, cudaStream_t stream);

// y(t, j) = row_scales[t] · (scales0[j] · sums0(t, j) + scales1[j] · sums1(t, j)) in bf16; sums1
// and scales1 may be null together.
struct PlaneSums {
  const float* sums0;
  const float* scales0;
  const float* sums1;
  const float* scales1;
  const float* row_scales;
};
cudaError_t CombinePlanes(const PlaneSums& planes, int64_t rows, int64_t outputs, void* y,
                          cudaStream_t stream);

// out = float(x), x in bf16.
cudaError_t Widen(const void* x, int64_t count, float* out, cudaStream_t stream);

}  // namespace nestor::probe
