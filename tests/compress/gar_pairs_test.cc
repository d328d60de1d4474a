#include "compress/gar_pairs.h"

#include <memory>
#include <random>
#include <string>
#include <vector>

#include "compress/decompose.h"
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
    pairs_ = std::make_unique<GarPairs>(layers_, DenseStorage::kPlanes, spill_.get());
    pairs_->SetLevels({true, true, true, true, false});
    std::mt19937_64 random(7);
    std::normal_distribution<float> normal;
    for (float& weight : weights_) weight = normal(random);
    for (int64_t i = 0; i < kSize; ++i) moment_[static_cast<size_t>(i * kSize + i)] = 1;
  }

  // Fits what the levels want; pairs of the ranks in `bad` lose twice as much as plain factors.
  void Fit(const std::set<int64_t>& bad) {
    const absl::StatusOr<Decomposition> decomposition =
        Decompose(weights_, kSize, kSize, moment_, 48);
    ASSERT_TRUE(decomposition.ok()) << decomposition.status();
    const auto fitter = [&](int64_t rank) -> absl::StatusOr<GarFit> {
      fitted_.push_back(rank);
      absl::StatusOr<GarFit> fit = FitGar(*decomposition, weights_, kSize, kSize, moment_, rank);
      if (fit.ok()) fit->error = (bad.contains(rank) ? 2 : 1) * fit->plain_error;
      return fit;
    };
    ASSERT_TRUE(pairs_->Fit(0, pairs_->RanksOf(levels_, 0), fitter).ok());
    pairs_->Apply(&levels_);
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
  std::unique_ptr<GarPairs> pairs_;
  std::vector<Level> levels_ = {LevelOf({Form::kPrefix, 8}), LevelOf({Form::kPrefix, 24}),
                                LevelOf({Form::kPrefix, 40}), LevelOf({Form::kPrefix, 48}),
                                LevelOf({})};
  std::vector<int64_t> fitted_;
};

TEST_F(GarPairsTest, LevelsRunPairsFromAQuarterOfTheRankOn) {
  EXPECT_FALSE(pairs_->is_settled(0));
  Fit({});
  EXPECT_TRUE(pairs_->is_settled(0));
  EXPECT_THAT(Choices(),
              ElementsAre(FormAndRank{Form::kPrefix, 8}, FormAndRank{Form::kGar, 24},
                          FormAndRank{Form::kGar, 40}, FormAndRank{Form::kGar, 48}, FormAndRank{}));
  EXPECT_THAT(pairs_->ranks()[0], ElementsAre(24, 40, 48));
  EXPECT_EQ(pairs_->num_substitutes(), 0);
  EXPECT_TRUE(spill_->Read("layer.gar.24.rows").ok());
}

TEST_F(GarPairsTest, PlainFactorsTakeThePlaceOfAPairThatLosesTooMuch) {
  Fit({24});
  EXPECT_THAT(Choices(),
              ElementsAre(FormAndRank{Form::kPrefix, 8}, FormAndRank{Form::kPrefix, 24},
                          FormAndRank{Form::kGar, 40}, FormAndRank{Form::kGar, 48}, FormAndRank{}));
  EXPECT_THAT(pairs_->ranks()[0], ElementsAre(40, 48));
  EXPECT_EQ(pairs_->num_substitutes(), 1);
}

TEST_F(GarPairsTest, AboveBreakEvenTheDenseLayerDoesThereAndOnAllLevelsAbove) {
  Fit({40});
  EXPECT_THAT(Choices(), ElementsAre(FormAndRank{Form::kPrefix, 8}, FormAndRank{Form::kGar, 24},
                                     FormAndRank{}, FormAndRank{}, FormAndRank{}));
  EXPECT_THAT(fitted_, ElementsAre(24, 40));  // no other would be nested
}

TEST_F(GarPairsTest, LevelsThatMayNotRunPairsKeepPlainFactors) {
  pairs_->SetLevels({true, false, true, false, false});
  EXPECT_THAT(pairs_->RanksOf(levels_, 0), ElementsAre(40));
  EXPECT_EQ(pairs_->FinalChoice(1, 0, {Form::kPrefix, 24}), (FormAndRank{Form::kPrefix, 24}));
  EXPECT_EQ(pairs_->FinalChoice(2, 0, {Form::kPrefix, 24}), (FormAndRank{Form::kGar, 24}));
}

TEST_F(GarPairsTest, ReturnsWhatTheFitterReturns) {
  const absl::Status failed = pairs_->Fit(
      0, {24}, [](int64_t) -> absl::StatusOr<GarFit> { return absl::InternalError("LAPACK"); });
  EXPECT_EQ(failed.code(), absl::StatusCode::kInternal);
}

}  // namespace
}  // namespace nestor
