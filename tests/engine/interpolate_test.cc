#include "engine/interpolate.h"

#include <algorithm>
#include <cmath>
#include <random>

#include "engine/engine.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "tests/testing/temporary_directory.h"
#include "tests/testing/tiny_nested_model.h"

namespace nestor {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

StoredLayer LayerOf(int64_t rank, bool has_middle) {
  return {.spec = {.name = "layer", .out = 96, .in = 128}, .rank = rank, .has_middle = has_middle};
}

std::vector<FormAndRank> ChoicesOf(const std::vector<PricedChoice>& priced) {
  std::vector<FormAndRank> choices;
  for (const PricedChoice& choice : priced) choices.push_back(choice.choice);
  return choices;
}

std::vector<FormAndRank> Between(const FormAndRank& low, const FormAndRank& high,
                                 int64_t stored_rank, bool has_middle = false) {
  const std::string ladder = low.form == Form::kPrefix ? "prefix" : "residual";
  return ChoicesOf(ChoicesBetween(LayerOf(stored_rank, has_middle), ladder, low, high));
}

TEST(ChoicesBetweenTest, AreTheRanksBetweenTwoOfOneForm) {
  EXPECT_THAT(Between({Form::kResidual, 0}, {Form::kResidual, 20}, 24),
              ElementsAre(FormAndRank{Form::kResidual, 0}, FormAndRank{Form::kResidual, 8},
                          FormAndRank{Form::kResidual, 16}, FormAndRank{Form::kResidual, 20}));
  EXPECT_THAT(Between({Form::kPrefix, 12}, {Form::kPrefix, 16}, 24),
              ElementsAre(FormAndRank{Form::kPrefix, 12}, FormAndRank{Form::kPrefix, 16}));
  EXPECT_THAT(Between({Form::kPrefix, 16}, {Form::kPrefix, 16}, 24),
              ElementsAre(FormAndRank{Form::kPrefix, 16}));
}

TEST(ChoicesBetweenTest, EndDenseAfterWhatIsStoredAndCheaper) {
  EXPECT_THAT(Between({Form::kResidual, 8}, {}, 18),
              ElementsAre(FormAndRank{Form::kResidual, 8}, FormAndRank{Form::kResidual, 16},
                          FormAndRank{Form::kResidual, 18}, FormAndRank{}));
  // 96 * 128 / (96 + 128) = 54.9: more components would cost more than the dense layer.
  EXPECT_THAT(
      Between({Form::kPrefix, 40}, {}, 64),
      ElementsAre(FormAndRank{Form::kPrefix, 40}, FormAndRank{Form::kPrefix, 48}, FormAndRank{}));
}

TEST(ChoicesBetweenTest, TheMiddlePlaneComesAfterTheRanksThatAreCheaper) {
  // 8.5 r (96 + 128) bits reach the 2 * 96 * 128 of the plane between ranks 8 and 16.
  const FormAndRank low = {Form::kResidual, 0};
  const FormAndRank step = {Form::kResidual, 8};
  const FormAndRank middle = {Form::kMiddle, 0};
  EXPECT_THAT(Between(low, {}, 64, true), ElementsAre(low, step, middle, FormAndRank{}));
  EXPECT_THAT(Between(low, middle, 64, true), ElementsAre(low, step, middle));
  EXPECT_THAT(Between(middle, middle, 64, true), ElementsAre(middle));
  EXPECT_THAT(Between(middle, {}, 64, true), ElementsAre(middle, FormAndRank{}));
}

TEST(ChoicesBetweenTest, AGarPairGoesAllTheWayOrStays) {
  const FormAndRank pair = {Form::kGar, 40};
  const FormAndRank larger = {Form::kGar, 64};
  const auto between = [](const FormAndRank& low, const FormAndRank& high) {
    return ChoicesOf(ChoicesBetween(LayerOf(0, /*has_middle=*/false), "prefix", low, high));
  };
  EXPECT_THAT(between(pair, larger), ElementsAre(pair, larger));
  EXPECT_THAT(between(pair, {}), ElementsAre(pair, FormAndRank{}));
  EXPECT_THAT(between(pair, pair), ElementsAre(pair));
  const FormAndRank prefix = {Form::kPrefix, 16};
  EXPECT_THAT(between(prefix, pair), ElementsAre(prefix, pair));
}

TEST(ChoicesBetweenTest, ADenseLayerStaysDense) {
  EXPECT_THAT(Between({}, {}, 64), ElementsAre(FormAndRank{}));
}

TEST(InterpolateProfileTest, LayersGoEquallyFarAndTheRestFillsTheBudget) {
  const auto residual = [](int64_t rank) { return FormAndRank{Form::kResidual, rank}; };
  // One layer of four small steps, one of a single large step, one that cannot move.
  const std::vector<std::vector<PricedChoice>> choices = {
      {{residual(0), 10}, {residual(8), 20}, {residual(16), 30}, {residual(24), 40}, {{}, 50}},
      {{residual(0), 100}, {{}, 140}},
      {{residual(8), 5}}};
  const auto ranks = [&](int64_t budget) {
    std::vector<int64_t> values;  // -1: dense
    for (const FormAndRank& layer : InterpolateProfile(choices, budget)) {
      values.push_back(layer.form == Form::kDense ? -1 : layer.rank);
    }
    return values;
  };
  EXPECT_THAT(ranks(0), ElementsAre(0, 0, 8));
  EXPECT_THAT(ranks(115), ElementsAre(0, 0, 8));
  EXPECT_THAT(ranks(125), ElementsAre(8, 0, 8));
  EXPECT_THAT(ranks(135), ElementsAre(16, 0, 8));
  // Half-way the large step is due, but does not fit yet.
  EXPECT_THAT(ranks(174), ElementsAre(-1, 0, 8));
  EXPECT_THAT(ranks(175), ElementsAre(16, -1, 8));
  EXPECT_THAT(ranks(194), ElementsAre(24, -1, 8));
  EXPECT_THAT(ranks(195), ElementsAre(-1, -1, 8));
}

TEST(InterpolateProfileTest, OfStepsDueTogetherTheLargestGoesFirstOrTheyWait) {
  const auto gar = [](int64_t rank) { return FormAndRank{Form::kGar, rank}; };
  const auto prefix = [](int64_t rank) { return FormAndRank{Form::kPrefix, rank}; };
  // Three pairs that have a single step to make, and plain factors that have two.
  const std::vector<std::vector<PricedChoice>> choices = {
      {{gar(8), 10}, {{}, 20}},
      {{gar(16), 10}, {{}, 60}},
      {{gar(8), 10}, {gar(16), 20}},
      {{prefix(8), 10}, {prefix(16), 15}, {{}, 20}}};
  const auto steps = [&](int64_t budget) {
    std::vector<int64_t> values;  // by layer
    const Profile profile = InterpolateProfile(choices, budget);
    for (size_t i = 0; i < choices.size(); ++i) {
      const auto at =
          std::find_if(choices[i].begin(), choices[i].end(),
                       [&](const PricedChoice& priced) { return priced.choice == profile[i]; });
      values.push_back(at - choices[i].begin());
    }
    return values;
  };
  EXPECT_THAT(steps(45), ElementsAre(0, 0, 0, 1));
  // The other pairs' steps would fit, but the second's is due with them, and is larger. What is due
  // later goes on.
  EXPECT_THAT(steps(70), ElementsAre(0, 0, 0, 2));
  EXPECT_THAT(steps(95), ElementsAre(0, 1, 0, 1));
  EXPECT_THAT(steps(105), ElementsAre(1, 1, 0, 1));
  EXPECT_THAT(steps(110), ElementsAre(1, 1, 0, 2));
  EXPECT_THAT(steps(120), ElementsAre(1, 1, 1, 2));
}

class InterpolatedLevelsTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    directory_ = new TemporaryDirectory();
    // Random weights of which no level that stores the largest ranks measures worse than a cheaper
    // one, and is left out.
    ASSERT_TRUE(
        WriteTinyNestedModel(directory_->path(), {.num_blocks = 3, .hidden = 96, .seed = 6}).ok());
  }
  static void TearDownTestSuite() {
    delete directory_;
    directory_ = nullptr;
  }
  void SetUp() override {
    auto model = NestedModel::Open(directory_->path() + "/nested");
    ASSERT_TRUE(model.ok()) << model.status();
    model_ = *std::move(model);
    // Two levels of each ladder, as far apart as the stored factors allow, with qualities to
    // interpolate between.
    std::vector<Level> levels;
    for (const auto& [ladder, form] :
         {std::pair("residual", Form::kResidual), std::pair("prefix", Form::kPrefix)}) {
      Level low{.ladder = ladder, .metrics = {.quality = 0.5}};
      Level high{.ladder = ladder, .metrics = {.quality = 0.8}};
      for (size_t i = 0; i < model_->layers().size(); ++i) {
        const int64_t stored = model_->StoredRank(i, form);
        const FormAndRank dense;
        const bool is_dense = form == Form::kPrefix && stored == 0;
        low.profile.push_back(
            is_dense ? dense
                     : FormAndRank{form, form == Form::kPrefix ? std::min<int64_t>(8, stored) : 0});
        high.profile.push_back(is_dense ? dense : FormAndRank{form, stored});
      }
      ASSERT_NE(low.profile, high.profile) << ladder;
      levels.push_back(std::move(low));
      levels.push_back(std::move(high));
    }
    levels.push_back(model_->levels().back());
    levels.back().metrics = {.quality = 1};
    ASSERT_TRUE(model_->SetLevels(std::move(levels)).ok());
  }

  std::string ErrorOf(const std::vector<std::string>& wanted) {
    const absl::Status status = AddInterpolatedLevels(wanted, model_.get());
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    return std::string(status.message());
  }

  static TemporaryDirectory* directory_;
  std::unique_ptr<NestedModel> model_;
};
TemporaryDirectory* InterpolatedLevelsTest::directory_ = nullptr;

