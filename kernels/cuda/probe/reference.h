#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "kernels/cuda/probe/cuda_check.h"
#include "kernels/cuda/probe/number_type.h"

namespace nestor::probe {

// A matrix in device memory, row-major: element (i, k) is data[i · ld + k].
struct MatrixView {
  const void* data = nullptr;
  NumberType type = NumberType::kBf16;
  int64_t ld = 0;           // elements
  bool transposed = false;  // element (i, k) is data[k · ld + i] instead
};

// At most `count` indices below `extent`, spread over it, with the first and the last.
std::vector<int64_t> SpreadIndices(int64_t extent, int64_t count);

// out[s, j] = scale · Σ_k weights(outputs[j], k) · x(rows[s], k), k < inputs, all in double, by
// plain dot products. The result is [rows.size(), outputs.size()].
DeviceBuffer<double> ReferenceProduct(cudaStream_t stream, const MatrixView& weights,
                                      const std::vector<int64_t>& outputs, const MatrixView& x,
                                      const std::vector<int64_t>& rows, int64_t inputs,
                                      double scale = 1.0);

// ‖y − reference‖ / ‖reference‖ over y(rows[s], outputs[j]). NaN if any of the y[num_rows,
// num_outputs] is NaN, so poison that was not overwritten never passes.
double RelativeError(cudaStream_t stream, const DeviceBuffer<double>& reference,
                     const MatrixView& y, int64_t num_rows, const std::vector<int64_t>& rows,
                     int64_t num_outputs, const std::vector<int64_t>& outputs);

// The larger of two errors; NaN where one is.
inline double WorseError(double a, double b) { return a != a || b <= a ? a : b; }

// a += b, elementwise; sizes are equal.
void AddReference(cudaStream_t stream, DeviceBuffer<double>* a, const DeviceBuffer<double>& b);

// The reference's own relative error against double arithmetic on the host, for every type.
double ReferenceSelfCheck(cudaStream_t stream);

}  // namespace nestor::probe
