#include "compress/level_chooser.h"

#include <algorithm>
#include <iterator>
#include <limits>
#include <map>

#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "compress/gar.h"
#include "compress/layer.h"
#include "compress/rank_search.h"
#include "compress/targets.h"
#include "kernels/nested_linear.h"

namespace nestor {
namespace {

const char* UnitOf(RankObjective objective) {
  switch (objective) {
    case RankObjective::kBytes:
      return "weight bytes";
    case RankObjective::kFlops:
      return "FLOPs";
    case RankObjective::kTime:
      return "time";
  }
  return "cost";
}

AllocateFunction AllocatorOf(RankSearch search) {
  if (search == RankSearch::kEven) return AllocateEvenly;
  return search == RankSearch::kMeasured ? AllocateBySearch : AllocateAlongHulls;
}

}  // namespace

LevelChooser::LevelChooser(const CompressOptions& options, const NestedModel& source)
    : options_(options), source_(source) {}

std::vector<LadderPlan> LevelChooser::Ladders(const Delta* delta) const {
  std::vector<LadderPlan> ladders;
  for (const std::string& name : NamesOf(options_.ladder)) {
    const bool is_prefix = name == "prefix";
    RankSearch search = RankSearch::kSensitivity;
    if (name == "mixed") search = RankSearch::kMeasured;
    if (is_prefix && source_.spec().is_encoder()) search = RankSearch::kEven;
    const RankObjective objective = is_prefix ? RankObjective::kFlops : RankObjective::kBytes;
    ladders.push_back({.name = name,
                       .search = options_.search.method.value_or(search),
                       .objective = options_.search.objective.value_or(objective),
                       .delta = is_prefix ? delta : nullptr,
                       .options = LayerOptions(source_.layers().size())});
  }
  return ladders;
}

absl::StatusOr<std::vector<ChosenLevel>> LevelChooser::Choose(
    const LadderPlan& ladder, std::vector<std::string>* notes) const {
  NESTOR_RETURN_IF_ERROR(CheckCosts(ladder));
  const Profile full(source_.layers().size());
  const bool names_costs = !options_.search.costs.empty() && ladder.delta == nullptr;
  const std::vector<int64_t> targets = TargetsOf(ladder);
  const std::vector<Profile> profiles =
      ladder.delta != nullptr ? ProfilesOfDelta(ladder, notes) : Allocate(ladder, targets);
  std::vector<ChosenLevel> chosen;
  for (size_t i = 0; i < profiles.size(); ++i) {
    // A small model may have nothing between two targets.
    if (profiles[i] == full || (!chosen.empty() && profiles[i] == chosen.back().profile)) {
      if (!names_costs) continue;
      return absl::InvalidArgumentError(absl::StrFormat(
          "costs: the %s ladder has no level of its own within %.4f of the full level's %s",
          ladder.name, ShareOf(ladder, targets[i]), UnitOf(ladder.objective)));
    }
    chosen.push_back(
        {.profile = profiles[i], .may_be_gar = MayBeGar(ladder, static_cast<int64_t>(i))});
  }
  return chosen;
}

bool LevelChooser::MayBeGar(const LadderPlan& ladder, int64_t level) const {
  const std::optional<std::vector<int>>& some = options_.gar_levels;
  return ladder.name != "residual" &&
         (!some.has_value() || std::count(some->begin(), some->end(), level) > 0);
}

int64_t LevelChooser::CostOf(const LinearSpec& layer, FormAndRank choice,
                             RankObjective objective) const {
  if (objective == RankObjective::kTime) return times_->Of(layer, choice);
  const LinearCost cost =
      CostOfLinear(layer.out, layer.in, layer.has_bias, options_.dense, choice.form, choice.rank);
  return objective == RankObjective::kBytes ? cost.weight_bytes : cost.flops;
}

int64_t LevelChooser::AttentionCost(RankObjective objective) const {
  if (objective != RankObjective::kFlops) return 0;
  const Profile full(source_.layers().size());
  int64_t flops = CostOfProfile(source_.spec(), source_.layers(), full, options_.dense).flops;
  for (const LinearSpec& layer : source_.layers()) flops -= CostOf(layer, {}, objective);
  return flops;
}

int64_t LevelChooser::FullCost(RankObjective objective) const {
  int64_t cost = AttentionCost(objective);
  for (const LinearSpec& layer : source_.layers()) cost += CostOf(layer, {}, objective);
  return cost;
}

double LevelChooser::ShareOf(const LadderPlan& ladder, int64_t cost) const {
  return static_cast<double>(cost + AttentionCost(ladder.objective)) /
         static_cast<double>(FullCost(ladder.objective));
}

double LevelChooser::CheapestShare(const LadderPlan& ladder) const {
  int64_t cost = 0;
  for (const LinearSpec& layer : source_.layers()) {
    std::vector<FormAndRank> choices = {{}};
    const std::vector<int64_t> ranks = PrefixRanks(layer.out, layer.in, options_.may_be_gar());
    if (ladder.name != "prefix") choices.push_back({Form::kResidual, 0});
    if (ladder.name != "residual" && !ranks.empty()) {
      choices.push_back(CheapestPrefix(layer.out, layer.in, ranks.front(), options_.may_be_gar()));
    }
    int64_t least = std::numeric_limits<int64_t>::max();
    for (const FormAndRank& choice : choices) {
      least = std::min(least, CostOf(layer, choice, ladder.objective));
    }
    cost += least;
  }
  return ShareOf(ladder, cost);
}

absl::Status LevelChooser::CheckCosts(const LadderPlan& ladder) const {
  const std::vector<double>& costs = options_.search.costs;
  if (costs.empty() || ladder.delta != nullptr) return absl::OkStatus();
  const double least = *std::min_element(costs.begin(), costs.end());
  const double cheapest = CheapestShare(ladder);
  if (least >= cheapest) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrFormat(
      "costs: %g is less than the cheapest %s level has: %.4f of the full level's %s", least,
      ladder.name, cheapest, UnitOf(ladder.objective)));
}

