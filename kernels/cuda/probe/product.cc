#include "kernels/cuda/probe/product.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "kernels/cuda/probe/timing.h"

namespace nestor::probe {
namespace {

constexpr int kCandidates = 6;

cudaDataType_t CudaType(NumberType type) {
  switch (type) {
    case NumberType::kBf16:
      return CUDA_R_16BF;
    case NumberType::kFp8:
      return CUDA_R_8F_E4M3;
    case NumberType::kFloat:
      return CUDA_R_32F;
    case NumberType::kDouble:
      return CUDA_R_64F;
  }
  return CUDA_R_32F;
}

int64_t WeightLd(const ProductShape& shape) {
  if (shape.weight_ld != 0) return shape.weight_ld;
  return shape.transposed ? shape.outputs : shape.inputs;
}

// Seconds of one invocation: the best of three replays of a short graph.
double QuickTime(cudaStream_t stream, int64_t invocations, const Work& work) {
  const Graph graph(stream, [&](cudaStream_t captured) {
    for (int64_t i = 0; i < invocations; ++i) work(captured, i);
  });
  cudaEvent_t start, stop;
  Check(cudaEventCreate(&start));
  Check(cudaEventCreate(&stop));
  double best = std::numeric_limits<double>::infinity();
  for (int replay = 0; replay < 3; ++replay) {
    Check(Delay(50, stream));
    Check(cudaEventRecord(start, stream));
    graph.Launch(stream);
    Check(cudaEventRecord(stop, stream));
    Check(cudaEventSynchronize(stop));
    float milliseconds = 0;
    Check(cudaEventElapsedTime(&milliseconds, start, stop));
    best = std::min(best, milliseconds * 1e-3 / static_cast<double>(invocations));
  }
  Check(cudaEventDestroy(start));
  Check(cudaEventDestroy(stop));
  return best;
}

}  // namespace

template <typename Value>
void Product::SetAttribute(cublasLtMatmulDescAttributes_t attribute, const Value& value) {
  Check(lt_.MatmulDescSetAttribute(description_, attribute, &value, sizeof value));
}

// cublasLt is column-major: a row-major W [outputs, inputs] is its [inputs, outputs], to be
// transposed, x is its [inputs, rows] and y its [outputs, rows].
Product::Product(const CublasLt& lt, const ProductShape& shape) : lt_(lt), shape_(shape) {
  Check(lt.MatmulDescCreate(&description_, CUBLAS_COMPUTE_32F, CUDA_R_32F));
  SetAttribute(CUBLASLT_MATMUL_DESC_TRANSA, shape.transposed ? CUBLAS_OP_N : CUBLAS_OP_T);
  SetAttribute(CUBLASLT_MATMUL_DESC_TRANSB, CUBLAS_OP_N);
  const cudaDataType_t type = CudaType(shape.type);
  const int64_t ld = WeightLd(shape);
  Check(lt.MatrixLayoutCreate(&weight_layout_, type,
                              shape.transposed ? shape.outputs : shape.inputs,
                              shape.transposed ? shape.inputs : shape.outputs, ld));
  Check(lt.MatrixLayoutCreate(&input_layout_, type, shape.inputs, shape.rows, shape.inputs));
  // An fp8 output has no fp8 source.
  const NumberType source = shape.output == NumberType::kFp8 ? NumberType::kBf16 : shape.output;
  Check(lt.MatrixLayoutCreate(&source_layout_, CudaType(source), shape.outputs, shape.rows,
                              shape.outputs));
  Check(lt.MatrixLayoutCreate(&output_layout_, CudaType(shape.output), shape.outputs, shape.rows,
                              shape.outputs));
  if (shape.type != NumberType::kFp8) return;
  const std::vector<float> scales = {1.0f, shape.input_scale, shape.output_scale};
  scales_ = DeviceBuffer<float>(static_cast<int64_t>(scales.size()));
  scales_.CopyFromHost(scales.data());
  if (shape.outer_scales) {
    const int32_t mode = CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F;
    SetAttribute(CUBLASLT_MATMUL_DESC_A_SCALE_MODE, mode);
    SetAttribute(CUBLASLT_MATMUL_DESC_B_SCALE_MODE, mode);
  }
  SetAttribute(CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, static_cast<const void*>(scales_.data()));
  SetAttribute(CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, static_cast<const void*>(scales_.data() + 1));
  if (shape.output == NumberType::kFp8) {
    SetAttribute(CUBLASLT_MATMUL_DESC_D_SCALE_POINTER,
                 static_cast<const void*>(scales_.data() + 2));
  }
}

Product::~Product() {
  for (cublasLtMatrixLayout_t layout :
       {weight_layout_, input_layout_, source_layout_, output_layout_}) {
    lt_.MatrixLayoutDestroy(layout);
  }
  lt_.MatmulDescDestroy(description_);
}

std::unique_ptr<Product> Product::Create(const CublasLt& lt, const ProductShape& shape,
                                         cudaStream_t stream, const ColdWeights& weights,
                                         const void* x, void* y, std::string* reason) {
  auto product = CreateExact(lt, shape, stream, weights, x, y, reason);
  if (product != nullptr || shape.rows % kRowPadding == 0) return product;
  ProductShape padded = shape;
  padded.rows = RoundUp(shape.rows, kRowPadding);
  return CreateExact(lt, padded, stream, weights, x, y, reason);
}

std::unique_ptr<Product> Product::CreateExact(const CublasLt& lt, const ProductShape& shape,
                                              cudaStream_t stream, const ColdWeights& weights,
                                              const void* x, void* y, std::string* reason) {
  std::unique_ptr<Product> product(new Product(lt, shape));
  DeviceBuffer<float> ones;
  if (shape.outer_scales) {
    const std::vector<float> host(std::max(shape.outputs, shape.rows), 1.0f);
    ones = DeviceBuffer<float>(static_cast<int64_t>(host.size()));
    ones.CopyFromHost(host.data());
    product->SetScales(ones.data(), ones.data());
  }
  cublasLtMatmulPreference_t preference = nullptr;
  Check(lt.MatmulPreferenceCreate(&preference));
  const size_t workspace = lt.workspace_bytes();
  Check(lt.MatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                        &workspace, sizeof workspace));
  cublasLtMatmulHeuristicResult_t candidates[kCandidates] = {};
  int count = 0;
  const cublasStatus_t status = lt.MatmulAlgoGetHeuristic(
      lt.handle(), product->description_, product->weight_layout_, product->input_layout_,
      product->source_layout_, product->output_layout_, preference, kCandidates, candidates,
      &count);
  Check(lt.MatmulPreferenceDestroy(preference));
  if (status == CUBLAS_STATUS_SUCCESS && count > 0) {
    // One that is proposed may still refuse to run.
    const auto* end = std::remove_if(
        candidates, candidates + count, [&](const cublasLtMatmulHeuristicResult_t& candidate) {
          return candidate.state != CUBLAS_STATUS_SUCCESS ||
                 product->TryEnqueue(stream, candidate.algo, weights.copy(0), x, y) !=
                     CUBLAS_STATUS_SUCCESS;
        });
    count = static_cast<int>(end - candidates);
  }
  Check(cudaStreamSynchronize(stream));
  if (status != CUBLAS_STATUS_SUCCESS || count == 0) {
    *reason = "cublasLt has no algorithm (status " + std::to_string(status) + ")";
    return nullptr;
  }
  product->Tune(stream, candidates, count, weights, x, y);
  return product;
}

