#include "engine/interpolate.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "base/check.h"
#include "base/status_macros.h"

namespace nestor {
namespace {

constexpr int64_t kRankStep = 8;
constexpr const char* kFull = "full";

// FLOPs or weight bytes, as `ladder` counts.
int64_t CostOn(const std::string& ladder, const LinearCost& cost) {
  return ladder == "prefix" ? cost.flops : cost.weight_bytes;
}

// Of the model's levels, in their order.
std::vector<std::string> LaddersOf(const std::vector<Level>& levels) {
  std::vector<std::string> ladders;
  for (const Level& level : levels) {
    if (level.ladder == kFull || (!ladders.empty() && ladders.back() == level.ladder)) continue;
    ladders.push_back(level.ladder);
  }
  return ladders;
}

// The full level is on every ladder.
bool IsOn(const Level& level, const std::string& ladder) {
  return level.ladder == ladder || level.ladder == kFull;
}

double Interpolate(double low, double high, double share) {
  // A Spearman may be negative, and then has no logarithm.
  if (low <= 0 || high <= 0) return low + share * (high - low);
  return std::exp(std::log(low) + share * (std::log(high) - std::log(low)));
}

// The level at `cost` between two neighbours of a ladder, without its costs; none where nothing
// is between them that costs more than `low` and at most this.
std::optional<Level> LevelBetween(const NestedModel& model, const Level& low, const Level& high,
                                  double cost) {
  constexpr double kSlack = 1e-9;  // of a share that was typed in decimals
  const std::string& ladder = low.ladder;
  const int64_t full_cost = CostOn(ladder, model.levels().back().cost);
  auto budget = static_cast<int64_t>(std::floor((cost + kSlack) * static_cast<double>(full_cost))) -
                CostOn(ladder, low.cost);
  std::vector<std::vector<PricedChoice>> choices;
  for (size_t i = 0; i < model.layers().size(); ++i) {
    const Form form = low.profile[i].form;
    const StoredLayer layer = {.spec = model.layers()[i],
                               .dense = model.dense_storage(),
                               .rank = form == Form::kGar ? 0 : model.StoredRank(i, form),
                               .has_middle = model.HasMiddlePlane(i)};
    choices.push_back(ChoicesBetween(layer, ladder, low.profile[i], high.profile[i]));
    budget += choices.back().front().cost;
  }
  Level level;
  level.ladder = ladder;
  level.profile = InterpolateProfile(choices, budget);
  level.is_interpolated = true;
  if (level.profile == low.profile || level.profile == high.profile) return std::nullopt;
  return level;
}

void FillInCosts(const NestedModel& model, Level* level) {
  const LinearCost full = model.levels().back().cost;
  level->cost = CostOfProfile(model.spec(), model.layers(), level->profile, model.dense_storage());
  level->relative_cost =
      static_cast<double>(level->cost.weight_bytes) / static_cast<double>(full.weight_bytes);
  level->relative_flops = static_cast<double>(level->cost.flops) / static_cast<double>(full.flops);
}

// On a scale on which every ladder ends in 1.
double CostOfRung(const Level& level) {
  return level.ladder == kFull ? 1 : RelativeCostOnLadder(level);
}

double Estimate(const Level& low, const Level& high, const Level& level) {
  const double share = (CostOfRung(level) - CostOfRung(low)) / (CostOfRung(high) - CostOfRung(low));
  return Interpolate(low.metrics.quality, high.metrics.quality, std::clamp(share, 0.0, 1.0));
}

// Puts the level at `cost` where it belongs in `levels`. The neighbours may be interpolated
// themselves, so that what lies between two stored levels is nested. False where there is none.
bool Insert(const NestedModel& model, const std::string& ladder, double cost,
            std::vector<Level>* levels) {
  size_t low = levels->size();
  for (size_t i = 0; i < levels->size(); ++i) {
    const Level& level = (*levels)[i];
    if (level.ladder == ladder && RelativeCostOnLadder(level) <= cost) low = i;
  }
  if (low == levels->size()) return false;
  size_t high = low + 1;
  while (!IsOn((*levels)[high], ladder)) ++high;
  std::optional<Level> level = LevelBetween(model, (*levels)[low], (*levels)[high], cost);
  if (!level.has_value()) return false;
  FillInCosts(model, &*level);
  levels->insert(levels->begin() + static_cast<ptrdiff_t>(low) + 1, *std::move(level));
  return true;
}

void UseEstimates(std::vector<Level>* levels) {
  const std::vector<double> estimates = EstimateQualities(*levels);
  for (size_t i = 0; i < levels->size(); ++i) {
    if ((*levels)[i].is_interpolated) (*levels)[i].metrics.quality = estimates[i];
  }
}

const Level& CheapestOf(const std::vector<Level>& levels, const std::string& ladder) {
  return *std::find_if(levels.begin(), levels.end(),
                       [&](const Level& level) { return level.ladder == ladder; });
}

// Gives every wanted level the ladder's name, and checks it and the cost.
absl::Status Resolve(const NestedModel& model, WantedLevel* wanted) {
  const std::vector<std::string> ladders = LaddersOf(model.levels());
  const auto error = [&](const std::string& what) {
    return absl::InvalidArgumentError(
        absl::StrCat(wanted->ladder, wanted->ladder.empty() ? "" : ":", wanted->cost, ": ", what));
  };
  if (ladders.empty()) {
    return error("the model has the full level only, nothing to interpolate between");
  }
  const std::string known = absl::StrJoin(ladders, " and ");
  if (wanted->ladder.empty() && ladders.size() > 1) {
    return error(absl::StrCat("the model has a ", known, " ladder: say which, such as ",
                              ladders.front(), ":", wanted->cost));
  }
  if (wanted->ladder.empty()) wanted->ladder = ladders.front();
  if (std::find(ladders.begin(), ladders.end(), wanted->ladder) == ladders.end()) {
    return error(absl::StrCat("the model has no such ladder, only ", known));
  }
  const double cheapest = RelativeCostOnLadder(CheapestOf(model.levels(), wanted->ladder));
  if (!(wanted->cost > cheapest && wanted->cost < 1)) {
    return error(absl::StrFormat("must be between %.4f, the cost of the cheapest %s level, and 1",
                                 cheapest, wanted->ladder));
  }
  return absl::OkStatus();
}

absl::StatusOr<WantedLevel> ParseWantedLevel(const std::string& text) {
  WantedLevel wanted;
  const size_t colon = text.find(':');
  if (colon != std::string::npos) wanted.ladder = text.substr(0, colon);
  const std::string cost = colon == std::string::npos ? text : text.substr(colon + 1);
  if (!absl::SimpleAtod(cost, &wanted.cost) || !(wanted.cost > 0 && wanted.cost < 1) ||
      colon == 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("must be a share in (0, 1), such as 0.65 or prefix:0.65; was '", text, "'"));
  }
  return wanted;
}

}  // namespace

