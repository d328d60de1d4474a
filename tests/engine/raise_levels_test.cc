#include "engine/raise_levels.h"

#include <memory>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
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

// With AVX2 eight rows take as long as their FLOPs, of which the coarse plane alone has half.
TEST_F(LevelRaiserTest, AResidualRowStaysWhereTheFinePlaneIsWorkOfItsOwn) {
  for (const CpuInstructionSet set : {CpuInstructionSet::kAvx2, CpuInstructionSet::kAvx512}) {
    if (set > BestInstructionSet()) continue;
    const auto backend = MakeCpuBackend({.num_threads = 1, .instruction_set = set});
    ASSERT_TRUE(backend.ok()) << backend.status();
    LevelRaiser raiser(&layers_, &levels_, DenseStorage::kPlanes, backend->get());
    std::vector<LevelRaiser::Entry> entries = {{.rows = 4, .level = kResidual, .may_run = kAll},
                                               {.rows = 4, .level = kFull, .may_run = kAll}};
    raiser.Raise(entries);
    EXPECT_EQ(entries[0].level, set == CpuInstructionSet::kAvx2 ? kResidual : kFull);
    EXPECT_EQ(entries[1].level, kFull);
  }
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

TEST_F(LevelRaiserTest, GarPairsShareNothingButWithTheirEqual) {
  std::vector<Level> levels;
  const auto add = [&](const char* ladder, FormAndRank first, FormAndRank second) {
    levels.push_back({.ladder = ladder, .profile = {first, second}});
  };
  add("prefix", {Form::kPrefix, 32}, {Form::kGar, 64});
  add("prefix", {Form::kGar, 64}, {Form::kGar, 64});
  add("prefix", {Form::kGar, 128}, {Form::kGar, 64});
  add("full", {}, {});
  LevelRaiser raiser(&layers_, &levels, DenseStorage::kPlanes, backend_.get());
  // [256, 256]: prefix 32 is 32 * (512 + 32), gar 64 is 64 * (256 + 192 + 28) + 1024, gar 128 is
  // 128 * (384 + 24) + 1024; [512, 256]: gar 64 is 64 * (256 + 448 + 44) + 2048.
  constexpr int64_t kPrefix32 = 17408, kGar64 = 31488, kGar128 = 53248, kSecond = 49920;
  EXPECT_EQ(raiser.BytesOf(1), kPrefix32 + kSecond);
  EXPECT_EQ(raiser.BytesOf(2), kGar64 + kSecond);
  EXPECT_EQ(raiser.BytesOf(3), kPrefix32 + kGar64 + kSecond);
  EXPECT_EQ(raiser.BytesOf(7), kPrefix32 + kGar64 + kGar128 + kSecond);
}

TEST(IsNestedTest, TheMiddlePlaneIsBetweenResidualRanksAndDense) {
  const FormAndRank middle{Form::kMiddle, 0}, residual{Form::kResidual, 64}, dense;
  EXPECT_TRUE(IsNested(residual, middle));
  EXPECT_TRUE(IsNested(middle, middle));
  EXPECT_TRUE(IsNested(middle, dense));
  EXPECT_FALSE(IsNested(middle, residual));
  EXPECT_FALSE(IsNested(middle, {Form::kResidual, 0}));
  EXPECT_FALSE(IsNested(dense, middle));
  EXPECT_FALSE(IsNested(middle, {Form::kPrefix, 64}));
  EXPECT_FALSE(IsNested({Form::kPrefix, 8}, middle));
}

// The planes of a layer are read once for all forms that have them.
TEST_F(LevelRaiserTest, ARowOfTheMiddlePlaneRunsWithTheDenseOneThatIsThere) {
  std::vector<Level> levels = levels_;
  levels.insert(levels.end() - 1,
                Level{.ladder = "residual", .profile = Profile(2, {Form::kMiddle, 0})});
  LevelRaiser raiser(&layers_, &levels, DenseStorage::kPlanes, backend_.get());
  const int middle = kFull;
  const int full = kFull + 1;
  std::vector<LevelRaiser::Entry> entries = {{.rows = 1, .level = kResidual, .may_run = kAll},
                                             {.rows = 1, .level = middle, .may_run = kAll},
                                             {.rows = 1, .level = full, .may_run = kAll}};
  raiser.Raise(entries);
  for (const LevelRaiser::Entry& entry : entries) EXPECT_EQ(entry.level, full);
  // One of its own costs less than the full level: nothing is raised beyond what is there.
  entries = {{.rows = 1, .level = kResidual, .may_run = kAll},
             {.rows = 1, .level = middle, .may_run = kAll}};
  raiser.Raise(entries);
  for (const LevelRaiser::Entry& entry : entries) EXPECT_EQ(entry.level, middle);
}

TEST(IsNestedTest, AGarPairIsAPrefixOfItsRank) {
  const FormAndRank prefix = {Form::kPrefix, 16}, gar = {Form::kGar, 16}, dense = {};
  EXPECT_TRUE(IsNested(prefix, gar));
  EXPECT_TRUE(IsNested(gar, prefix));
  EXPECT_TRUE(IsNested(gar, {Form::kGar, 24}));
  EXPECT_TRUE(IsNested(gar, dense));
  EXPECT_FALSE(IsNested(gar, {Form::kPrefix, 8}));
  EXPECT_FALSE(IsNested({Form::kPrefix, 24}, gar));
  EXPECT_FALSE(IsNested(dense, gar));
  EXPECT_FALSE(IsNested({Form::kResidual, 8}, gar));
  EXPECT_FALSE(IsNested(gar, {Form::kResidual, 24}));
  EXPECT_TRUE(IsNested({Form::kResidual, 8}, {Form::kResidual, 8}));
}

}  // namespace
}  // namespace nestor