void Product::Tune(cudaStream_t stream, const cublasLtMatmulHeuristicResult_t* candidates,
                   int count, const ColdWeights& weights, const void* x, void* y) {
  // About a third of a millisecond each, at rates that are near an H200's.
  const double estimate = std::max({shape_.flops() / 600e12, shape_.weight_bytes() / 4e12, 2e-6});
  const int64_t invocations = std::clamp<int64_t>(static_cast<int64_t>(3e-4 / estimate), 2, 64);
  double best = std::numeric_limits<double>::infinity();
  for (int i = 0; i < count; ++i) {
    const double seconds =
        QuickTime(stream, invocations, [&](cudaStream_t captured, int64_t invocation) {
          Check(TryEnqueue(captured, candidates[i].algo, weights.copy(invocation), x, y));
        });
    if (seconds < best) {
      best = seconds;
      algorithm_ = candidates[i].algo;
    }
  }
}

void Product::SetScales(const float* weight_scales, const float* row_scales) {
  SetAttribute(CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, static_cast<const void*>(weight_scales));
  SetAttribute(CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, static_cast<const void*>(row_scales));
}

cublasStatus_t Product::TryEnqueue(cudaStream_t stream, const cublasLtMatmulAlgo_t& algorithm,
                                   const void* weights, const void* x, void* y) const {
  const float alpha = 1, beta = shape_.accumulate ? 1 : 0;
  return lt_.Matmul(lt_.handle(), description_, &alpha, weights, weight_layout_, x, input_layout_,
                    &beta, y, source_layout_, y, output_layout_, &algorithm, lt_.workspace(),
                    lt_.workspace_bytes(), stream);
}

void Product::Enqueue(cudaStream_t stream, const void* weights, const void* x, void* y) const {
  Check(TryEnqueue(stream, algorithm_, weights, x, y));
}

MatrixView Product::WeightView(const void* weights) const {
  return {weights, shape_.type, WeightLd(shape_), shape_.transposed};
}

MatrixView Product::InputView(const void* x) const {
  return {x, shape_.type, shape_.inputs, false};
}

MatrixView Product::OutputView(const void* y) const {
  return {y, shape_.output, shape_.outputs, false};
}

double CheckedError(const Product& product, cudaStream_t stream, const ColdWeights& weights,
                    const void* x, void* y) {
  const ProductShape& shape = product.shape();
  Check(cudaMemsetAsync(y, 0xff, shape.rows * shape.outputs * BytesOf(shape.output), stream));
  product.Enqueue(stream, weights.copy(0), x, y);
  const std::vector<int64_t> rows = SpreadIndices(shape.rows, 8);
  const std::vector<int64_t> outputs = SpreadIndices(shape.outputs, 64);
  const DeviceBuffer<double> reference =
      ReferenceProduct(stream, product.WeightView(weights.copy(0)), outputs, product.InputView(x),
                       rows, shape.inputs, shape.input_scale * double{shape.output_scale});
  return RelativeError(stream, reference, product.OutputView(y), shape.rows, rows, shape.outputs,
                       outputs);
}

}  // namespace nestor::probe
