#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "compress/decompose.h"
#include "compress/layer.h"
#include "compress/quantise.h"
#include "engine/nested_model.h"

namespace nestor {

// A frozen prefix of one rank r in its cheapest gauge (methods: FlexRank, 4): r outputs, the
// pivots, are z = A x themselves, the others are B z.
struct GarPair {
  FactorCodes a;              // [r, in]
  FactorCodes bt;             // [r, out - r]
  std::vector<int32_t> rows;  // [out], the pivots first
};

struct GarFit {
  GarPair pair;
  // Energy of the layer's output that the stored form loses, as share of all of it, and what the
  // plain factors of this rank lose, quantised as well.
  double error = 0;
  double plain_error = 0;
};

// How a level runs `rank` components of a layer at the least cost: from a quarter of its rank on as
// a gar pair, where it may and where that saves a sixteenth of the FLOPs. Below a quarter, it saves
// less than an eighth of a square layer's, and is bytes of its own. A head's would save one part in
// a hundred, and each of its many outputs would take up the rounding of all pivots: in int8
// SmolLM2's level of 0.8 falls from 0.82 to 0.80 with one.
FormAndRank CheapestPrefix(int64_t out, int64_t in, int64_t rank, bool may_be_gar);

// Makes the pair of the first `rank` components of `decomposition`, which is that of `weights`
// [out, in] for inputs with second moment `moment` [in, in]. Pivots are chosen by QR with column
// pivoting of the kept directions of the output (PIFA, arXiv 2501.19090). A, rows of B_r A_r, is
// quantised first; B is the least-squares fit of the other outputs to the z that the quantised A
// gives, which takes up its rounding. The pivots then stand in an order in which z, rounded to int8
// in groups, loses little. In double. REQUIRES: 0 < rank <= decomposition.rank, rank < out.
// INTERNAL where LAPACK fails.
absl::StatusOr<GarFit> FitGar(const Decomposition& decomposition, std::span<const float> weights,
                              int64_t out, int64_t in, std::span<const double> moment,
                              int64_t rank);

// The same for factors whose components are no decomposition, such as those with a trained term:
// the pair of their first `rank`, fitted to what these compute as they are stored, B_r A_r x,
// instead of W x. Its `error` is theirs and what the pair loses of their output. `factors` may hold
// more than `rank`.
absl::StatusOr<GarFit> FitGarToFactors(const FactorPair& factors, std::span<const float> weights,
                                       int64_t out, int64_t in, std::span<const double> moment,
                                       int64_t rank);

}  // namespace nestor
