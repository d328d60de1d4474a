#include "compress/gar_pairs.h"

#include <cstdint>
#include <memory>
#include <random>
#include <set>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "compress/decompose.h"
#include "compress/export.h"
#include "compress/gar.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/testing/temporary_directory.h"

namespace nestor {
namespace {

using ::testing::ElementsAre;

constexpr int64_t kSize = 64;  // plain factors cost less than the dense layer below a rank of 32

Level LevelOf(FormAndRank choice) {
  Level level;
  level.ladder = choice.form == Form::kDense ? "full" : "prefix";
  level.profile = {choice};
  return level;
}

// Levels of ranks 8, 24, 40 and 48 of one layer, and the full one.
class GarPairsTest : public ::testing::Test {
 protected:
  void SetUp() override {
    absl::StatusOr<std::unique_ptr<TensorSpill>> spill =
        TensorSpill::Create(directory_.path() + "/parts.spill");
    ASSERT_TRUE(spill.ok()) << spill.status();
    spill_ = *std::move(spill);
    pairs_.SetMayBeGar({true, true, true, true, false});
    std::mt19937_64 random(7);
    std::normal_distribution<float> normal;
    for (float& weight : weights_) weight = normal(random);
    for (int64_t i = 0; i < kSize; ++i) moment_[static_cast<size_t>(i * kSize + i)] = 1;
  }

  // Fits what the levels want and lets them run it. A pair loses one and a half times what plain
  // factors do, which is as much as it may, and those of the ranks in `bad` a little more.
  void FitAndApply(const std::set<int64_t>& bad) {
    const absl::StatusOr<Decomposition> decomposition =
        Decompose(weights_, kSize, kSize, moment_, 48);
    ASSERT_TRUE(decomposition.ok()) << decomposition.status();
    const auto fitter = [&](int64_t rank) -> absl::StatusOr<GarFit> {
      fitted_.push_back(rank);
      absl::StatusOr<GarFit> fit = FitGar(*decomposition, weights_, kSize, kSize, moment_, rank);
      if (!fit.ok()) return fit;
      fit->plain_error = 0.5;
      fit->error = bad.contains(rank) ? 0.76 : 0.75;
      return fit;
    };
    const absl::Status status = pairs_.Fit(0, pairs_.WantedRanks(levels_, 0), fitter, spill_.get());
    ASSERT_TRUE(status.ok()) << status;
    pairs_.Apply(&levels_);
  }

  std::vector<FormAndRank> Choices() const {
    std::vector<FormAndRank> choices;
    for (const Level& level : levels_) choices.push_back(level.profile[0]);
    return choices;
  }

  const TemporaryDirectory directory_;
  const std::vector<LinearSpec> layers_ = {{.name = "layer", .out = kSize, .in = kSize}};
  std::vector<float> weights_ = std::vector<float>(kSize * kSize);
  std::vector<double> moment_ = std::vector<double>(kSize * kSize);
  std::unique_ptr<TensorSpill> spill_;
  GarPairs pairs_ = GarPairs(layers_, DenseStorage::kPlanes);
  std::vector<Level> levels_ = {LevelOf({Form::kPrefix, 8}), LevelOf({Form::kPrefix, 24}),
                                LevelOf({Form::kPrefix, 40}), LevelOf({Form::kPrefix, 48}),
                                LevelOf({})};
  std::vector<int64_t> fitted_;
};

TEST_F(GarPairsTest, LevelsRunPairsWhereTheseAreCheaper) {
  EXPECT_FALSE(pairs_.is_settled(0));
  FitAndApply({});
  EXPECT_TRUE(pairs_.is_settled(0));
  EXPECT_THAT(Choices(),
              ElementsAre(FormAndRank{Form::kPrefix, 8}, FormAndRank{Form::kGar, 24},
                          FormAndRank{Form::kGar, 40}, FormAndRank{Form::kGar, 48}, FormAndRank{}));
  EXPECT_THAT(pairs_.fitted_ranks()[0], ElementsAre(24, 40, 48));
  EXPECT_EQ(pairs_.num_substitutes(), 0);
  EXPECT_TRUE(spill_->Read("layer.gar.24.rows").ok());
}

TEST_F(GarPairsTest, PlainFactorsTakeThePlaceOfAPairThatLosesTooMuch) {
  FitAndApply({24});
  EXPECT_THAT(Choices(),
              ElementsAre(FormAndRank{Form::kPrefix, 8}, FormAndRank{Form::kPrefix, 24},
                          FormAndRank{Form::kGar, 40}, FormAndRank{Form::kGar, 48}, FormAndRank{}));
  EXPECT_THAT(pairs_.fitted_ranks()[0], ElementsAre(40, 48));
  EXPECT_EQ(pairs_.num_substitutes(), 1);
}

TEST_F(GarPairsTest, AboveBreakEvenTheDenseLayerDoesThereAndOnAllLevelsAbove) {
  FitAndApply({40});
  EXPECT_THAT(Choices(), ElementsAre(FormAndRank{Form::kPrefix, 8}, FormAndRank{Form::kGar, 24},
                                     FormAndRank{}, FormAndRank{}, FormAndRank{}));
  EXPECT_THAT(fitted_, ElementsAre(24, 40));  // no other would be nested
}

TEST_F(GarPairsTest, LevelsThatMayNotRunPairsKeepPlainFactors) {
  pairs_.SetMayBeGar({true, false, true, false, false});
  FitAndApply({});
  EXPECT_THAT(fitted_, ElementsAre(40));
  EXPECT_THAT(Choices(), ElementsAre(FormAndRank{Form::kPrefix, 8}, FormAndRank{Form::kPrefix, 24},
                                     FormAndRank{Form::kGar, 40}, FormAndRank{Form::kPrefix, 48},
                                     FormAndRank{}));
}

TEST_F(GarPairsTest, ALevelWithoutPairsIsDenseAboveOneThatHadToBe) {
  pairs_.SetMayBeGar({true, false, true, false, false});
  FitAndApply({40});
  EXPECT_THAT(Choices(), ElementsAre(FormAndRank{Form::kPrefix, 8}, FormAndRank{Form::kPrefix, 24},
                                     FormAndRank{}, FormAndRank{}, FormAndRank{}));
}

TEST_F(GarPairsTest, ReturnsWhatTheFitterReturns) {
  const auto fitter = [](int64_t) -> absl::StatusOr<GarFit> {
    return absl::InternalError("LAPACK");
  };
  EXPECT_EQ(pairs_.Fit(0, {24}, fitter, spill_.get()).code(), absl::StatusCode::kInternal);
}

}  // namespace
}  // namespace nestor
