#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "compress/allocate.h"
#include "compress/delta.h"
#include "compress/layer_times.h"
#include "compress/options.h"
#include "engine/model_spec.h"
#include "engine/nested_model.h"

namespace nestor {

// A ladder whose levels are to be chosen.
struct LadderPlan {
  std::string name;  // residual, prefix or mixed
  RankSearch search = RankSearch::kSensitivity;
  RankObjective objective = RankObjective::kBytes;
  const Delta* delta = nullptr;  // which names the levels, or none
  // By layer: what the levels may run, and what it loses. Their costs do not count.
  LayerOptions options;
};

struct ChosenLevel {
  Profile profile;          // pairs as prefixes of their ranks
  bool may_be_gar = false;  // whether those run as pairs where that is cheaper
};

// Chooses the levels of ladders: what a choice costs, where levels aim, and the profiles that meet
// that, or those that a delta names. Const methods are pure functions.
class LevelChooser {
 public:
  // Of the checkpoint `source`. It and `options` must outlive the chooser.
  LevelChooser(const CompressOptions& options, const NestedModel& source);

  // The ladders that the options ask for; `delta`, which may be null, must outlive them. Their
  // layers have no options yet.
  std::vector<LadderPlan> Ladders(const Delta* delta) const;

  // What layers take, for an objective of time.
  void SetTimes(LayerTimes times) { times_ = std::move(times); }
  // REQUIRES: SetTimes.
  const LayerTimes& times() const { return *times_; }

  // INVALID_ARGUMENT where a cost that the options name is below all that a ladder can have.
  // REQUIRES: SetTimes, if the objective is time.
  absl::Status CheckCosts(const LadderPlan& ladder) const;

  // The levels below the full one, ascending, those left out that would be the same as another.
  // What a person should know goes to `notes`. INVALID_ARGUMENT where a cost that the options name
  // has no level of its own, or CheckCosts fails. REQUIRES: options of every layer, their errors on
  // one scale, unless a delta names the levels; SetTimes, if the objective is time.
  absl::StatusOr<std::vector<ChosenLevel>> Choose(const LadderPlan& ladder,
                                                  std::vector<std::string>* notes) const;

 private:
  bool MayBeGar(const LadderPlan& ladder, int64_t level) const;
  // Of one layer, attention apart.
  int64_t CostOf(const LinearSpec& layer, FormAndRank choice, RankObjective objective) const;
  int64_t AttentionCost(RankObjective objective) const;
  int64_t FullCost(RankObjective objective) const;
  // Of the whole model, as share of the full level's: at `cost` of its layers, and at the cheapest
  // choices.
  double ShareOf(const LadderPlan& ladder, int64_t cost) const;
  double CheapestShare(const LadderPlan& ladder) const;
  // What layers may cost on each level.
  std::vector<int64_t> TargetsOf(const LadderPlan& ladder) const;
  // The choices of a level that may have gar pairs, or not, at their costs.
  LayerOptions OptionsOf(const LadderPlan& ladder, bool may_be_gar) const;
  // One for each target.
  std::vector<Profile> Allocate(const LadderPlan& ladder,
                                const std::vector<int64_t>& targets) const;
  // The delta's, where layers whose ranks do not pay run dense.
  std::vector<Profile> ProfilesOfDelta(const LadderPlan& ladder,
                                       std::vector<std::string>* notes) const;

  const CompressOptions& options_;
  const NestedModel& source_;
  std::optional<LayerTimes> times_;
};

}  // namespace nestor
