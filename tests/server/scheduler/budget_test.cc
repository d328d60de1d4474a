#include "server/scheduler/budget.h"

#include <cmath>
#include <limits>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace nestor {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

// Two residual levels, a prefix one that costs more bytes than the second, the full one.
const Ladder kLadder = {
    {.relative_cost = 0.5, .relative_flops = 1.0, .quality = 0.90},
    {.relative_cost = 0.6, .relative_flops = 1.01, .quality = 0.95},
    {.relative_cost = 0.7, .relative_flops = 0.4, .quality = 0.80, .shares_pass = false},
    {.relative_cost = 1.0, .relative_flops = 1.0, .quality = 1.0},
};
constexpr int kDefaultPriority = 10;

absl::StatusOr<Sla> Resolve(const Budget& budget,
                            CostMeasure measure = CostMeasure::kRelativeCost) {
  return ResolveBudget(budget, kLadder, measure, kDefaultPriority);
}

TEST(BudgetTest, EmptyBudgetAllowsEveryLevelBestFirst) {
  const auto sla = Resolve({});
  ASSERT_TRUE(sla.ok());
  EXPECT_THAT(sla->levels, ElementsAre(3, 1, 0, 2));
  EXPECT_EQ(sla->priority, 10);
  EXPECT_FALSE(sla->has_target());
}

TEST(BudgetTest, MaxCostBoundsBytesForGenerateAndFlopsForScore) {
  EXPECT_THAT(Resolve({.max_cost = 0.6})->levels, ElementsAre(1, 0));
  EXPECT_THAT(Resolve({.max_cost = 0.6}, CostMeasure::kRelativeFlops)->levels, ElementsAre(2));
}

TEST(BudgetTest, CostCopiedFromSixDigitsAdmitsItsOwnLevel) {
  const Ladder ladder = {{.relative_cost = 0.53124968, .quality = 0.9}, {}};
  const auto sla = ResolveBudget({.max_cost = 0.531249}, ladder, CostMeasure::kRelativeCost, 1);
  ASSERT_TRUE(sla.ok()) << sla.status();
  EXPECT_THAT(sla->levels, ElementsAre(0));
}

TEST(BudgetTest, MinQualityDropsLevelsBelow) {
  EXPECT_THAT(Resolve({.min_quality = 0.9})->levels, ElementsAre(3, 1, 0));
}

TEST(BudgetTest, PinnedLevelIsTheOnlyOne) {
  EXPECT_THAT(Resolve({.level = 1})->levels, ElementsAre(1));
}

TEST(BudgetTest, FullLevelIsPreferredToOneMeasuredAboveIt) {
  const Ladder ladder = {{.relative_cost = 0.9, .quality = 1.002}, {}};
  EXPECT_THAT(ResolveBudget({}, ladder, CostMeasure::kRelativeCost, 1)->levels, ElementsAre(1, 0));
}

TEST(BudgetTest, TargetsAndPriorityAreCarriedOver) {
  const auto sla = Resolve({.latency_target = std::chrono::milliseconds(1500),
                            .first_token_target = std::chrono::milliseconds(200),
                            .per_token_target = std::chrono::milliseconds(20),
                            .priority = 3});
  ASSERT_TRUE(sla.ok());
  EXPECT_EQ(sla->latency_target, std::chrono::milliseconds(1500));
  EXPECT_EQ(sla->first_token_target, std::chrono::milliseconds(200));
  EXPECT_EQ(sla->per_token_target, std::chrono::milliseconds(20));
  EXPECT_EQ(sla->priority, 3);
}

struct BadBudget {
  const char* name;
  Budget budget;
  absl::StatusCode code;
  const char* message;
};
void PrintTo(const BadBudget& bad, std::ostream* out) { *out << bad.name; }

class BadBudgetTest : public testing::TestWithParam<BadBudget> {};

TEST_P(BadBudgetTest, IsRefusedWithFieldAndValue) {
  const auto sla = Resolve(GetParam().budget);
  EXPECT_EQ(sla.status().code(), GetParam().code);
  EXPECT_THAT(std::string(sla.status().message()), HasSubstr(GetParam().message));
}

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
constexpr auto kPrecondition = absl::StatusCode::kFailedPrecondition;

INSTANTIATE_TEST_SUITE_P(
    All, BadBudgetTest,
    testing::Values(
        BadBudget{"ZeroLatency",
                  {.latency_target = Duration::zero()},
                  kInvalid,
                  "budget.latency_target: must be positive; was 0"},
        BadBudget{"NegativeFirstToken",
                  {.first_token_target = std::chrono::seconds(-2)},
                  kInvalid,
                  "budget.first_token_target: must be positive; was -2"},
        BadBudget{"NegativePerToken",
                  {.per_token_target = std::chrono::nanoseconds(-1)},
                  kInvalid,
                  "budget.per_token_target"},
        BadBudget{"ZeroCost", {.max_cost = 0}, kInvalid, "budget.max_cost: must be in (0, 1]"},
        BadBudget{"CostAboveOne", {.max_cost = 1.5}, kInvalid, "was 1.5"},
        BadBudget{"NanCost", {.max_cost = kNan}, kInvalid, "budget.max_cost"},
        BadBudget{"NanQuality", {.min_quality = kNan}, kInvalid, "budget.min_quality"},
        BadBudget{"NegativeQuality", {.min_quality = -0.1}, kInvalid, "must be in [0, 1]"},
        BadBudget{"NegativeLevel", {.level = -1}, kInvalid, "must be in [0, 3]; was -1"},
        BadBudget{"LevelTooHigh", {.level = 4}, kInvalid, "must be in [0, 3]; was 4"},
        BadBudget{"ZeroPriority", {.priority = 0}, kInvalid, "must be at least 1; was 0"},
        BadBudget{"PinnedAboveMaxCost", {.max_cost = 0.55, .level = 1}, kInvalid, "contradictory"},
        BadBudget{
            "PinnedBelowQuality", {.min_quality = 0.99, .level = 1}, kInvalid, "contradictory"},
        BadBudget{"BelowTheCheapest",
                  {.max_cost = 0.1},
                  kPrecondition,
                  "the cheapest is level 0 (relative_cost 0.5"},
        BadBudget{"QualityCostsMore",
                  {.max_cost = 0.55, .min_quality = 0.93},
                  kPrecondition,
                  "the cheapest of that quality is level 1 (relative_cost 0.6"}),
    [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace nestor