TEST_F(InterpolatedLevelsTest, StandNestedBetweenTheirNeighboursAtTheirCost) {
  const std::vector<Level> stored = model_->levels();
  const auto levels = WithSweptLevels(*model_, 12);
  ASSERT_TRUE(levels.ok()) << levels.status();
  ASSERT_GE(levels->size(), stored.size() + 8);
  // SetLevels checks nesting and the order along each ladder.
  ASSERT_TRUE(model_->SetLevels(*levels).ok());
  size_t next_stored = 0;
  for (size_t i = 0; i < levels->size(); ++i) {
    const Level& level = model_->levels()[i];
    if (!level.is_interpolated) {
      EXPECT_EQ(level.profile, stored[next_stored++].profile);
      continue;
    }
    const Level& below = model_->levels()[i - 1];
    ASSERT_EQ(level.ladder, below.ladder);
    EXPECT_GT(RelativeCostOnLadder(level), RelativeCostOnLadder(below));
    // What the estimate was made with is what SetLevels counts.
    EXPECT_EQ(level.cost.weight_bytes, (*levels)[i].cost.weight_bytes);
    EXPECT_EQ(level.cost.flops, (*levels)[i].cost.flops);
    EXPECT_GE(level.metrics.quality, below.metrics.quality);
    EXPECT_FALSE(level.metrics.perplexity.has_value());
  }
  EXPECT_EQ(next_stored, stored.size());
}

