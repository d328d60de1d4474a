#include "server/scheduler/budget.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"

namespace nestor {
namespace {

// Costs travel as text with six digits; a cost copied from there must admit its own level.
constexpr double kCostTolerance = 1e-6;

absl::Status CheckPositive(const std::optional<Duration>& duration, const char* field) {
  if (!duration.has_value() || *duration > Duration::zero()) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("budget.", field, ": must be positive; was ", SecondsOf(*duration), " s"));
}

absl::Status CheckRanges(const Budget& budget, size_t num_levels) {
  NESTOR_RETURN_IF_ERROR(CheckPositive(budget.latency_target, "latency_target"));
  NESTOR_RETURN_IF_ERROR(CheckPositive(budget.first_token_target, "first_token_target"));
  NESTOR_RETURN_IF_ERROR(CheckPositive(budget.per_token_target, "per_token_target"));
  // The comparisons are written so that NaN fails them.
  if (budget.max_cost.has_value() && !(*budget.max_cost > 0 && *budget.max_cost <= 1)) {
    return absl::InvalidArgumentError(
        absl::StrCat("budget.max_cost: must be in (0, 1]; was ", *budget.max_cost));
  }
  if (budget.min_quality.has_value() && !(*budget.min_quality >= 0 && *budget.min_quality <= 1)) {
    return absl::InvalidArgumentError(
        absl::StrCat("budget.min_quality: must be in [0, 1]; was ", *budget.min_quality));
  }
  if (budget.level.has_value() &&
      (*budget.level < 0 || static_cast<size_t>(*budget.level) >= num_levels)) {
    return absl::InvalidArgumentError(
        absl::StrCat("budget.level: must be in [0, ", num_levels - 1, "]; was ", *budget.level));
  }
  if (budget.priority.has_value() && *budget.priority < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("budget.priority: must be at least 1; was ", *budget.priority));
  }
  return absl::OkStatus();
}

// A level measured a little above the full one (noise) is not preferred to it.
double QualityOf(const LevelView& level) { return std::min(level.quality, 1.0); }

double CostOf(const LevelView& level, CostMeasure measure) {
  return measure == CostMeasure::kRelativeCost ? level.relative_cost : level.relative_flops;
}

const char* NameOf(CostMeasure measure) {
  return measure == CostMeasure::kRelativeCost ? "relative_cost" : "relative_flops";
}

bool IsWithinCost(const LevelView& level, const Budget& budget, CostMeasure measure) {
  return !budget.max_cost.has_value() ||
         CostOf(level, measure) <= *budget.max_cost + kCostTolerance;
}

bool IsGoodEnough(const LevelView& level, const Budget& budget) {
  return !budget.min_quality.has_value() || QualityOf(level) >= *budget.min_quality;
}

std::string Describe(const Ladder& ladder, int level, CostMeasure measure) {
  return absl::StrCat("level ", level, " (", NameOf(measure), " ", CostOf(ladder[level], measure),
                      ", quality ", ladder[level].quality, ")");
}

absl::Status CheckPinned(const Budget& budget, const Ladder& ladder, CostMeasure measure) {
  const LevelView& level = ladder[*budget.level];
  if (!IsWithinCost(level, budget, measure)) {
    return absl::InvalidArgumentError(
        absl::StrCat("budget: contradictory: ", Describe(ladder, *budget.level, measure),
                     " is pinned, and costs more than max_cost ", *budget.max_cost));
  }
  if (!IsGoodEnough(level, budget)) {
    return absl::InvalidArgumentError(
        absl::StrCat("budget: contradictory: ", Describe(ladder, *budget.level, measure),
                     " is pinned, and is below min_quality ", *budget.min_quality));
  }
  return absl::OkStatus();
}

// The full level has quality 1, so some level always meets min_quality and only max_cost can
// leave none.
absl::Status NoLevelError(const Budget& budget, const Ladder& ladder, CostMeasure measure) {
  int cheapest = -1;
  for (int i = 0; i < static_cast<int>(ladder.size()); ++i) {
    if (!IsGoodEnough(ladder[i], budget)) continue;
    if (cheapest < 0 || CostOf(ladder[i], measure) < CostOf(ladder[cheapest], measure)) {
      cheapest = i;
    }
  }
  std::string message = "budget: no level meets it:";
  if (budget.max_cost.has_value()) absl::StrAppend(&message, " max_cost ", *budget.max_cost);
  if (budget.min_quality.has_value()) {
    absl::StrAppend(&message, " min_quality ", *budget.min_quality);
  }
  if (cheapest >= 0) {
    absl::StrAppend(&message, "; the cheapest",
                    budget.min_quality.has_value() ? " of that quality" : "", " is ",
                    Describe(ladder, cheapest, measure));
  }
  return absl::FailedPreconditionError(message);
}

}  // namespace

absl::StatusOr<Sla> ResolveBudget(const Budget& budget, const Ladder& ladder, CostMeasure measure,
                                  int default_priority) {
  NESTOR_RETURN_IF_ERROR(CheckRanges(budget, ladder.size()));
  Sla sla;
  sla.latency_target = budget.latency_target;
  sla.first_token_target = budget.first_token_target;
  sla.per_token_target = budget.per_token_target;
  sla.priority = budget.priority.value_or(default_priority);
  if (budget.level.has_value()) {
    NESTOR_RETURN_IF_ERROR(CheckPinned(budget, ladder, measure));
    sla.levels = {*budget.level};
    return sla;
  }
  for (int i = 0; i < static_cast<int>(ladder.size()); ++i) {
    if (IsWithinCost(ladder[i], budget, measure) && IsGoodEnough(ladder[i], budget)) {
      sla.levels.push_back(i);
    }
  }
  if (sla.levels.empty()) return NoLevelError(budget, ladder, measure);
  std::stable_sort(sla.levels.begin(), sla.levels.end(), [&](int a, int b) {
    const double quality_a = QualityOf(ladder[a]);
    const double quality_b = QualityOf(ladder[b]);
    if (quality_a != quality_b) return quality_a > quality_b;
    return CostOf(ladder[a], measure) > CostOf(ladder[b], measure);
  });
  return sla;
}

}  // namespace nestor
