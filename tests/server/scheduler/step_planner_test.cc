#include "server/scheduler/step_planner.h"

#include <map>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace nestor {
namespace {

using std::chrono::milliseconds;
using ::testing::ElementsAre;

const TimePoint kNow = TimePoint(std::chrono::hours(1));

// A step costs 4, 6 or 10 ms at the three levels, whatever its rows.
class StepPlannerTest : public testing::Test {
 protected:
  StepPlannerTest() : cost_model_(Ladder(3)) {
    const int milliseconds_of[] = {4, 6, 10};
    for (int level = 0; level < 3; ++level) {
      cost_model_.AddMeasurement(level, 1, milliseconds(milliseconds_of[level]));
    }
    snapshot_.limits = {.max_step_rows = 64, .prefill_chunk = 16};
    snapshot_.cost_model = &cost_model_;
    snapshot_.num_levels = 3;
    slas_.reserve(16);
  }

  // Every level, best first.
  static Sla AnyLevel() {
    Sla sla;
    sla.levels = {2, 1, 0};
    return sla;
  }

  TaskView& AddPrompt(const Sla& sla, int64_t prompt, int64_t tokens_left = 10) {
    slas_.push_back(sla);
    TaskView view;
    view.id = static_cast<TaskId>(slas_.size());
    view.sla = &slas_.back();
    view.arrival = kNow;
    view.prompt_left = prompt;
    view.tokens_left = tokens_left;
    snapshot_.tasks.push_back(view);
    return snapshot_.tasks.back();
  }

  TaskView& AddDecoding(const Sla& sla, int64_t tokens_left = 10) {
    TaskView& view = AddPrompt(sla, 0, tokens_left);
    view.last_token = kNow;
    return view;
  }

  // The entry of each task, by index.
  std::map<size_t, StepDecision::Entry> Plan() {
    PlanStep(snapshot_, kNow, &decision_);
    std::map<size_t, StepDecision::Entry> entries;
    for (const StepDecision::Entry& entry : decision_.entries) entries[entry.task] = entry;
    return entries;
  }