double RelativeCostOnLadder(const Level& level) {
  return level.ladder == "prefix" ? level.relative_flops : level.relative_cost;
}

std::vector<PricedChoice> ChoicesBetween(const StoredLayer& layer, const std::string& ladder,
                                         const FormAndRank& low, const FormAndRank& high) {
  NESTOR_CHECK(IsNested(low, high));
  const auto priced = [&](const FormAndRank& choice) {
    const LinearSpec& spec = layer.spec;
    const LinearCost cost =
        CostOfLinear(spec.out, spec.in, spec.has_bias, layer.dense, choice.form, choice.rank);
    return PricedChoice{choice, CostOn(ladder, cost)};
  };
  std::vector<PricedChoice> choices = {priced(low)};
  if (low.form == Form::kDense) return choices;
  // A pair serves one rank: the layer goes all the way or stays.
  if (low.form == Form::kGar || high.form == Form::kGar) {
    const PricedChoice next = priced(high);
    if (next.cost > choices.back().cost) choices.push_back(next);
    return choices;
  }
  // What follows the last rank: the middle plane, the dense weights, or both.
  std::vector<PricedChoice> after;
  if (low.form == Form::kResidual && layer.has_middle && high.form == Form::kDense) {
    after.push_back(priced({Form::kMiddle, 0}));
  }
  if (!HasRanks(high.form)) after.push_back(priced(high));
  const int64_t last_rank = after.empty() ? high.rank : layer.rank;
  for (int64_t rank = low.rank; HasRanks(low.form) && rank < last_rank;) {
    rank = std::min((rank / kRankStep + 1) * kRankStep, last_rank);
    const PricedChoice next = priced({low.form, rank});
    if (next.cost > choices.back().cost && (after.empty() || next.cost < after.front().cost)) {
      choices.push_back(next);
    }
  }
  for (const PricedChoice& next : after) {
    if (next.cost > choices.back().cost) choices.push_back(next);
  }
  return choices;
}