LayerOptions LevelChooser::OptionsOf(const LadderPlan& ladder, bool may_be_gar) const {
  LayerOptions result(ladder.options.size());
  for (size_t layer = 0; layer < ladder.options.size(); ++layer) {
    const LinearSpec& spec = source_.layers()[layer];
    std::vector<LayerOption> options = ladder.options[layer];
    for (LayerOption& option : options) {
      const auto& [form, rank] = option.choice;
      const FormAndRank stored = form == Form::kPrefix
                                     ? CheapestPrefix(spec.out, spec.in, rank, may_be_gar)
                                     : option.choice;
      option.cost = CostOf(spec, stored, ladder.objective);
    }
    // Plain factors below the least rank of a gar pair may cost more than that pair, and above
    // break-even more than the dense layer.
    const auto is_beaten_by = [&](const LayerOption& option, const LayerOption& other) {
      // One rank for all layers knows no middle plane that could take the place of ranks.
      const bool is_after_ranks = ladder.search != RankSearch::kEven &&
                                  option.choice.form == Form::kResidual &&
                                  other.choice.form == Form::kMiddle;
      const bool is_larger = other.choice.form == option.choice.form
                                 ? other.choice.rank > option.choice.rank
                                 : other.choice.form == Form::kDense || is_after_ranks;
      return is_larger && other.cost <= option.cost;
    };
    std::copy_if(options.begin(), options.end(), std::back_inserter(result[layer]),
                 [&](const LayerOption& option) {
                   return std::none_of(
                       options.begin(), options.end(),
                       [&](const LayerOption& other) { return is_beaten_by(option, other); });
                 });
  }
  return result;
}

