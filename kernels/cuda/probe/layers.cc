// Dense and factored layers through cublasLt: what each form costs at each shape and row count.
//
//   dense              one product                                      m · n weights
//   prefix pair        z = A_r x, y = B_r z                             r (m + n) weights
//   coarse + residual  y = P x, z = A_r x, y += B_r z; P in fp8, A and B in bf16
//
// A time is that of one layer among many in a graph, so it holds what its launches cost.
#include "kernels/cuda/probe/pointwise.h"
#include "kernels/cuda/probe/prefix_pair.h"
#include "kernels/cuda/probe/probe.h"
#include "kernels/cuda/probe/product.h"
#include "kernels/cuda/probe/timing.h"

namespace nestor::probe {
namespace {

constexpr const char* kQuestion = "layers";
constexpr int64_t kResidualRanks[] = {16, 32, 64, 128};

Record LayerRecord(const std::string& form, NumberType type, const LayerShape& layer, int64_t rows,
                   int64_t rank) {
  return Record(kQuestion, form)
      .Set("type", NameOf(type))
      .Set("m", layer.m)
      .Set("n", layer.n)
      .Set("rows", rows)
      .Set("rank", rank);
}

struct Case {
  LayerShape layer;
  int64_t rows;
};

void MeasureDense(const Probe& probe, const Case& which, NumberType type) {
  const ProductShape shape{
      .outputs = which.layer.m, .inputs = which.layer.n, .rows = which.rows, .type = type};
  const ColdWeights weights = probe.weights(type).Carve(shape.weight_bytes());
  std::string reason;
  const auto product =
      Product::Create(*probe.lt, shape, probe.stream, weights, probe.x(type), probe.y, &reason);
  if (product == nullptr) {
    return probe.report->AddSkipped(kQuestion, std::string(NameOf(type)) + " dense", reason);
  }
  const double error = CheckedError(*product, probe.stream, weights, probe.x(type), probe.y);
  const Timing timing = TimeInGraph(
      probe.stream, MinInvocations(weights), [&](cudaStream_t stream, int64_t invocation) {
        product->Enqueue(stream, weights.copy(invocation), probe.x(type), probe.y);
      });
  probe.report->Add(LayerRecord("dense", type, which.layer, which.rows, which.layer.max_rank())
                        .Set("launches", 1)
                        .Set("executed_rows", product->shape().rows)
                        .Set("bytes", shape.weight_bytes() + shape.activation_bytes())
                        .Set("flops", shape.flops())
                        .Set(timing)
                        .SetError(error, kBf16Bar));
}

void MeasurePair(const Probe& probe, const Case& which, NumberType type, int eighths) {
  const int64_t rank = which.layer.RankAtEighths(eighths);
  const ColdWeights weights = CarvePair(probe.weights(type), which.layer, rank);
  std::string reason;
  const auto pair =
      PrefixPair::Create(probe, type, which.layer, rank, which.rows, false, weights, &reason);
  if (pair == nullptr) {
    return probe.report->AddSkipped(kQuestion, std::string(NameOf(type)) + " prefix", reason);
  }
  const void* x = probe.x(type);
  const double error = CheckedError(probe, *pair, which.layer, which.rows, x, probe.y);
  const Timing timing = TimeInGraph(probe.stream, MinInvocations(weights),
                                    [&](cudaStream_t stream, int64_t invocation) {
                                      pair->Enqueue(stream, invocation, x, probe.y);
                                    });
  probe.report->Add(LayerRecord("prefix", type, which.layer, which.rows, rank)
                        .Set("eighths", eighths)
                        .Set("launches", 2)
                        .Set("executed_rows", pair->executed_rows())
                        .Set("bytes", pair->weight_bytes() + pair->activation_bytes())
                        .Set("flops", pair->flops())
                        .Set(timing)
                        .SetError(error, type == NumberType::kFp8 ? kFp8PairBar : kBf16Bar));
}

// The coarse plane's product, which all ranks share.
struct Coarse {
  ColdWeights weights;
  std::unique_ptr<Product> product;
};

void MeasureResidual(const Probe& probe, const Case& which, const Coarse& coarse, int64_t rank,
                     bool accumulate) {
  const std::string form =
      accumulate ? "coarse + residual, accumulated" : "coarse + residual, extra launches";
  const ColdWeights factors = CarvePair(*probe.bf16_weights, which.layer, rank);
  std::string reason;
  const auto pair = PrefixPair::Create(probe, NumberType::kBf16, which.layer, rank, which.rows,
                                       accumulate, factors, &reason);
  if (pair == nullptr) return probe.report->AddSkipped(kQuestion, form, reason);
  const int64_t size = which.rows * which.layer.m;
  const DeviceBuffer<char> apart(accumulate ? 1
                                            : RoundUp(which.rows, kRowPadding) * which.layer.m * 2);
  const auto enqueue = [&](cudaStream_t stream, int64_t invocation) {
    coarse.product->Enqueue(stream, coarse.weights.copy(invocation), probe.fp8_x, probe.y);
    pair->Enqueue(stream, invocation, probe.bf16_x, accumulate ? probe.y : apart.data());
    if (!accumulate) Check(AddInto(probe.y, apart.data(), size, stream));
  };

  Check(cudaMemsetAsync(probe.y, 0xff, size * 2, probe.stream));
  enqueue(probe.stream, 0);
  const std::vector<int64_t> rows = SpreadIndices(which.rows, 8);
  const std::vector<int64_t> outputs = SpreadIndices(which.layer.m, 64);
  DeviceBuffer<double> reference =
      ReferenceProduct(probe.stream, coarse.product->WeightView(coarse.weights.copy(0)), outputs,
                       coarse.product->InputView(probe.fp8_x), rows, which.layer.n);
  AddReference(probe.stream, &reference,
               pair->Reference(probe.stream, 0, probe.bf16_x, rows, outputs));
  const double error =
      RelativeError(probe.stream, reference, {probe.y, NumberType::kBf16, which.layer.m, false},
                    which.rows, rows, which.layer.m, outputs);

  const int64_t invocations = std::max(MinInvocations(coarse.weights), int64_t{16});
  const Timing timing = TimeInGraph(probe.stream, invocations, enqueue);
  const ProductShape& plane = coarse.product->shape();
  const int64_t added_bytes = accumulate ? 0 : size * 6;
  probe.report->Add(LayerRecord(form, NumberType::kFp8, which.layer, which.rows, rank)
                        .Set("launches", accumulate ? 3 : 4)
                        .Set("executed_rows", plane.rows)
                        .Set("bytes", plane.weight_bytes() + plane.activation_bytes() +
                                          pair->weight_bytes() + pair->activation_bytes() +
                                          added_bytes)
                        .Set("fp8_flops", plane.flops())
                        .Set("flops", plane.flops() + pair->flops())
                        .Set(timing)
                        .SetError(error, kBf16Bar));
}

void MeasureResiduals(const Probe& probe, const Case& which) {
  const ProductShape shape{.outputs = which.layer.m,
                           .inputs = which.layer.n,
                           .rows = which.rows,
                           .type = NumberType::kFp8};
  Coarse coarse;
  coarse.weights = probe.fp8_weights->Carve(shape.weight_bytes());
  std::string reason;
  coarse.product = Product::Create(*probe.lt, shape, probe.stream, coarse.weights, probe.fp8_x,
                                   probe.y, &reason);
  if (coarse.product == nullptr) {
    return probe.report->AddSkipped(kQuestion, "coarse + residual", reason);
  }
  for (const int64_t rank : kResidualRanks) {
    MeasureResidual(probe, which, coarse, rank, true);
    MeasureResidual(probe, which, coarse, rank, false);
  }
}

}  // namespace

void MeasureLayers(const Probe& probe) {
  for (const LayerShape& layer : kLayers) {
    for (const int64_t rows : kRows) {
      const Case which{layer, rows};
      for (const NumberType type : {NumberType::kBf16, NumberType::kFp8}) {
        MeasureDense(probe, which, type);
        for (const int eighths : kEighths) MeasurePair(probe, which, type, eighths);
      }
      MeasureResiduals(probe, which);
    }
  }
}

}  // namespace nestor::probe