Profile InterpolateProfile(const std::vector<std::vector<PricedChoice>>& choices, int64_t budget) {
  struct Step {
    size_t layer;
    size_t choice;
    double position;  // of the way from the layer's first choice to its last; 0 to 1
    int64_t cost;     // of the step
  };
  std::vector<Step> steps;
  std::vector<size_t> chosen(choices.size(), 0);
  int64_t total = 0;
  for (size_t layer = 0; layer < choices.size(); ++layer) {
    const std::vector<PricedChoice>& of_layer = choices[layer];
    total += of_layer.front().cost;
    const auto way = static_cast<double>(of_layer.back().cost - of_layer.front().cost);
    for (size_t i = 1; i < of_layer.size(); ++i) {
      // A layer moves on where the next choice is the nearer one.
      const int64_t middle = of_layer[i - 1].cost + of_layer[i].cost - 2 * of_layer[0].cost;
      steps.push_back({layer, i, 0.5 * static_cast<double>(middle) / way,
                       of_layer[i].cost - of_layer[i - 1].cost});
    }
  }
  std::stable_sort(steps.begin(), steps.end(), [](const Step& a, const Step& b) {
    return a.position != b.position ? a.position < b.position : a.cost > b.cost;
  });
  std::optional<double> waiting;  // for a step that did not fit: nothing due with it goes first
  for (const Step& step : steps) {
    const std::vector<PricedChoice>& of_layer = choices[step.layer];
    const int64_t more = of_layer[step.choice].cost - of_layer[chosen[step.layer]].cost;
    if (step.position == waiting) continue;
    if (total + more > budget) {
      waiting = step.position;
      continue;
    }
    total += more;
    chosen[step.layer] = step.choice;
  }
  Profile profile;
  for (size_t layer = 0; layer < choices.size(); ++layer) {
    profile.push_back(choices[layer][chosen[layer]].choice);
  }
  return profile;
}

absl::StatusOr<std::vector<Level>> WithInterpolatedLevels(const NestedModel& model,
                                                          std::vector<WantedLevel> wanted) {
  for (WantedLevel& level : wanted) NESTOR_RETURN_IF_ERROR(Resolve(model, &level));
  std::sort(wanted.begin(), wanted.end(), [](const WantedLevel& a, const WantedLevel& b) {
    return a.ladder != b.ladder ? a.ladder < b.ladder : a.cost < b.cost;
  });
  std::vector<Level> levels = model.levels();
  for (size_t i = 0; i < wanted.size(); ++i) {
    const auto& [ladder, cost] = wanted[i];
    if (i > 0 && ladder == wanted[i - 1].ladder && cost == wanted[i - 1].cost) {
      return absl::InvalidArgumentError(absl::StrCat(ladder, ":", cost, ": is there twice"));
    }
    if (!Insert(model, ladder, cost, &levels)) {
      return absl::InvalidArgumentError(absl::StrCat(
          ladder, ":", cost,
          ": has no level of its own: it gives the same ranks as the level below or above it"));
    }
  }
  UseEstimates(&levels);
  return levels;
}

std::vector<double> EstimateQualities(const std::vector<Level>& levels) {
  std::vector<double> estimates;
  for (size_t i = 0; i < levels.size(); ++i) {
    size_t low = i;
    size_t high = i;
    while (levels[low].is_interpolated) --low;
    while (levels[high].is_interpolated || !IsOn(levels[high], levels[i].ladder)) ++high;
    estimates.push_back(low == high ? levels[i].metrics.quality
                                    : Estimate(levels[low], levels[high], levels[i]));
  }
  return estimates;
}

absl::StatusOr<std::vector<WantedLevel>> ParseWantedLevels(const std::vector<std::string>& texts) {
  std::vector<WantedLevel> parsed;
  for (const std::string& text : texts) {
    NESTOR_ASSIGN_OR_RETURN(parsed.emplace_back(), ParseWantedLevel(text));
  }
  return parsed;
}

absl::Status AddInterpolatedLevels(const std::vector<std::string>& wanted, NestedModel* model) {
  if (wanted.empty()) return absl::OkStatus();
  NESTOR_ASSIGN_OR_RETURN(std::vector<WantedLevel> parsed, ParseWantedLevels(wanted));
  NESTOR_ASSIGN_OR_RETURN(std::vector<Level> levels,
                          WithInterpolatedLevels(*model, std::move(parsed)));
  return model->SetLevels(std::move(levels));
}

absl::StatusOr<std::vector<Level>> WithSweptLevels(const NestedModel& model, int points) {
  NESTOR_CHECK(points > 0);
  std::vector<Level> levels = model.levels();
  const std::vector<std::string> ladders = LaddersOf(levels);
  if (ladders.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat(model.directory(), ": has the full level only, no curve to sweep"));
  }
  for (const std::string& ladder : ladders) {
    const double cheapest = RelativeCostOnLadder(CheapestOf(levels, ladder));
    for (int i = 1; i <= points; ++i) {
      Insert(model, ladder, cheapest + (1 - cheapest) * i / (points + 1), &levels);
    }
  }
  UseEstimates(&levels);
  return levels;
}

}  // namespace nestor