std::vector<Profile> LevelChooser::Allocate(const LadderPlan& ladder,
                                            const std::vector<int64_t>& targets) const {
  const AllocateFunction allocate =
      options_.allocate == nullptr ? AllocatorOf(ladder.search) : options_.allocate;
  std::vector<LayerOptions> options;  // by level
  std::vector<Profile> profiles;
  std::map<bool, std::vector<Profile>> chains;
  for (int64_t i = 0; i < std::ssize(targets); ++i) {
    const bool is_gar = MayBeGar(ladder, i);
    options.push_back(OptionsOf(ladder, is_gar));
    if (!chains.contains(is_gar)) chains[is_gar] = allocate(options.back(), targets);
    profiles.push_back(chains[is_gar][static_cast<size_t>(i)]);
  }
  if (chains.size() < 2) return profiles;
  // Levels of two chains: what is not nested in the level above shrinks to what is, which costs
  // less.
  for (size_t i = profiles.size() - 1; i-- > 0;) {
    for (size_t layer = 0; layer < profiles[i].size(); ++layer) {
      const FormAndRank above = profiles[i + 1][layer];
      if (IsNested(profiles[i][layer], above)) continue;
      const LayerOption* largest = nullptr;
      for (const LayerOption& option : options[i][layer]) {
        const bool is_better = largest == nullptr || option.choice.rank > largest->choice.rank;
        if (IsNested(option.choice, above) && is_better) largest = &option;
      }
      NESTOR_CHECK(largest != nullptr);
      profiles[i][layer] = largest->choice;
    }
  }
  return profiles;
}

std::vector<int64_t> LevelChooser::TargetsOf(const LadderPlan& ladder) const {
  std::vector<double> shares = options_.search.costs;
  std::sort(shares.begin(), shares.end());
  std::erase(shares, 1.0);  // the full level
  if (shares.empty()) {
    const double cheapest = CheapestShare(ladder);
    if (ladder.name == "residual" && ladder.objective == RankObjective::kBytes) {
      shares = ResidualTargets(options_.levels, cheapest);
    } else if (ladder.name == "prefix" && ladder.objective == RankObjective::kFlops) {
      shares = PrefixTargets(options_.levels, source_.spec().is_encoder());
    } else {
      shares = EvenTargets(options_.levels, cheapest);
    }
  }
  std::vector<int64_t> targets;
  for (const double share : shares) {
    targets.push_back(
        static_cast<int64_t>(share * static_cast<double>(FullCost(ladder.objective))) -
        AttentionCost(ladder.objective));
  }
  return targets;
}

std::vector<Profile> LevelChooser::ProfilesOfDelta(const LadderPlan& ladder,
                                                   std::vector<std::string>* notes) const {
  std::vector<Profile> profiles = ladder.delta->profiles;
  int64_t num_dense = 0;
  for (size_t layer = 0; layer < source_.layers().size(); ++layer) {
    const LinearSpec& spec = source_.layers()[layer];
    const std::vector<int64_t> plain = PrefixRanks(spec.out, spec.in, /*may_be_gar=*/false);
    const int64_t largest = plain.empty() ? 0 : plain.back();
    bool is_dense = false;  // from the level on that is, since levels are nested
    for (size_t i = 0; i < profiles.size(); ++i) {
      FormAndRank& choice = profiles[i][layer];
      if (choice.form != Form::kPrefix) continue;
      const bool is_gar = MayBeGar(ladder, static_cast<int64_t>(i));
      const Form form = CheapestPrefix(spec.out, spec.in, choice.rank, is_gar).form;
      is_dense = is_dense || (form == Form::kPrefix && choice.rank > largest);
      if (!is_dense) continue;
      choice = {};
      ++num_dense;
    }
  }
  if (num_dense > 0) {
    notes->push_back(
        absl::StrFormat("at %d places of the delta's levels layers run dense: plain factors of "
                        "their ranks cost more, and their levels have no gar pairs",
                        num_dense));
  }
  return profiles;
}

}  // namespace nestor
