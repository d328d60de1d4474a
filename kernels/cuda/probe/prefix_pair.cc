#include "kernels/cuda/probe/prefix_pair.h"

#include <cmath>

namespace nestor::probe {
namespace {

int64_t OffsetOfB(NumberType type, const LayerShape& layer, int64_t rank) {
  return RoundUp(rank * layer.n * BytesOf(type), 256);
}

}  // namespace

ColdWeights CarvePair(const WeightPool& pool, const LayerShape& layer, int64_t rank) {
  const int64_t bytes = BytesOf(pool.type());
  return pool.Carve(OffsetOfB(pool.type(), layer, rank) + layer.m * rank * bytes,
                    rank * (layer.m + layer.n) * bytes);
}

std::unique_ptr<PrefixPair> PrefixPair::Create(const Probe& probe, NumberType type,
                                               const LayerShape& layer, int64_t rank, int64_t rows,
                                               bool accumulate, const ColdWeights& weights,
                                               std::string* reason) {
  std::unique_ptr<PrefixPair> pair(new PrefixPair());
  pair->a_ = weights;
  pair->b_ = weights;
  pair->b_.base += OffsetOfB(type, layer, rank);
  pair->z_ = DeviceBuffer<char>(RoundUp(rows, kRowPadding) * rank * BytesOf(type));
  // Should only the second product be padded, its further rows are finite too.
  Check(cudaMemset(pair->z_.data(), 0, pair->z_.bytes()));
  // z's elements have a variance of n: bring them to a deviation of 8, well inside e4m3's range.
  const bool is_fp8 = type == NumberType::kFp8;
  pair->z_scale_ = is_fp8 ? static_cast<float>(8 / std::sqrt(static_cast<double>(layer.n))) : 1;

  ProductShape first{.outputs = rank, .inputs = layer.n, .rows = rows, .type = type};
  first.output = type;
  first.output_scale = pair->z_scale_;
  ProductShape second{.outputs = layer.m, .inputs = rank, .rows = rows, .type = type};
  second.accumulate = accumulate;
  second.input_scale = is_fp8 ? 1 / pair->z_scale_ : 1;
  pair->first_ = Product::Create(*probe.lt, first, probe.stream, pair->a_, probe.x(type),
                                 pair->z_.data(), reason);
  if (pair->first_ == nullptr) return nullptr;
  pair->second_ =
      Product::Create(*probe.lt, second, probe.stream, pair->b_, pair->z_.data(), probe.y, reason);
  return pair->second_ == nullptr ? nullptr : std::move(pair);
}

void PrefixPair::Enqueue(cudaStream_t stream, int64_t invocation, const void* x, void* y) const {
  first_->Enqueue(stream, a_.copy(invocation), x, z_.data());
  second_->Enqueue(stream, b_.copy(invocation), z_.data(), y);
}

int64_t PrefixPair::weight_bytes() const {
  return first_->shape().weight_bytes() + second_->shape().weight_bytes();
}

int64_t PrefixPair::activation_bytes() const {
  return first_->shape().activation_bytes() + second_->shape().activation_bytes();
}

DeviceBuffer<double> PrefixPair::Reference(cudaStream_t stream, int64_t copy, const void* x,
                                           const std::vector<int64_t>& rows,
                                           const std::vector<int64_t>& outputs) const {
  const std::vector<int64_t> components = SpreadIndices(rank(), rank());
  const DeviceBuffer<double> z =
      ReferenceProduct(stream, first_->WeightView(a_.copy(copy)), components, first_->InputView(x),
                       rows, first_->shape().inputs);
  // z holds the sampled rows alone, in order.
  const std::vector<int64_t> z_rows =
      SpreadIndices(static_cast<int64_t>(rows.size()), static_cast<int64_t>(rows.size()));
  return ReferenceProduct(stream, second_->WeightView(b_.copy(copy)), outputs,
                          {z.data(), NumberType::kDouble, rank(), false}, z_rows, rank());
}

double CheckedError(const Probe& probe, const PrefixPair& pair, const LayerShape& layer,
                    int64_t rows, const void* x, void* y) {
  Check(cudaMemsetAsync(y, 0xff, rows * layer.m * 2, probe.stream));
  pair.Enqueue(probe.stream, 0, x, y);
  const std::vector<int64_t> sampled_rows = SpreadIndices(rows, 8);
  const std::vector<int64_t> outputs = SpreadIndices(layer.m, 64);
  const DeviceBuffer<double> reference = pair.Reference(probe.stream, 0, x, sampled_rows, outputs);
  return RelativeError(probe.stream, reference, {y, NumberType::kBf16, layer.m, false}, rows,
                       sampled_rows, layer.m, outputs);
}

}  // namespace nestor::probe
