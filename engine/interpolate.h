#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/model_spec.h"
#include "engine/nested_model.h"
#include "kernels/nested_linear.h"

namespace nestor {

// Levels between those that an artifact stores. Every prefix of a layer's factors is a layer, so
// any ranks between two neighbours of a ladder are a level (NSN, arXiv 2509.17874, section 3).

// A level that a model is to have: where it stands on its ladder.
struct WantedLevel {
  std::string ladder;  // empty: the only one that the model has
  double cost = 0;     // as RelativeCostOnLadder counts it
};

// What a ladder's costs are shares of: a prefix ladder's of the full level's FLOPs, any other's of
// its weight bytes.
double RelativeCostOnLadder(const Level& level);

// What is stored of a layer, as far as levels between two others may run it.
struct StoredLayer {
  LinearSpec spec;
  DenseStorage dense = DenseStorage::kPlanes;
  int64_t rank = 0;  // components of the form that the lower level runs
  bool has_middle = false;
};

// What a layer may run between two neighbours of a ladder, and its cost there.
struct PricedChoice {
  FormAndRank choice;
  int64_t cost = 0;
};

// From `low`'s choice to `high`'s, ascending in rank and cost: ranks in steps of 8 up to `high`'s,
// or, where `high` is dense or the middle plane, up to the components that the layer has of `low`'s
// form and that cost less than what follows them: the middle plane, where there is one, and `high`.
// A layer with a gar pair on either side, which serves one rank, has the two choices alone; one
// that is dense has just that. REQUIRES: IsNested(low, high).
std::vector<PricedChoice> ChoicesBetween(const StoredLayer& layer, const std::string& ladder,
                                         const FormAndRank& low, const FormAndRank& high);

// One choice of each layer, together at most `budget`: every layer goes as far from its first
// choice to its last as the others do, measured in cost, and what is then left of the budget goes
// to whatever later step still fits. Steps that are due at the same point, as those of all layers
// that have only one, go largest first; where one does not fit, the smaller ones due with it are
// left out, too (docs/ladders.md, "Any rank", says why), so as much of the budget as the largest
// step may be left over. Just the first choices where not even they fit.
Profile InterpolateProfile(const std::vector<std::vector<PricedChoice>>& choices, int64_t budget);

// The levels of `model` with those wanted, in the order that NestedModel::SetLevels expects. Every
// wanted one is nested between its neighbours, costs what was asked for or less, by up to the
// largest step, and is marked as interpolated; its quality is an estimate, linear in logarithm over
// cost between its neighbours. INVALID_ARGUMENT names the cost that is not between the cheapest
// level's and 1, is there twice, or has no level of its own, and a ladder that the model does not
// have.
absl::StatusOr<std::vector<Level>> WithInterpolatedLevels(const NestedModel& model,
                                                          std::vector<WantedLevel> wanted);

// By level: of an interpolated one its estimate from the stored levels around it, whatever its own
// quality says; of any other its own quality. REQUIRES: the order of NestedModel::levels().
std::vector<double> EstimateQualities(const std::vector<Level>& levels);

// Levels as people name them: "0.65", or "prefix:0.65" where a model has more than one ladder.
// INVALID_ARGUMENT for any other text.
absl::StatusOr<std::vector<WantedLevel>> ParseWantedLevels(const std::vector<std::string>& texts);

// Gives `model` the levels that people name. INVALID_ARGUMENT as above.
absl::Status AddInterpolatedLevels(const std::vector<std::string>& wanted, NestedModel* model);

// WithInterpolatedLevels for `points` costs on every ladder, in equal steps between its cheapest
// level and the full one; those without a level of their own (a small model has few) are left out.
// REQUIRES: points > 0. INVALID_ARGUMENT where the model has no ladder.
absl::StatusOr<std::vector<Level>> WithSweptLevels(const NestedModel& model, int points);

}  // namespace nestor
