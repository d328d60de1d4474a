#include "engine/raise_levels.h"

#include <memory>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/reference/reference_backend.h"

namespace nestor {
namespace {

constexpr int kCoarse = 0, kResidual = 1, kSmallPrefix = 2, kPrefix = 3, kFull = 4;

class LevelRaiserTest : public ::testing::Test {
 protected:
  static std::vector<Level> MakeLevels() {
    std::vector<Level> levels;
    const auto add = [&](const char* ladder, Form form, int64_t rank, double quality) {
      Level level = {.ladder = ladder, .profile = Profile(2, {form, rank})};
      level.metrics.quality = quality;
      levels.push_back(level);
    };
    add("residual", Form::kResidual, 0, 0.7);
    add("residual", Form::kResidual, 16, 0.9);
    add("prefix", Form::kPrefix, 32, 0.6);
    add("prefix", Form::kPrefix, 64, 0.8);
    add("full", Form::kDense, 0, 1.0);
    return levels;
  }

  // The levels that entries of {rows, level} run at, where all of them may run `may_run`.
  std::vector<int> Raised(const std::vector<std::pair<int64_t, int>>& asked, LevelSet may_run) {
    std::vector<LevelRaiser::Entry> entries;
    for (const auto& [rows, level] : asked)
      entries.push_back({.rows = rows, .level = level, .may_run = may_run});
    raiser_.Raise(entries);
    std::vector<int> result;
    for (const LevelRaiser::Entry& entry : entries) result.push_back(entry.level);
    return result;
  }

  static constexpr LevelSet kAll = ~LevelSet{0};
  const std::vector<LinearSpec> layers_{LinearSpec{.out = 256, .in = 256},
                                        LinearSpec{.out = 512, .in = 256}};
  const std::vector<Level> levels_ = MakeLevels();
  // Its step costs are the defaults: 0.1 bytes a FLOP.
  const std::unique_ptr<Backend> backend_ = MakeReferenceBackend({});
  LevelRaiser raiser_{&layers_, &levels_, DenseStorage::kPlanes, backend_.get()};
};

TEST_F(LevelRaiserTest, AResidualRowRunsWithTheDenseOneThatIsThere) {
  EXPECT_EQ(Raised({{1, kResidual}, {1, kFull}}, kAll), (std::vector<int>{kFull, kFull}));
  EXPECT_EQ(Raised({{20, kResidual}, {1, kFull}}, kAll), (std::vector<int>{kFull, kFull}));
}

TEST_F(LevelRaiserTest, APrefixRowDoesWhereItsBytesWeighMoreThanItsFlops) {
  EXPECT_EQ(Raised({{1, kSmallPrefix}, {1, kFull}}, kAll), (std::vector<int>{kFull, kFull}));
  EXPECT_EQ(Raised({{200, kSmallPrefix}, {1, kFull}}, kAll),
            (std::vector<int>{kSmallPrefix, kFull}));
}

TEST_F(LevelRaiserTest, OnlyLevelsOfTheStepAndOfTheEntrysSetCount) {
  EXPECT_EQ(Raised({{1, kCoarse}, {1, kCoarse}}, kAll), (std::vector<int>{kCoarse, kCoarse}));
  EXPECT_EQ(Raised({{1, kResidual}, {1, kFull}}, 0), (std::vector<int>{kResidual, kFull}));
  EXPECT_EQ(Raised({{1, kResidual}, {1, kFull}}, SetOf(kResidual)),
            (std::vector<int>{kResidual, kFull}));
}

TEST_F(LevelRaiserTest, NoRowGetsAWorseLevel) {
  // A residual row of little quality would gain by a good prefix level, not the other way round.
  for (int low = 0; low < kFull; ++low) {
    for (int other = 0; other <= kFull; ++other) {
      const std::vector<int> raised = Raised({{1, low}, {3, other}}, kAll);
      EXPECT_GE(levels_[static_cast<size_t>(raised[0])].metrics.quality,
                levels_[static_cast<size_t>(low)].metrics.quality);
      EXPECT_GE(levels_[static_cast<size_t>(raised[1])].metrics.quality,
                levels_[static_cast<size_t>(other)].metrics.quality);
    }
  }
}

TEST_F(LevelRaiserTest, BytesOfASetCountEveryPartOnce) {
  const auto bytes = [&](int level) { return raiser_.BytesOf(SetOf(level)); };
  // The larger prefix holds the smaller one; the coarse plane is part of the dense form.
  EXPECT_EQ(raiser_.BytesOf(SetOf(kSmallPrefix) | SetOf(kPrefix)), bytes(kPrefix));
  EXPECT_EQ(raiser_.BytesOf(SetOf(kCoarse) | SetOf(kFull)), bytes(kFull));
  EXPECT_EQ(raiser_.BytesOf(SetOf(kResidual) | SetOf(kFull)),
            bytes(kFull) + bytes(kResidual) - bytes(kCoarse));
  EXPECT_EQ(raiser_.BytesOf(SetOf(kPrefix) | SetOf(kFull)), bytes(kPrefix) + bytes(kFull));
}

}  // namespace
}  // namespace nestor
