#pragma once

#include <cuda_runtime_api.h>

#include <memory>
#include <string>

#include "kernels/cuda/probe/cold_weights.h"
#include "kernels/cuda/probe/cublas_lt.h"
#include "kernels/cuda/probe/number_type.h"
#include "kernels/cuda/probe/reference.h"

namespace nestor::probe {

// y[rows, outputs] = x[rows, inputs] · Wᵀ, W is [outputs, inputs]; accumulation in float.
struct ProductShape {
  int64_t outputs = 0;
  int64_t inputs = 0;
  int64_t rows = 0;
  NumberType type = NumberType::kBf16;    // of W and x
  NumberType output = NumberType::kBf16;  // of y
  int64_t weight_ld = 0;                  // elements between rows of W; 0: contiguous
  bool transposed = false;                // W is stored as [inputs, outputs]
  bool accumulate = false;                // y +=
  // fp8 only. One scale per output and one per row instead of one each for all.
  bool outer_scales = false;
  // fp8 only: x stands for input_scale · x, and y is stored as output_scale · y.
  float input_scale = 1;
  float output_scale = 1;

  double flops() const { return 2.0 * outputs * inputs * rows; }
  int64_t weight_bytes() const { return outputs * inputs * BytesOf(type); }
  int64_t activation_bytes() const {
    return rows * (inputs * BytesOf(type) + outputs * BytesOf(output) * (accumulate ? 2 : 1));
  }
};

inline constexpr int64_t kRowPadding = 16;

// One cublasLt product, with the fastest of the algorithms that the library proposes.
class Product {
 public:
  // Tunes on the weights, x and y given; y is overwritten. Where the library has no algorithm for
  // the row count, tries the next multiple of kRowPadding, so x and y must have room for it. Null
  // where it has none for that either; `reason` says so. `lt` must outlive the product.
  static std::unique_ptr<Product> Create(const CublasLt& lt, const ProductShape& shape,
                                         cudaStream_t stream, const ColdWeights& weights,
                                         const void* x, void* y, std::string* reason);
  ~Product();
  Product(const Product&) = delete;

  // With the rows that are executed.
  const ProductShape& shape() const { return shape_; }
  // REQUIRES: shape.outer_scales. Device arrays [outputs] and [rows], borrowed.
  void SetScales(const float* weight_scales, const float* row_scales);
  void Enqueue(cudaStream_t stream, const void* weights, const void* x, void* y) const;

  MatrixView WeightView(const void* weights) const;
  MatrixView InputView(const void* x) const;
  MatrixView OutputView(const void* y) const;

 private:
  Product(const CublasLt& lt, const ProductShape& shape);
  static std::unique_ptr<Product> CreateExact(const CublasLt& lt, const ProductShape& shape,
                                              cudaStream_t stream, const ColdWeights& weights,
                                              const void* x, void* y, std::string* reason);
  cublasStatus_t TryEnqueue(cudaStream_t stream, const cublasLtMatmulAlgo_t& algorithm,
                            const void* weights, const void* x, void* y) const;
  void Tune(cudaStream_t stream, const cublasLtMatmulHeuristicResult_t* candidates, int count,
            const ColdWeights& weights, const void* x, void* y);
  template <typename Value>
  void SetAttribute(cublasLtMatmulDescAttributes_t attribute, const Value& value);

  const CublasLt& lt_;
  const ProductShape shape_;
  DeviceBuffer<float> scales_;  // of W, x and y
  cublasLtMatmulDesc_t description_ = nullptr;
  cublasLtMatrixLayout_t weight_layout_ = nullptr;
  cublasLtMatrixLayout_t input_layout_ = nullptr;
  cublasLtMatrixLayout_t source_layout_ = nullptr;  // what is accumulated on
  cublasLtMatrixLayout_t output_layout_ = nullptr;
  cublasLtMatmulAlgo_t algorithm_ = {};
};

// Runs the product once on copy 0 into a poisoned y (REQUIRES: not accumulate) and compares sampled
// outputs with the reference.
double CheckedError(const Product& product, cudaStream_t stream, const ColdWeights& weights,
                    const void* x, void* y);

}  // namespace nestor::probe
