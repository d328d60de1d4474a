#pragma once

#include <memory>
#include <string>

#include "kernels/cuda/probe/probe.h"
#include "kernels/cuda/probe/product.h"

namespace nestor::probe {

// The two products of a prefix of rank r, z = A_r x and y = B_r z, as two cublasLt launches. A is
// [r, n], B is [m, r], both contiguous; z has the factors' type, so between fp8 factors it is fp8.
class PrefixPair {
 public:
  // `weights` come from CarvePair for the same shape, or for a larger rank. Null and a reason where
  // the library has no algorithm for one of the products.
  static std::unique_ptr<PrefixPair> Create(const Probe& probe, NumberType type,
                                            const LayerShape& layer, int64_t rank, int64_t rows,
                                            bool accumulate, const ColdWeights& weights,
                                            std::string* reason);

  void Enqueue(cudaStream_t stream, int64_t invocation, const void* x, void* y) const;
  // Σ over both products, and y's reference at sampled outputs.
  double flops() const { return first_->shape().flops() + second_->shape().flops(); }
  int64_t weight_bytes() const;
  int64_t activation_bytes() const;
  DeviceBuffer<double> Reference(cudaStream_t stream, int64_t copy, const void* x,
                                 const std::vector<int64_t>& rows,
                                 const std::vector<int64_t>& outputs) const;
  // By the second product: more than asked for where the library wants padding.
  int64_t executed_rows() const { return second_->shape().rows; }
  int64_t rank() const { return first_->shape().outputs; }

 private:
  PrefixPair() = default;

  ColdWeights a_, b_;
  DeviceBuffer<char> z_;
  float z_scale_ = 1;
  std::unique_ptr<Product> first_, second_;
};

// Copies of A and B at `rank`.
ColdWeights CarvePair(const WeightPool& pool, const LayerShape& layer, int64_t rank);

// Runs the pair (REQUIRES: not accumulate) into a poisoned y and compares sampled outputs.
double CheckedError(const Probe& probe, const PrefixPair& pair, const LayerShape& layer,
                    int64_t rows, const void* x, void* y);

}  // namespace nestor::probe