TEST_F(InterpolatedLevelsTest, QualityIsLinearInLogarithmOverCost) {
  const double low = RelativeCostOnLadder(model_->levels()[2]);
  const double high = RelativeCostOnLadder(model_->levels()[3]);
  ASSERT_EQ(model_->levels()[2].ladder, "prefix");
  const std::string wanted = "prefix:" + std::to_string(0.5 * (low + high));
  ASSERT_TRUE(AddInterpolatedLevels({wanted}, model_.get()).ok());
  const Level& level = model_->levels()[3];
  ASSERT_TRUE(level.is_interpolated);
  EXPECT_LE(level.relative_flops, 0.5 * (low + high) + 1e-6);
  EXPECT_GT(level.relative_flops, 0.5 * (low + high) - 0.02);
  const double share = (level.relative_flops - low) / (high - low);
  EXPECT_NEAR(std::log(level.metrics.quality),
              std::log(0.5) + share * (std::log(0.8) - std::log(0.5)), 1e-12);
}

TEST_F(InterpolatedLevelsTest, RunAtTheCostThatTheyState) {
  const auto levels = WithSweptLevels(*model_, 3);
  ASSERT_TRUE(levels.ok()) << levels.status();
  ASSERT_TRUE(model_->SetLevels(*levels).ok());
  auto backend = MakeCpuBackend({.num_threads = 1});
  ASSERT_TRUE(backend.ok()) << backend.status();
  const auto engine = Engine::Create(std::move(model_), *std::move(backend), {});
  ASSERT_TRUE(engine.ok()) << engine.status();
  const std::vector<int32_t> tokens = {7};
  int interpolated = 0;
  for (size_t i = 0; i < levels->size(); ++i) {
    if (!(*levels)[i].is_interpolated) continue;
    ++interpolated;
    const SequenceId sequence = *(*engine)->AddSequence(1);
    const auto result = (*engine)->Step({{{.sequence = sequence,
                                           .tokens = tokens,
                                           .level = static_cast<int>(i),
                                           .output = StepEntry::Output::kLastLogits}}});
    ASSERT_TRUE(result.ok()) << result.status();
    const auto stated = static_cast<double>((*levels)[i].cost.weight_bytes);
    EXPECT_NEAR(static_cast<double>(result->executed.weight_bytes), stated, 0.01 * stated);
    // The backend counts linear layers.
    const int64_t attention = AttentionFlops((*engine)->model().spec(), 128);
    const auto flops = static_cast<double>((*levels)[i].cost.flops - attention);
    EXPECT_NEAR(static_cast<double>(result->executed.flops), flops, 0.01 * flops);
    (*engine)->RemoveSequence(sequence);
  }
  EXPECT_GE(interpolated, 3);
}

