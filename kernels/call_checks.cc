#include "kernels/call_checks.h"

#include <set>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status_macros.h"

namespace nestor {
namespace {

absl::Status LayerError(const LinearWeights& weights, absl::string_view problem) {
  return absl::InvalidArgumentError(
      absl::StrCat("layer ", weights.name, " [", weights.out, ", ", weights.in, "]: ", problem));
}

absl::Status ValidateFactors(const LinearWeights& weights, const FactorView& factors,
                             absl::string_view kind) {
  if (factors.max_rank < 0)
    return LayerError(weights, absl::StrCat(kind, " rank is ", factors.max_rank));
  if (factors.max_rank == 0) return absl::OkStatus();
  if (factors.a == nullptr || factors.bt == nullptr)
    return LayerError(
        weights, absl::StrCat(kind, " factors of rank ", factors.max_rank, " lack their codes"));
  if (factors.a_scales == nullptr || factors.bt_scales == nullptr)
    return LayerError(
        weights, absl::StrCat(kind, " factors of rank ", factors.max_rank, " lack their scales"));
  return absl::OkStatus();
}

absl::Status ValidateGar(const LinearWeights& weights) {
  std::set<int64_t> ranks;
  for (const GarView& gar : weights.gar) {
    const int64_t rank = gar.factors.max_rank;
    if (rank <= 0 || rank >= weights.out)
      return LayerError(weights, absl::StrCat("gar rank is ", rank));
    NESTOR_RETURN_IF_ERROR(ValidateFactors(weights, gar.factors, "gar"));
    if (!ranks.insert(rank).second)
      return LayerError(weights, absl::StrCat("has two gar pairs of rank ", rank));
    const std::string pair = absl::StrCat("gar pair of rank ", rank);
    if (gar.rows == nullptr) return LayerError(weights, pair + " lacks the order of its rows");
    std::vector<bool> is_taken(weights.out);
    for (int64_t i = 0; i < weights.out; ++i) {
      const int32_t row = gar.rows[i];
      if (row < 0 || row >= weights.out || is_taken[row])
        return LayerError(weights, absl::StrCat(pair, ": rows[", i, "] is ", row,
                                                ", expected a permutation of the outputs"));
      is_taken[row] = true;
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status ValidateLinearWeights(const LinearWeights& weights) {
  if (weights.out <= 0 || weights.in <= 0) return LayerError(weights, "sizes must be positive");
  const int num_dense = (weights.dense_f32 != nullptr ? 1 : 0) +
                        (weights.dense_bf16 != nullptr ? 1 : 0) + (weights.fine != nullptr ? 1 : 0);
  if (num_dense != 1)
    return LayerError(
        weights, absl::StrCat("needs one dense form (fp32, bf16 or both planes), has ", num_dense));
  if (weights.fine != nullptr && weights.coarse == nullptr)
    return LayerError(weights, "has a fine plane but no coarse one");
  if (weights.coarse != nullptr && weights.scales == nullptr)
    return LayerError(weights, "has a coarse plane but no scales");
  if (weights.coarse != nullptr && weights.dense_f32 != nullptr)
    return LayerError(weights, "has a coarse plane beside fp32 weights");
  if (weights.middle != nullptr && weights.coarse == nullptr)
    return LayerError(weights, "has a middle plane but no coarse one");
  if (weights.residual.max_rank > 0 && weights.coarse == nullptr)
    return LayerError(weights, "has residual factors but no coarse plane");
  NESTOR_RETURN_IF_ERROR(ValidateFactors(weights, weights.residual, "residual"));
  NESTOR_RETURN_IF_ERROR(ValidateFactors(weights, weights.prefix, "prefix"));
  return ValidateGar(weights);
}

void CheckLinearPart(const LinearCall& call, const LinearPart& part, const LinearShape& shape) {
  NESTOR_CHECK(call.in.cols == shape.in && call.in.rows >= call.rows);
  NESTOR_CHECK(part.out.cols == shape.out && part.out.rows >= call.rows);
  int64_t row = 0;
  for (const RowGroup& group : part.groups) {
    NESTOR_CHECK(group.begin == row && group.end > row);
    row = group.end;
    NESTOR_CHECK(group.rank >= 0);
    if (group.form == Form::kResidual)
      NESTOR_CHECK(shape.has_coarse && group.rank <= shape.residual_rank);
    if (group.form == Form::kPrefix) NESTOR_CHECK(group.rank <= shape.prefix_rank);
    if (group.form == Form::kGar) NESTOR_CHECK(group.rank > 0);
    if (group.form == Form::kMiddle) NESTOR_CHECK(shape.has_middle && group.rank == 0);
  }
  NESTOR_CHECK(row == call.rows);
}

void CheckMlpCall(const MlpCall& call) {
  const std::span<const LinearPart> parts = call.expand.parts;
  NESTOR_CHECK(parts.size() == 1 || parts.size() == 2);
  for (const LinearPart& part : parts) NESTOR_CHECK(part.out.cols == call.contract.in.cols);
  NESTOR_CHECK(call.expand.rows == call.contract.rows && !call.expand.add_to_output);
}

void CheckAttentionCall(const AttentionCall& call) {
  NESTOR_CHECK(call.num_kv_heads > 0 && call.num_heads % call.num_kv_heads == 0);
  NESTOR_CHECK(call.q.cols == call.num_heads * call.head_dim && call.out.cols == call.q.cols);
  NESTOR_CHECK(call.k.cols == call.num_kv_heads * call.head_dim && call.v.cols == call.k.cols);
  for (const SequenceRows& sequence : call.sequences) {
    const int64_t end = sequence.row_begin + sequence.rows;
    NESTOR_CHECK(sequence.row_begin >= 0 && sequence.rows >= 0 && sequence.position >= 0);
    NESTOR_CHECK(end <= call.q.rows && end <= call.k.rows && end <= call.v.rows &&
                 end <= call.out.rows);
  }
}

}  // namespace nestor
