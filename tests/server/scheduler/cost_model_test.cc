#include "server/scheduler/cost_model.h"

#include <array>

#include "gtest/gtest.h"

namespace nestor {
namespace {

using std::chrono::microseconds;
using std::chrono::milliseconds;

// Level 0 and 1 share a pass; level 2 is a prefix.
const Ladder kLadder = {{}, {}, {.shares_pass = false}};

CostModel MeasuredModel() {
  CostModel model(kLadder);
  model.AddMeasurement(0, 1, milliseconds(4));
  model.AddMeasurement(0, 16, milliseconds(7));
  model.AddMeasurement(1, 1, milliseconds(8));
  model.AddMeasurement(1, 16, milliseconds(11));
  model.AddMeasurement(2, 1, milliseconds(2));
  model.AddMeasurement(2, 16, milliseconds(17));
  return model;
}

double MillisecondsOf(Duration duration) { return SecondsOf(duration) * 1e3; }

TEST(CostModelTest, UnmeasuredModelPredictsNothing) {
  EXPECT_EQ(CostModel(kLadder).Predict(std::array<int64_t, 3>{1, 0, 0}), Duration::zero());
}

TEST(CostModelTest, MeasuredPointsAreReproduced) {
  const CostModel model = MeasuredModel();
  EXPECT_NEAR(MillisecondsOf(model.Predict(std::array<int64_t, 3>{1, 0, 0})), 4, 1e-5);
  EXPECT_NEAR(MillisecondsOf(model.Predict(std::array<int64_t, 3>{0, 16, 0})), 11, 1e-5);
}

TEST(CostModelTest, InterpolatesBetweenAndProlongsBehindThePoints) {
  const CostModel model = MeasuredModel();
  EXPECT_NEAR(MillisecondsOf(model.Predict(std::array<int64_t, 3>{6, 0, 0})), 5, 1e-5);
  EXPECT_NEAR(MillisecondsOf(model.Predict(std::array<int64_t, 3>{31, 0, 0})), 10, 1e-5);
}

TEST(CostModelTest, PointsMayComeInAnyOrder) {
  CostModel model(kLadder);
  model.AddMeasurement(0, 16, milliseconds(7));
  model.AddMeasurement(0, 1, milliseconds(4));
  EXPECT_NEAR(MillisecondsOf(model.Predict(std::array<int64_t, 3>{6, 0, 0})), 5, 1e-5);
}

TEST(CostModelTest, SharedPassCostsItsLargestLevelAndEachRowItsOwn) {
  // 8 ms for the pass of level 1, and 1 ms for the five rows behind the first.
  EXPECT_NEAR(MillisecondsOf(MeasuredModel().Predict(std::array<int64_t, 3>{5, 1, 0})), 9, 1e-5);
}

TEST(CostModelTest, PrefixLevelIsAPassOfItsOwn) {
  EXPECT_NEAR(MillisecondsOf(MeasuredModel().Predict(std::array<int64_t, 3>{1, 0, 1})), 6, 1e-5);
}

TEST(CostModelTest, RowsOfOneLevelAreAStepOfTheirOwn) {
  CostModel model = MeasuredModel();
  EXPECT_NEAR(MillisecondsOf(model.Predict(0, 16)), 7, 1e-5);
  EXPECT_NEAR(MillisecondsOf(model.Predict(2, 1)), 2, 1e-5);
  EXPECT_EQ(model.Predict(1, 0), Duration::zero());
  model.Observe(std::array<int64_t, 3>{0, 4, 0}, milliseconds(30));
  const double together = MillisecondsOf(model.Predict(std::array<int64_t, 3>{0, 5, 0}));
  EXPECT_GT(together, 9);
  EXPECT_NEAR(MillisecondsOf(model.Predict(1, 5)), together, 1e-5);
}

TEST(CostModelTest, LearnsThatAMachineGotSlower) {
  CostModel model = MeasuredModel();
  const std::array<int64_t, 3> rows = {1, 0, 0};
  for (int i = 0; i < 100; ++i) model.Observe(rows, milliseconds(8));
  EXPECT_NEAR(MillisecondsOf(model.Predict(rows)), 8, 0.1);
  // Levels that did not run are slower too, since the machine is the same.
  EXPECT_GT(model.Predict(std::array<int64_t, 3>{0, 1, 0}), milliseconds(10));
}

TEST(CostModelTest, OneHiccupMovesAPredictionByLittle) {
  CostModel model = MeasuredModel();
  const std::array<int64_t, 3> rows = {1, 0, 0};
  model.Observe(rows, std::chrono::seconds(10));
  EXPECT_LT(model.Predict(rows), microseconds(5500));
}

}  // namespace
}  // namespace nestor
