#include "server/usage.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace nestor {
namespace {

using ::testing::ElementsAre;

const LevelView kCheap = {
    .relative_cost = 0.5, .relative_flops = 0.75, .quality = 0.9, .flops_per_token = 100};
const LevelView kFull = {.flops_per_token = 200};

TEST(UsageTest, RunsOfALevelAreJoined) {
  Usage usage;
  usage.AddPromptRows(0, 4, kCheap);
  usage.AddPromptRows(0, 2, kCheap);
  usage.AddPromptRows(1, 3, kFull);
  usage.AddGeneratedToken(1);
  usage.AddGeneratedToken(1);
  usage.AddGeneratedToken(0);
  EXPECT_THAT(usage.prompt_levels, ElementsAre(LevelRun{0, 6}, LevelRun{1, 3}));
  EXPECT_THAT(usage.completion_levels, ElementsAre(LevelRun{1, 2}, LevelRun{0, 1}));
  EXPECT_EQ(usage.prompt_tokens, 9);
  EXPECT_EQ(usage.completion_tokens, 3);
}

TEST(UsageTest, CostsAreSummedOverTheRowsThatRan) {
  Usage usage;
  usage.AddPromptRows(0, 3, kCheap);
  usage.AddGeneratedToken(0);
  usage.AddDecodeRow(kFull);
  usage.AddGeneratedToken(1);
  EXPECT_EQ(usage.rows, 4);
  EXPECT_DOUBLE_EQ(usage.relative_cost, 2.5);
  EXPECT_DOUBLE_EQ(usage.relative_flops, 3.25);
  EXPECT_DOUBLE_EQ(usage.quality, 3.7);
  EXPECT_DOUBLE_EQ(usage.flops, 500);
}

TEST(UsageTest, DiscardedRowsCostButSayNothingOfTheQuality) {
  Usage usage;
  usage.AddDecodeRow(kFull);
  usage.AddDiscardedRows(2, kCheap);
  EXPECT_EQ(usage.rows, 3);
  EXPECT_EQ(usage.kept_rows, 1);
  EXPECT_DOUBLE_EQ(usage.relative_cost, 2);
  EXPECT_DOUBLE_EQ(usage.relative_flops, 2.5);
  EXPECT_DOUBLE_EQ(usage.flops, 400);
  EXPECT_DOUBLE_EQ(usage.quality, 1);
}

TEST(UsageTest, MergedTasksAddTheirRowsAndKeepTheSlowerTimes) {
  Usage a;
  a.AddPromptRows(0, 3, kCheap);
  a.queue_time = std::chrono::milliseconds(5);
  a.prefill_time = std::chrono::milliseconds(1);
  a.has_target = true;
  Usage b;
  b.AddPromptRows(0, 2, kCheap);
  b.queue_time = std::chrono::milliseconds(2);
  b.prefill_time = std::chrono::milliseconds(7);
  b.has_target = true;
  b.target_met = false;
  b.degradation = Degradation::kLatencyTarget;
  a.Merge(b);
  EXPECT_THAT(a.prompt_levels, ElementsAre(LevelRun{0, 5}));
  EXPECT_EQ(a.rows, 5);
  EXPECT_DOUBLE_EQ(a.flops, 500);
  EXPECT_EQ(a.queue_time, std::chrono::milliseconds(5));
  EXPECT_EQ(a.prefill_time, std::chrono::milliseconds(7));
  EXPECT_FALSE(a.target_met);
  EXPECT_EQ(a.degradation, Degradation::kLatencyTarget);
}

}  // namespace
}  // namespace nestor
