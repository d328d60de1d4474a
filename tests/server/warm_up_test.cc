#include "server/warm_up.h"

#include <set>
#include <utility>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/testing/fake_engine.h"

namespace nestor {
namespace {

// The (sequences, rows) of every step at each level.
std::set<std::pair<int, size_t>> ShapesOf(const FakeEngineControl& control) {
  std::set<std::pair<int, size_t>> shapes;
  for (const FakeEngineControl::RecordedStep& step : control.steps()) {
    shapes.emplace(step.front().level, step.size());
  }
  return shapes;
}

TEST(WarmUpTest, EveryLevelRunsAtSeveralRowCounts) {
  FakeEngineControl control;
  FakeEngine engine(
      {.engine = {.max_step_rows = 64, .max_sequences = 16, .page_size = 4}, .num_levels = 2},
      &control);
  ServedModel model = engine.Describe();
  CostModel cost_model(LadderOf(model));
  ASSERT_TRUE(WarmUp(32, &engine, &model, &cost_model).ok());
  EXPECT_THAT(ShapesOf(control),
              testing::UnorderedElementsAre(std::pair(0, 1), std::pair(0, 4), std::pair(0, 16),
                                            std::pair(1, 1), std::pair(1, 4), std::pair(1, 16)));
  for (const ServedLevel& level : model.levels) EXPECT_GT(level.tokens_per_second, 0);
  const std::vector<int64_t> rows = {1, 0};
  EXPECT_GT(cost_model.Predict(rows), Duration::zero());
  EXPECT_EQ(engine.free_pages(), engine.num_pages());
}

TEST(WarmUpTest, SmallCacheSkipsWhatItCannotHold) {
  FakeEngineControl control;
  FakeEngine engine({.num_pages = 8, .max_sequence_length = 32, .num_levels = 1}, &control);
  ServedModel model = engine.Describe();
  CostModel cost_model(LadderOf(model));
  ASSERT_TRUE(WarmUp(128, &engine, &model, &cost_model).ok());
  EXPECT_THAT(ShapesOf(control), testing::UnorderedElementsAre(std::pair(0, 1), std::pair(0, 4)));
  EXPECT_EQ(engine.free_pages(), 8);
}

TEST(WarmUpTest, EncoderEmbedsBatches) {
  FakeEngineControl control;
  FakeEngine engine({.engine = {.max_step_rows = 128, .max_sequences = 16, .page_size = 4},
                     .num_pages = 1024,
                     .num_levels = 1,
                     .is_encoder = true},
                    &control);
  ServedModel model = engine.Describe();
  CostModel cost_model(LadderOf(model));
  ASSERT_TRUE(WarmUp(128, &engine, &model, &cost_model).ok());
  for (const FakeEngineControl::RecordedStep& step : control.steps()) {
    EXPECT_EQ(step.front().output, StepEntry::Output::kEmbedding);
    EXPECT_EQ(step.front().rows, 32);
  }
  EXPECT_THAT(ShapesOf(control), testing::UnorderedElementsAre(std::pair(0, 1), std::pair(0, 4)));
}

TEST(WarmUpTest, FailedStepIsReported) {
  FakeEngineControl control;
  control.FailToken(1);
  FakeEngine engine({}, &control);
  ServedModel model = engine.Describe();
  CostModel cost_model(LadderOf(model));
  EXPECT_EQ(WarmUp(32, &engine, &model, &cost_model).code(), absl::StatusCode::kInternal);
}

}  // namespace
}  // namespace nestor
