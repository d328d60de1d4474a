#include "server/scheduler/speculation.h"

#include <random>

#include "base/speculative_gain.h"
#include "gtest/gtest.h"

namespace nestor {
namespace {

constexpr int kFull = 2;
constexpr int64_t kLong = 1000;

// Two levels to draft at, and the full one.
Ladder ThreeLevels() {
  return {{.relative_cost = 0.2, .quality = 0.6},
          {.relative_cost = 0.5, .quality = 0.9},
          {.relative_cost = 1, .quality = 1}};
}

// A step at level l takes `seconds[l]`, and a row more `row` of that.
CostModel Costs(const std::vector<double>& seconds, double row) {
  CostModel model(ThreeLevels());
  for (int level = 0; level < 3; ++level) {
    model.AddMeasurement(level, 1, DurationOfSeconds(seconds[static_cast<size_t>(level)]));
    model.AddMeasurement(level, 11,
                         DurationOfSeconds(seconds[static_cast<size_t>(level)] * (1 + 10 * row)));
  }
  return model;
}

// A stream whose truth may differ from what the policy is told.
struct Truth {
  double draft_acceptance[2] = {0.6, 0.9};
  double seconds[3] = {0.002, 0.005, 0.01};
  double row = 0.02;
  double round_overhead = 0;  // seconds
};

struct Decoded {
  double tokens = 0;
  double seconds = 0;
  int64_t rounds = 0;
  int64_t steps = 0;
  // Of the plain decoding that this machine could do.
  double gain() const { return tokens * 0.01 / seconds; }
};

Decoded Simulate(SpeculationPolicy* policy, const CostModel& believed, const Truth& truth,
                 int64_t choices) {
  std::mt19937 random(1);
  std::uniform_real_distribution<double> uniform(0, 1);
  Decoded run;
  for (int64_t i = 0; i < choices; ++i) {
    const SpeculationChoice choice = policy->Choose(kFull, kLong, believed);
    SpeculationRound round = {.verify_level = kFull, .choice = choice, .num_tokens = 1};
    double seconds = truth.seconds[kFull];
    if (choice.num_drafts > 0) {
      while (round.num_examined < choice.num_drafts) {
        ++round.num_examined;
        if (uniform(random) >= truth.draft_acceptance[choice.draft_level]) break;
        ++round.num_accepted;
      }
      round.num_tokens = round.num_accepted + 1;
      seconds = choice.num_drafts * truth.seconds[choice.draft_level] +
                seconds * (1 + choice.num_drafts * truth.row) + truth.round_overhead;
    }
    round.time = DurationOfSeconds(seconds);
    policy->Observe(round, believed);
    run.tokens += static_cast<double>(round.num_tokens);
    run.seconds += seconds;
    ++(choice.num_drafts > 0 ? run.rounds : run.steps);
  }
  return run;
}

TEST(SpeculativeGainTest, FollowsTheFormula) {
  EXPECT_DOUBLE_EQ(ExpectedTokens(0.5, 2), 1.75);
  EXPECT_DOUBLE_EQ(ExpectedTokens(1, 4), 5);
  EXPECT_DOUBLE_EQ(ExpectedTokens(0, 4), 1);
  EXPECT_DOUBLE_EQ(SpeculativeGain(0.5, 2, 0.1, 1.2), 1.25);
}

TEST(SpeculationPolicyTest, ACheapDraftThatIsOftenRightPays) {
  const SpeculationPolicy policy(ThreeLevels(), 8);
  const SpeculationChoice choice = policy.Choose(kFull, kLong, Costs({0.002, 0.002, 0.01}, 0.01));
  EXPECT_EQ(choice.draft_level, 1);
  EXPECT_EQ(choice.num_drafts, 6);
}

TEST(SpeculationPolicyTest, AcceptanceStartsAtTheRelativeQuality) {
  const SpeculationPolicy policy(ThreeLevels(), 8);
  EXPECT_DOUBLE_EQ(policy.AcceptanceOf(0, kFull), 0.6);
  EXPECT_DOUBLE_EQ(policy.AcceptanceOf(1, kFull), 0.9);
  EXPECT_NEAR(policy.AcceptanceOf(0, 1), 0.667, 1e-3);
}

TEST(SpeculationPolicyTest, ADraftAsSlowAsTheStepDoesNotPay) {
  const SpeculationPolicy policy(ThreeLevels(), 8);
  EXPECT_EQ(policy.Choose(kFull, kLong, Costs({0.01, 0.01, 0.01}, 0.01)).num_drafts, 0);
}

TEST(SpeculationPolicyTest, RowsAsDearAsStepsDoNotPay) {
  const SpeculationPolicy policy(ThreeLevels(), 8);
  EXPECT_EQ(policy.Choose(kFull, kLong, Costs({0.002, 0.005, 0.01}, 1)).num_drafts, 0);
}

TEST(SpeculationPolicyTest, OnlyCheaperLevelsDraft) {
  const SpeculationPolicy policy(ThreeLevels(), 8);
  const CostModel costs = Costs({0.001, 0.0001, 0.01}, 0.01);
  EXPECT_EQ(policy.Choose(1, kLong, costs).num_drafts, 0);
  EXPECT_EQ(policy.Choose(0, kLong, costs).num_drafts, 0);
}

TEST(SpeculationPolicyTest, TheEndOfTheStreamAndTheOptionBoundTheDraft) {
  const CostModel costs = Costs({0.002, 0.002, 0.01}, 0.01);
  const SpeculationPolicy policy(ThreeLevels(), 8);
  EXPECT_EQ(policy.Choose(kFull, 3, costs).num_drafts, 2);
  EXPECT_EQ(policy.Choose(kFull, 1, costs).num_drafts, 0);
  EXPECT_EQ(SpeculationPolicy(ThreeLevels(), 3).Choose(kFull, kLong, costs).num_drafts, 3);
  EXPECT_EQ(SpeculationPolicy(ThreeLevels(), 0).Choose(kFull, kLong, costs).num_drafts, 0);
}

TEST(SpeculationPolicyTest, NothingMeasuredMeansPlainSteps) {
  const SpeculationPolicy policy(ThreeLevels(), 8);
  EXPECT_EQ(policy.Choose(kFull, kLong, CostModel(ThreeLevels())).num_drafts, 0);
}

TEST(SpeculationPolicyTest, DraftsGrowWithTheMeasuredAcceptance) {
  const CostModel costs = Costs({0.002, 0.005, 0.01}, 0.02);
  SpeculationPolicy policy(ThreeLevels(), 8);
  const int before = policy.Choose(kFull, kLong, costs).num_drafts;
  Simulate(&policy, costs, {.draft_acceptance = {0.95, 0.97}}, 200);
  EXPECT_GT(policy.Choose(kFull, kLong, costs).num_drafts, before);
  EXPECT_NEAR(policy.AcceptanceOf(0, kFull), 0.93, 0.05);
}

TEST(SpeculationPolicyTest, AGoodDraftGainsWhatTheFormulaSays) {
  const CostModel costs = Costs({0.001, 0.005, 0.01}, 0.02);
  SpeculationPolicy policy(ThreeLevels(), 8);
  const Truth truth = {.draft_acceptance = {0.8, 0.9}, .seconds = {0.001, 0.005, 0.01}};
  // 0.8, 5 drafts: 3.69 tokens in 1.6 steps.
  EXPECT_GT(Simulate(&policy, costs, truth, 3000).gain(), 0.95 * SpeculativeGain(0.8, 5, 0.1, 1.1));
}

TEST(SpeculationPolicyTest, RejectedDraftsEndInPlainStepsAndRareProbes) {
  const CostModel costs = Costs({0.002, 0.005, 0.01}, 0.02);
  SpeculationPolicy policy(ThreeLevels(), 8);
  Simulate(&policy, costs, {.draft_acceptance = {0.1, 0.1}}, 300);
  const Decoded run = Simulate(&policy, costs, {.draft_acceptance = {0.1, 0.1}}, 10000);
  EXPECT_GT(run.gain(), 0.985);
  EXPECT_GT(run.rounds, 20);
  EXPECT_LT(run.rounds, 300);
}

TEST(SpeculationPolicyTest, AWrongCostModelCannotKeepALosingSettingOn) {
  // Believed: a verified row is nearly free. True: it costs half a step.
  const CostModel believed = Costs({0.002, 0.005, 0.01}, 0.01);
  SpeculationPolicy policy(ThreeLevels(), 8);
  const Truth truth = {.draft_acceptance = {0.6, 0.9}, .row = 0.6};
  EXPECT_GT(Simulate(&policy, believed, truth, 300).gain(), 0.9);
  EXPECT_GT(Simulate(&policy, believed, truth, 10000).gain(), 0.975);
}

TEST(SpeculationPolicyTest, OverheadThatNoModelKnowsCounts) {
  const CostModel costs = Costs({0.002, 0.005, 0.01}, 0.02);
  SpeculationPolicy policy(ThreeLevels(), 8);
  Simulate(&policy, costs, {.round_overhead = 0.02}, 300);
  EXPECT_GT(Simulate(&policy, costs, {.round_overhead = 0.02}, 10000).gain(), 0.975);
}

TEST(SpeculationPolicyTest, ATextThatDraftsWellAgainIsNoticed) {
  const CostModel costs = Costs({0.001, 0.005, 0.01}, 0.02);
  SpeculationPolicy policy(ThreeLevels(), 8);
  Simulate(&policy, costs, {.draft_acceptance = {0.05, 0.05}}, 500);
  const Truth good = {.draft_acceptance = {0.85, 0.9}, .seconds = {0.001, 0.005, 0.01}};
  Simulate(&policy, costs, good, 1000);
  EXPECT_GT(Simulate(&policy, costs, good, 1000).gain(), 1.8);
}

TEST(SpeculationPolicyTest, PlainStepsAreMeasuredNowAndThen) {
  const CostModel costs = Costs({0.001, 0.005, 0.01}, 0.02);
  SpeculationPolicy policy(ThreeLevels(), 8);
  const Decoded run = Simulate(&policy, costs, {.draft_acceptance = {0.9, 0.9}}, 650);
  EXPECT_EQ(run.steps, 10);
}

}  // namespace
}  // namespace nestor