TEST_F(InterpolatedLevelsTest, WhatCannotBeIsNamed) {
  EXPECT_THAT(ErrorOf({"0.9"}), HasSubstr("say which, such as residual:0.9"));
  EXPECT_THAT(ErrorOf({"mixed:0.9"}), HasSubstr("no such ladder, only residual and prefix"));
  EXPECT_THAT(ErrorOf({"prefix:0.01"}), HasSubstr("prefix:0.01: must be between 0."));
  EXPECT_THAT(ErrorOf({"prefix:0.95", "prefix:0.95"}), HasSubstr("prefix:0.95: is there twice"));
  for (const std::string wanted :
       {"prefix:1", "prefix:", ":0.5", "0", "-0.5", "nan", "prefix:0.5x"}) {
    EXPECT_THAT(ErrorOf({wanted}), HasSubstr("was '" + wanted + "'"));
  }
  const double cost = model_->levels()[2].relative_flops;
  EXPECT_THAT(ErrorOf({"prefix:" + std::to_string(cost + 1e-5)}), HasSubstr("no level of its own"));
  EXPECT_EQ(model_->levels().size(), 5u);
}

TEST_F(InterpolatedLevelsTest, AModelWithoutALadderHasNothingToInterpolate) {
  auto source = NestedModel::Open(directory_->path() + "/llama");
  ASSERT_TRUE(source.ok()) << source.status();
  const absl::Status status = AddInterpolatedLevels({"0.7"}, source->get());
  EXPECT_THAT(std::string(status.message()), HasSubstr("has the full level only"));
  EXPECT_EQ(WithSweptLevels(**source, 3).status().code(), absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace nestor
