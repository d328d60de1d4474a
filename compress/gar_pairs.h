#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <set>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "compress/export.h"
#include "compress/gar.h"
#include "engine/nested_model.h"

namespace nestor {

// The gar pairs of an artifact that is being made: the ranks that its levels want, those that were
// fitted, and what runs instead of those that lose too much.
class GarPairs {
 public:
  // What a pair may lose of its layer's output, in terms of what plain factors of its rank lose.
  // Plain factors of the same cost lose several times as much (docs/ladders.md).
  static constexpr double kLargestError = 1.5;

  using Fitter = std::function<absl::StatusOr<GarFit>(int64_t rank)>;

  // Pairs go to `spill`. Both references must outlive it.
  GarPairs(const std::vector<LinearSpec>& layers, DenseStorage dense, TensorSpill* spill);

  // Which levels may run pairs, once they are chosen.
  void SetLevels(std::vector<bool> may_be_gar) { may_be_gar_ = std::move(may_be_gar); }

  // What a level's layer runs in the end: pairs are prefixes of a chain that is being made.
  FormAndRank FinalChoice(size_t level, size_t layer, FormAndRank choice) const;
  // Of the pairs that `levels` want of a layer.
  std::set<int64_t> RanksOf(const std::vector<Level>& levels, size_t layer) const;

  // Fits a layer's pairs, in ascending order of their ranks, which settles what it runs.
  // Thread-safe for different layers. What `fitter` and the spill return.
  absl::Status Fit(size_t layer, const std::set<int64_t>& ranks, const Fitter& fitter);
  bool is_settled(size_t layer) const { return is_settled_[layer] != 0; }

  // Lets `levels` run the pairs, and where there is none what takes its place.
  void Apply(std::vector<Level>* levels) const;

  // Ranks whose pairs are in the spill, by layer.
  const std::vector<std::set<int64_t>>& ranks() const { return ranks_; }
  // Pairs that lost too much.
  int64_t num_substitutes() const;

 private:
  const std::vector<LinearSpec>& layers_;
  const DenseStorage dense_;
  TensorSpill* const spill_;
  std::vector<bool> may_be_gar_;  // by level
  std::vector<std::set<int64_t>> ranks_;
  // By layer: ranks that have no pair, and what runs instead: kPrefix or kDense.
  std::vector<std::map<int64_t, Form>> substitutes_;
  std::vector<uint8_t> is_settled_;  // by layer
};

}  // namespace nestor
