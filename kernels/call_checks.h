#pragma once

#include "absl/status/status.h"
#include "kernels/backend.h"
#include "kernels/nested_linear.h"

namespace nestor {

// What every backend verifies before it trusts a layer or a call. Pure functions.

// INVALID_ARGUMENT names the layer and what does not fit: no dense form or several, planes without
// scales, a residual or a middle plane without a coarse one, factors without codes, gar pairs of
// equal ranks or whose rows are no permutation.
absl::Status ValidateLinearWeights(const LinearWeights& weights);

// How many planes, ranks and sizes a loaded layer has: what its groups may ask for.
struct LinearShape {
  int64_t out = 0;
  int64_t in = 0;
  bool has_coarse = false;
  bool has_middle = false;
  int64_t residual_rank = 0;
  int64_t prefix_rank = 0;
};

// CHECKs that the groups cover the call's rows in order and ask for what the layer holds, and that
// the tensors are large enough. A backend checks on its own that there is a gar pair of a group's
// rank, when it looks for it.
void CheckLinearPart(const LinearCall& call, const LinearPart& part, const LinearShape& shape);

// CHECKs that an MLP has one or two first parts as wide as what its second half reads, which do not
// add to their outputs, and that both halves have the same rows.
void CheckMlpCall(const MlpCall& call);

// CHECKs the tensors' shapes and that the sequences lie inside them.
void CheckAttentionCall(const AttentionCall& call);

}  // namespace nestor
