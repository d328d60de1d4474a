#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <set>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "compress/export.h"
#include "compress/gar.h"
#include "engine/model_spec.h"
#include "engine/nested_model.h"
#include "kernels/nested_linear.h"

namespace nestor {

// The gar pairs of an artifact that is being made: the ranks that its levels want, those that were
// fitted, and what runs instead of those that lose too much. Const methods, and Fit of different
// layers, may run side by side.
class GarPairs {
 public:
  // What a pair may lose of its layer's output, in terms of what plain factors of its rank lose.
  // Plain factors of the same cost lose several times as much (docs/ladders.md).
  static constexpr double kLargestError = 1.5;

  using Fitter = std::function<absl::StatusOr<GarFit>(int64_t rank)>;

  // `layers` must outlive it.
  GarPairs(const std::vector<LinearSpec>& layers, DenseStorage dense);

  // By level, whether it may run pairs: known once levels are chosen. What takes a level or levels
  // below REQUIRES it, and a flag for each.
  void SetMayBeGar(std::vector<bool> may_be_gar) { may_be_gar_ = std::move(may_be_gar); }

  // What a level's layer runs unless its pair loses too much: in a chain that is being made, pairs
  // are prefixes.
  FormAndRank WantedChoice(size_t level, size_t layer, FormAndRank choice) const;
  // Of the pairs that `levels` want of a layer.
  std::set<int64_t> WantedRanks(const std::vector<Level>& levels, size_t layer) const;

  // Fits a layer's pairs, in ascending order of their ranks, and adds them to `spill`, which
  // settles what the layer runs. Returns the error of `fitter` or of the spill. REQUIRES: once for
  // a layer.
  absl::Status Fit(size_t layer, const std::set<int64_t>& ranks, const Fitter& fitter,
                   TensorSpill* spill);
  bool is_settled(size_t layer) const { return is_settled_[layer] != 0; }

  // Lets `levels` run the pairs, and where there is none what takes its place. A layer that is not
  // settled stays as it is. REQUIRES: the levels of a ladder, nested, stand cheapest first.
  void Apply(std::vector<Level>* levels) const;

  // Ranks whose pairs were added, by layer.
  const std::vector<std::set<int64_t>>& fitted_ranks() const { return fitted_ranks_; }
  // Pairs that lost too much.
  int64_t num_substitutes() const;

 private:
  const std::vector<LinearSpec>& layers_;
  const DenseStorage dense_;
  std::vector<bool> may_be_gar_;  // by level
  std::vector<std::set<int64_t>> fitted_ranks_;
  // By layer: ranks that have no pair, and what runs instead: kPrefix or kDense.
  std::vector<std::map<int64_t, Form>> substitutes_;
  std::vector<uint8_t> is_settled_;  // by layer
};

}  // namespace nestor
