#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include <cmath>
#include <limits>

#include "kernels/cuda/probe/random_fill.h"
#include "kernels/cuda/probe/reference.h"

namespace nestor::probe {
namespace {

constexpr int kThreads = 256;

__host__ __device__ double Load(const void* data, NumberType type, int64_t index) {
  switch (type) {
    case NumberType::kBf16:
      return static_cast<double>(
          static_cast<float>(static_cast<const __nv_bfloat16*>(data)[index]));
    case NumberType::kFp8:
      return static_cast<double>(
          static_cast<float>(static_cast<const __nv_fp8_e4m3*>(data)[index]));
    case NumberType::kFloat:
      return static_cast<const float*>(data)[index];
    case NumberType::kDouble:
      return static_cast<const double*>(data)[index];
  }
  return 0;
}

__host__ __device__ double At(const MatrixView& matrix, int64_t i, int64_t k) {
  return Load(matrix.data, matrix.type, matrix.transposed ? k * matrix.ld + i : i * matrix.ld + k);
}

// One warp per element of out.
__global__ void ReferenceKernel(MatrixView weights, const int64_t* outputs, int64_t num_outputs,
                                MatrixView x, const int64_t* rows, int64_t num_rows, int64_t inputs,
                                double scale, double* out) {
  const int64_t element = (blockIdx.x * int64_t{kThreads} + threadIdx.x) / 32;
  if (element >= num_rows * num_outputs) return;
  const int lane = threadIdx.x % 32;
  const int64_t row = rows[element / num_outputs];
  const int64_t output = outputs[element % num_outputs];
  double sum = 0;
  for (int64_t k = lane; k < inputs; k += 32) sum += At(weights, output, k) * At(x, row, k);
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  if (lane == 0) out[element] = scale * sum;
}

__global__ void GatherKernel(MatrixView y, const int64_t* rows, int64_t num_rows,
                             const int64_t* outputs, int64_t num_outputs, double* out) {
  const int64_t element = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (element >= num_rows * num_outputs) return;
  out[element] = At(y, rows[element / num_outputs], outputs[element % num_outputs]);
}

__global__ void CountNanKernel(MatrixView y, int64_t num_rows, int64_t num_outputs,
                               unsigned long long* count) {
  const int64_t size = num_rows * num_outputs;
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < size;
       i += int64_t{kThreads} * gridDim.x) {
    if (isnan(At(y, i / num_outputs, i % num_outputs))) atomicAdd(count, 1ull);
  }
}

__global__ void AddKernel(double* a, const double* b, int64_t count) {
  const int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (i < count) a[i] += b[i];
}

unsigned Blocks(int64_t threads) {
  return static_cast<unsigned>((threads + kThreads - 1) / kThreads);
}

DeviceBuffer<int64_t> ToDevice(const std::vector<int64_t>& values) {
  DeviceBuffer<int64_t> buffer(static_cast<int64_t>(values.size()));
  buffer.CopyFromHost(values.data());
  return buffer;
}

double SelfCheck(cudaStream_t stream, NumberType type, bool transposed) {
  constexpr int64_t kOutputs = 48, kInputs = 96, kRows = 3;
  DeviceBuffer<char> weights(kOutputs * kInputs * BytesOf(type));
  DeviceBuffer<char> x(kRows * kInputs * BytesOf(type));
  Check(FillNormal(weights.data(), type, kOutputs * kInputs, 1.0f, 11, stream));
  Check(FillNormal(x.data(), type, kRows * kInputs, 1.0f, 12, stream));
  const std::vector<int64_t> outputs = SpreadIndices(kOutputs, 7);
  const std::vector<int64_t> rows = SpreadIndices(kRows, kRows);
  MatrixView weights_view{weights.data(), type, transposed ? kOutputs : kInputs, transposed};
  MatrixView x_view{x.data(), type, kInputs, false};
  const DeviceBuffer<double> computed =
      ReferenceProduct(stream, weights_view, outputs, x_view, rows, kInputs);

  std::vector<char> host_weights(weights.bytes()), host_x(x.bytes());
  std::vector<double> values(computed.size());
  weights.CopyToHost(host_weights.data());
  x.CopyToHost(host_x.data());
  computed.CopyToHost(values.data());
  weights_view.data = host_weights.data();
  x_view.data = host_x.data();
  double difference = 0, norm = 0;
  for (size_t s = 0; s < rows.size(); ++s) {
    for (size_t j = 0; j < outputs.size(); ++j) {
      double sum = 0;
      for (int64_t k = 0; k < kInputs; ++k) {
        sum += At(weights_view, outputs[j], k) * At(x_view, rows[s], k);
      }
      difference += std::pow(values[s * outputs.size() + j] - sum, 2);
      norm += sum * sum;
    }
  }
  return std::sqrt(difference / norm);
}

}  // namespace

