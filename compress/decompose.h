#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/statusor.h"

namespace nestor {

// Nested factors of one matrix W [out, in], the best of every rank for inputs whose uncentred
// second moment is S: W_r = sum over k < r of bt[k]^T a[k].
struct Decomposition {
  // s_k, descending, min(out, in) of them: E||(W - W_r) x||^2 = sum over k >= r of s_k^2.
  std::vector<double> singular_values;
  int64_t rank = 0;       // components held in a and bt
  std::vector<float> a;   // [rank, in]
  std::vector<float> bt;  // [rank, out]
};

// DataSVD in its inverse-free forms (methods: FlexRank, 1). out <= in: W S W^T = Z diag(s^2) Z^T,
// B = Z, A = Z^T W. out > in: with S = L L^T, L^T W^T W L = V diag(s^2) V^T, Z = W L V / s; there
// components that the inputs never excite come out as zeros. Each pair is scaled by sqrt(s) on
// both sides, so that both quantise well. `moment` is S [in, in], symmetric, and may be singular.
// Runs in double. INTERNAL where LAPACK does not converge.
absl::StatusOr<Decomposition> Decompose(std::span<const float> weights, int64_t out, int64_t in,
                                        std::span<const double> moment, int64_t max_rank);

// E||W x||^2 = tr(W S W^T).
double OutputEnergy(std::span<const float> weights, int64_t out, int64_t in,
                    std::span<const double> moment);

}  // namespace nestor
