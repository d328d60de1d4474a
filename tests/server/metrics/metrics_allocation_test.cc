#include "gtest/gtest.h"
#include "server/metrics/metrics.h"
#include "tests/testing/allocation_counter.h"

namespace nestor {
namespace {

TEST(MetricsAllocationTest, WhatAStepReportsDoesNotAllocate) {
  ServedModel model;
  model.levels.resize(2);
  Metrics metrics(model);
  Events& events = metrics;
  const int64_t before = NumAllocations();
  for (int step = 1; step <= 100; ++step) {
    events.OnStep({.rows = step,
                   .actual = std::chrono::microseconds(step),
                   .predicted = std::chrono::microseconds(2 * step)});
    events.OnSpeculation({.num_drafted = 4, .num_accepted = 2});
    events.OnTokens(step % 2, TokenKind::kCompletion, 1);
    events.OnFirstToken(std::chrono::milliseconds(step));
    events.OnNextToken(std::chrono::milliseconds(step));
    events.OnLoad({.num_running = step, .num_waiting = 1, .kv_cache_usage = 0.5});
  }
  EXPECT_EQ(NumAllocations() - before, 0);
  // The count sees what this program allocates.
  EXPECT_FALSE(metrics.Text().empty());
  EXPECT_GT(NumAllocations() - before, 0);
}

}  // namespace
}  // namespace nestor