std::vector<int64_t> SpreadIndices(int64_t extent, int64_t count) {
  std::vector<int64_t> indices;
  if (extent <= count) {
    for (int64_t i = 0; i < extent; ++i) indices.push_back(i);
    return indices;
  }
  // The odd remainder keeps the indices from all being multiples of a tile's size.
  for (int64_t i = 0; i < count; ++i) {
    indices.push_back(i == count - 1 ? extent - 1
                                     : i * extent / count + (i * 37) % (extent / count));
  }
  indices[0] = 0;
  return indices;
}

DeviceBuffer<double> ReferenceProduct(cudaStream_t stream, const MatrixView& weights,
                                      const std::vector<int64_t>& outputs, const MatrixView& x,
                                      const std::vector<int64_t>& rows, int64_t inputs,
                                      double scale) {
  const int64_t num_outputs = static_cast<int64_t>(outputs.size());
  const int64_t num_rows = static_cast<int64_t>(rows.size());
  const DeviceBuffer<int64_t> device_outputs = ToDevice(outputs), device_rows = ToDevice(rows);
  DeviceBuffer<double> out(num_rows * num_outputs);
  ReferenceKernel<<<Blocks(out.size() * 32), kThreads, 0, stream>>>(
      weights, device_outputs.data(), num_outputs, x, device_rows.data(), num_rows, inputs, scale,
      out.data());
  CheckLaunch();
  Check(cudaStreamSynchronize(stream));
  return out;
}

double RelativeError(cudaStream_t stream, const DeviceBuffer<double>& reference,
                     const MatrixView& y, int64_t num_rows, const std::vector<int64_t>& rows,
                     int64_t num_outputs, const std::vector<int64_t>& outputs) {
  DeviceBuffer<unsigned long long> num_nan(1);
  Check(cudaMemsetAsync(num_nan.data(), 0, num_nan.bytes(), stream));
  CountNanKernel<<<1024, kThreads, 0, stream>>>(y, num_rows, num_outputs, num_nan.data());
  CheckLaunch();
  const DeviceBuffer<int64_t> device_outputs = ToDevice(outputs), device_rows = ToDevice(rows);
  DeviceBuffer<double> gathered(reference.size());
  GatherKernel<<<Blocks(gathered.size()), kThreads, 0, stream>>>(
      y, device_rows.data(), static_cast<int64_t>(rows.size()), device_outputs.data(),
      static_cast<int64_t>(outputs.size()), gathered.data());
  CheckLaunch();
  Check(cudaStreamSynchronize(stream));

  unsigned long long count = 0;
  num_nan.CopyToHost(&count);
  if (count > 0) return std::numeric_limits<double>::quiet_NaN();
  std::vector<double> expected(reference.size()), actual(gathered.size());
  reference.CopyToHost(expected.data());
  gathered.CopyToHost(actual.data());
  double difference = 0, norm = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    difference += (actual[i] - expected[i]) * (actual[i] - expected[i]);
    norm += expected[i] * expected[i];
  }
  return std::sqrt(difference / norm);
}

void AddReference(cudaStream_t stream, DeviceBuffer<double>* a, const DeviceBuffer<double>& b) {
  AddKernel<<<Blocks(a->size()), kThreads, 0, stream>>>(a->data(), b.data(), a->size());
  CheckLaunch();
  Check(cudaStreamSynchronize(stream));
}

double ReferenceSelfCheck(cudaStream_t stream) {
  double worst = 0;
  for (const NumberType type :
       {NumberType::kBf16, NumberType::kFp8, NumberType::kFloat, NumberType::kDouble}) {
    for (const bool transposed : {false, true}) {
      worst = WorseError(worst, SelfCheck(stream, type, transposed));
    }
  }
  return worst;
}

}  // namespace nestor::probe
