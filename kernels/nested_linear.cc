#include "kernels/nested_linear.h"

namespace nestor {
namespace {

constexpr int64_t kScaleBytes = 2;

int64_t BytesOfPlane(int64_t out, int64_t in) { return out * PaddedToGroup(in) / 2; }

int64_t BytesOfFactors(int64_t out, int64_t in, int64_t rank) {
  return rank *
         (PaddedToGroup(in) + PaddedToGroup(out) + kScaleBytes * (NumGroups(in) + NumGroups(out)));
}

int64_t BytesOfRowOrder(int64_t out) { return out * static_cast<int64_t>(sizeof(int32_t)); }

}  // namespace

LinearCost CostOfLinear(int64_t out, int64_t in, bool has_bias, DenseStorage dense, Form form,
                        int64_t rank) {
  LinearCost cost;
  if (has_bias) cost.weight_bytes += out * static_cast<int64_t>(sizeof(float));
  const int64_t scale_bytes = out * NumGroups(in) * kScaleBytes;
  switch (form) {
    case Form::kDense:
      cost.flops += 2 * out * in;
      if (dense == DenseStorage::kF32) cost.weight_bytes += 4 * out * in;
      if (dense == DenseStorage::kBf16) cost.weight_bytes += 2 * out * in;
      if (dense == DenseStorage::kPlanes)
        cost.weight_bytes += 2 * BytesOfPlane(out, in) + scale_bytes;
      break;
    case Form::kResidual:
      cost.flops += 2 * out * in + 2 * rank * (out + in);
      cost.weight_bytes += BytesOfPlane(out, in) + scale_bytes + BytesOfFactors(out, in, rank);
      break;
    case Form::kMiddle:
      cost.flops += 2 * out * in;
      cost.weight_bytes += BytesOfPlane(out, in) + BytesOfPlane(out, in) / 2 + scale_bytes;
      break;
    case Form::kPrefix:
      cost.flops += 2 * rank * (out + in);
      cost.weight_bytes += BytesOfFactors(out, in, rank);
      break;
    case Form::kGar:
      cost.flops += 2 * rank * (out + in - rank);
      cost.weight_bytes += BytesOfFactors(out - rank, in, rank) + BytesOfRowOrder(out);
      break;
  }
  return cost;
}

}  // namespace nestor