  CostModel cost_model_;
  std::vector<Sla> slas_;
  StepSnapshot snapshot_;
  StepDecision decision_;
};

TEST_F(StepPlannerTest, NoTasksMakeNoStep) { EXPECT_TRUE(Plan().empty()); }

TEST_F(StepPlannerTest, DecodingTasksHaveARowEachAndPromptsFillAChunk) {
  AddPrompt(AnyLevel(), 40);
  AddDecoding(AnyLevel());
  AddDecoding(AnyLevel());
  const auto entries = Plan();
  EXPECT_EQ(entries.at(0).rows, 16);
  EXPECT_EQ(entries.at(1).rows, 1);
  EXPECT_EQ(entries.at(2).rows, 1);
  EXPECT_THAT(decision_.rows_by_level, ElementsAre(0, 0, 18));
}

TEST_F(StepPlannerTest, PromptsShareTheChunkInOrderOfPriority) {
  Sla urgent = AnyLevel();
  urgent.priority = 1;
  Sla patient = AnyLevel();
  patient.priority = 2;
  AddPrompt(patient, 40);
  AddPrompt(urgent, 10);
  const auto entries = Plan();
  EXPECT_EQ(entries.at(0).rows, 6);
  EXPECT_EQ(entries.at(1).rows, 10);
}

TEST_F(StepPlannerTest, RowsNeverExceedTheStep) {
  snapshot_.limits.max_step_rows = 5;
  AddDecoding(AnyLevel());
  AddPrompt(AnyLevel(), 40);
  const auto entries = Plan();
  EXPECT_EQ(entries.at(1).rows, 4);
}

TEST_F(StepPlannerTest, TextsOfAnEncoderRunWholeOrWait) {
  snapshot_.limits = {.max_step_rows = 50, .prefill_chunk = 4, .splits_prompts = false};
  AddPrompt(AnyLevel(), 30);
  AddPrompt(AnyLevel(), 30);
  AddPrompt(AnyLevel(), 20);
  const auto entries = Plan();
  EXPECT_EQ(entries.at(0).rows, 30);
  EXPECT_EQ(entries.count(1), 0u);
  EXPECT_EQ(entries.at(2).rows, 20);
}

TEST_F(StepPlannerTest, WithoutATargetTheBestLevelRuns) {
  AddDecoding(AnyLevel());
  const auto entries = Plan();
  EXPECT_EQ(entries.at(0).level, 2);
  EXPECT_EQ(entries.at(0).degradation, Degradation::kNone);
  EXPECT_EQ(decision_.predicted, milliseconds(10));
}

TEST_F(StepPlannerTest, TightPerTokenTargetLowersTheLevel) {
  Sla sla = AnyLevel();
  sla.per_token_target = milliseconds(7);
  AddDecoding(sla);
  const auto entries = Plan();
  EXPECT_EQ(entries.at(0).level, 1);
  EXPECT_EQ(entries.at(0).degradation, Degradation::kPerTokenTarget);
}

TEST_F(StepPlannerTest, UnreachableTargetTakesTheFastestLevel) {
  Sla sla = AnyLevel();
  sla.per_token_target = milliseconds(1);
  AddDecoding(sla);
  EXPECT_EQ(Plan().at(0).level, 0);
}

TEST_F(StepPlannerTest, LooseTargetKeepsTheBestLevel) {
  Sla sla = AnyLevel();
  sla.latency_target = milliseconds(101);
  AddDecoding(sla, /*tokens_left=*/10);
  EXPECT_EQ(Plan().at(0).level, 2);
}

TEST_F(StepPlannerTest, LatencyTargetCountsEveryTokenThatIsLeft) {
  Sla sla = AnyLevel();
  sla.latency_target = milliseconds(65);
  AddDecoding(sla, /*tokens_left=*/10);
  const auto entries = Plan();
  EXPECT_EQ(entries.at(0).level, 1);
  EXPECT_EQ(entries.at(0).degradation, Degradation::kLatencyTarget);
}

TEST_F(StepPlannerTest, LevelRisesAgainWhenSlackGrows) {
  Sla sla = AnyLevel();
  sla.latency_target = milliseconds(65);
  AddDecoding(sla, /*tokens_left=*/3);
  EXPECT_EQ(Plan().at(0).level, 2);
}

TEST_F(StepPlannerTest, FirstTokenTargetCountsEveryPromptChunk) {
  Sla sla = AnyLevel();
  sla.first_token_target = milliseconds(20);
  AddPrompt(sla, 48);  // three chunks of 16
  const auto entries = Plan();
  EXPECT_EQ(entries.at(0).level, 1);
  EXPECT_EQ(entries.at(0).degradation, Degradation::kFirstTokenTarget);
}

TEST_F(StepPlannerTest, PinnedLevelIsNeverLeft) {
  Sla sla;
  sla.levels = {2};
  sla.per_token_target = milliseconds(1);
  AddDecoding(sla);
  const auto entries = Plan();
  EXPECT_EQ(entries.at(0).level, 2);
  EXPECT_EQ(entries.at(0).degradation, Degradation::kNone);
}

TEST_F(StepPlannerTest, RowIsRaisedForNothingBesideALargerLevel) {
  // The full row makes the step 10 ms long anyway; the tight one gains nothing from level 0.
  Sla tight = AnyLevel();
  tight.per_token_target = milliseconds(1);
  AddDecoding(tight);
  AddDecoding(AnyLevel());
  const auto entries = Plan();
  EXPECT_EQ(entries.at(0).level, 2);
  EXPECT_EQ(entries.at(0).degradation, Degradation::kNone);
}

TEST_F(StepPlannerTest, RaisingNeverCrossesWhatTheBudgetAllows) {
  Sla cheap;
  cheap.levels = {1, 0};
  cheap.per_token_target = milliseconds(1);
  AddDecoding(cheap);
  AddDecoding(AnyLevel());
  EXPECT_EQ(Plan().at(0).level, 1);
}

TEST_F(StepPlannerTest, TightTasksLowerTheStepTogether) {
  Sla tight = AnyLevel();
  tight.per_token_target = milliseconds(5);
  AddDecoding(tight);
  AddDecoding(tight);
  const auto entries = Plan();
  EXPECT_EQ(entries.at(0).level, 0);
  EXPECT_EQ(entries.at(1).level, 0);
  EXPECT_EQ(decision_.predicted, milliseconds(4));
}

TEST_F(StepPlannerTest, ScoringHasNoTokensToWaitFor) {
  Sla sla = AnyLevel();
  sla.latency_target = milliseconds(25);
  AddPrompt(sla, 32, /*tokens_left=*/0);  // two chunks of 10 ms
  EXPECT_EQ(Plan().at(0).level, 2);
}

}  // namespace
}  // namespace nestor
