#include "compress/evaluate.h"

#include <algorithm>
#include <cmath>

#include "base/file.h"
#include "compress/pipeline.h"
#include "compress/report.h"
#include "engine/interpolate.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/testing/temporary_directory.h"
#include "tests/testing/tiny_checkpoint.h"

namespace nestor {
namespace {

using testing::DoubleNear;
using testing::ElementsAre;
using testing::HasSubstr;

TEST(SpearmanTest, MatchesHandComputedValues) {
  // Ranks 1 2 3 4 5 against 2 1 4 3 5: 1 - 6 * 4 / (5 * 24).
  EXPECT_NEAR(Spearman(std::vector<double>{1, 2, 3, 4, 5}, std::vector<double>{20, 10, 40, 30, 50}),
              0.8, 1e-12);
  EXPECT_NEAR(Spearman(std::vector<double>{1, 2, 3}, std::vector<double>{9, 4, 1}), -1, 1e-12);
}

TEST(SpearmanTest, TiesGetTheMeanOfTheirRanks) {
  // Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: covariance 4.5, variances 4.5 and 5.
  EXPECT_NEAR(Spearman(std::vector<double>{1, 2, 2, 3}, std::vector<double>{1, 2, 3, 4}),
              4.5 / std::sqrt(4.5 * 5.0), 1e-12);
  // Ranks 2, 2, 2, 4.5, 4.5 against 1, 2, 3, 4, 5: covariance 7.5, variances 7.5 and 10.
  EXPECT_NEAR(Spearman(std::vector<double>{0, 0, 0, 7, 7}, std::vector<double>{1, 2, 3, 4, 5}),
              7.5 / std::sqrt(7.5 * 10.0), 1e-12);
}

TEST(SpearmanTest, AConstantSideCorrelatesWithNothing) {
  EXPECT_EQ(Spearman(std::vector<double>{1, 1, 1}, std::vector<double>{1, 2, 3}), 0);
}

TEST(SplicedPairsTest, GoFromTheLineItselfToTheNextOne) {
  TokenSequences lines;
  for (int32_t i = 0; i < 201; ++i) lines.push_back({1, 10 + i, 10 + i, 10 + i, 10 + i, 2});
  const EvaluationSet set = SplicedPairs(lines);
  ASSERT_EQ(set.pairs.size(), 100u);
  std::vector<int> with_tail(7, 0);  // by tokens of the next line
  for (size_t i = 0; i < set.pairs.size(); ++i) {
    EXPECT_EQ(set.sequences[set.pairs[i].first], lines[2 * i]);
    const std::vector<int32_t>& splice = set.sequences[set.pairs[i].second];
    EXPECT_EQ(splice.front(), 1);
    EXPECT_EQ(splice.back(), 2);
    const auto own = std::count(splice.begin(), splice.end(), 10 + 2 * static_cast<int32_t>(i));
    const auto next = std::count(splice.begin(), splice.end(), 11 + 2 * static_cast<int32_t>(i));
    EXPECT_EQ(own + next, std::ssize(splice) - 2);
    ++with_tail[static_cast<size_t>(next)];
  }
  for (size_t next = 0; next <= 4; ++next) EXPECT_GT(with_tail[next], 10) << next;
}

TEST(PerplexityTest, IsTheExponentialOfTheMeanLossOverAllTokens) {
  const std::vector<WindowScore> windows = {{-2.0, 1}, {-4.0, 2}};
  EXPECT_NEAR(Perplexity(windows), std::exp(2.0), 1e-12);
}

TEST(MetricsOfTest, QualityIsAPerplexityRatioWithAPairedStandardError) {
  const EvaluationSet set;
  Measurement full{.windows = {{-10, 10}, {-20, 10}}, .similarities = {}};
  Measurement level{.windows = {{-11, 10}, {-23, 10}}, .similarities = {}};
  Measurement source{.windows = {{-9, 10}, {-20, 10}}, .similarities = {}};
  const LevelMetrics metrics = MetricsOf(set, level, full, &source);
  EXPECT_NEAR(metrics.quality, std::exp(-0.2), 1e-12);
  EXPECT_NEAR(*metrics.quality_vs_source, std::exp(-0.25), 1e-12);
  EXPECT_NEAR(*metrics.perplexity, std::exp(1.7), 1e-12);
  // Differences -1 and -3 of 10 tokens each: residuals 1 and -1 around -2.
  EXPECT_NEAR(*metrics.standard_error, std::exp(-0.2) * std::sqrt(2 * 2.0) / 20, 1e-12);
  EXPECT_FALSE(metrics.spearman.has_value());
}

TEST(MetricsOfTest, AnEncodersQualityIsItsShareOfTheFullLevelsSpearman) {
  EvaluationSet set;
  set.labels = {1, 2, 3, 4, 5};
  set.pairs.resize(5);
  const Measurement full{.windows = {}, .similarities = {0.1, 0.2, 0.3, 0.5, 0.4}};
  const Measurement level{.windows = {}, .similarities = {0.2, 0.1, 0.4, 0.3, 0.5}};
  const LevelMetrics metrics = MetricsOf(set, level, full, nullptr);
  EXPECT_NEAR(*metrics.spearman, 0.8, 1e-12);
  EXPECT_NEAR(metrics.quality, 0.8 / 0.9, 1e-12);
  EXPECT_GT(*metrics.standard_error, 0);
  EXPECT_FALSE(metrics.perplexity.has_value());

  set.labels.clear();
  const LevelMetrics unlabelled = MetricsOf(set, full, full, nullptr);
  EXPECT_NEAR(unlabelled.quality, 1, 1e-12);
  EXPECT_NEAR(*unlabelled.standard_error, 0, 1e-9);
}

TEST(ReadLabelledPairsTest, ReadsStsBenchmarkLinesAndNamesABadOne) {
  const TemporaryDirectory directory;
  ASSERT_TRUE(WriteTinyBert(directory.path() + "/bert").ok());
  const auto tokenizer = Tokenizer::Load(directory.path() + "/bert/tokenizer.json");
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  const auto spec = ReadModelSpec(directory.path() + "/bert");
  ASSERT_TRUE(spec.ok()) << spec.status();
  const std::string path = directory.path() + "/pairs.csv";
  const std::string good =
      "main\tMSRvid\t2012\t1\t4.75\ta cat \"sits\"\ta cat is\n"
      "main\tMSRvid\t2012\t2\t0.5\tone\ttwo\textra\n";
  ASSERT_TRUE(WriteFileAtomically(path, good).ok());
  const auto set = ReadLabelledPairs(path, **tokenizer, *spec);
  ASSERT_TRUE(set.ok()) << set.status();
  EXPECT_EQ(set->labels, (std::vector<double>{4.75, 0.5}));
  ASSERT_EQ(set->pairs.size(), 2u);
  EXPECT_EQ(set->pairs[1], (std::pair<size_t, size_t>{2, 3}));
  EXPECT_EQ(set->sequences.size(), 4u);

  ASSERT_TRUE(WriteFileAtomically(path, good + "main\tMSRvid\t2012\t3\tnone\ta\tb\n").ok());
  const absl::Status bad = ReadLabelledPairs(path, **tokenizer, *spec).status();
  EXPECT_EQ(bad.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(bad.message()), HasSubstr("pairs.csv: line 3"));
}

TEST(LevelReportTest, LeavesOutWhatWasNotMeasured) {
  Level level;
  level.ladder = "residual";
  level.relative_cost = 0.5;
  level.metrics.quality = 0.9;
  level.metrics.perplexity = 12.5;
  const nlohmann::json report = LevelReport({level});
  EXPECT_EQ(report[0]["form"], "residual");
  EXPECT_EQ(report[0]["level"], 0);
  EXPECT_EQ(report[0]["perplexity"], 12.5);
  EXPECT_FALSE(report[0].contains("spearman"));
  EXPECT_THAT(LevelTable({level}), HasSubstr("12.50"));
}

TEST(SweepTableTest, SetsInterpolatedLevelsApartBesideTheirEstimates) {
  const auto level = [](const std::string& ladder, double cost, double quality,
                        bool is_interpolated) {
    return Level{.ladder = ladder,
                 .relative_cost = cost,
                 .metrics = {.quality = quality},
                 .is_interpolated = is_interpolated};
  };
  const std::vector<Level> levels = {
      level("residual", 0.5, 0.25, false), level("residual", 0.6, 0.40, true),
      level("residual", 0.7, 0.36, false), level("residual", 0.85, 0.5, true),
      level("full", 1, 1, false)};
  // sqrt(0.25 * 0.36) and sqrt(0.36 * 1).
  EXPECT_THAT(EstimateQualities(levels),
              ElementsAre(0.25, DoubleNear(0.3, 1e-12), 0.36, DoubleNear(0.6, 1e-12), 1));
  const std::string table = SweepTable(levels);
  const size_t between = table.find("Interpolated levels");
  ASSERT_NE(between, std::string::npos);
  EXPECT_LT(table.find("0.3600"), between);
  EXPECT_GT(table.find("0.4000"), between);
  EXPECT_THAT(table, HasSubstr("Measured less estimated: +0.0000 on average, -0.1000 to +0.1000"));
  const nlohmann::json report = LevelReport(levels);
  EXPECT_FALSE(report[0].contains("interpolated"));
  EXPECT_EQ(report[1]["interpolated"], true);
  EXPECT_NEAR(report[1]["estimated_quality"].get<double>(), 0.3, 1e-12);
  EXPECT_THAT(SweepTable({level("full", 1, 1, false)}), HasSubstr("No level lies between"));
}

Level LevelWith(const std::string& ladder, double quality) {
  Level level;
  level.ladder = ladder;
  level.metrics.quality = quality;
  level.metrics.standard_error = 0.01;
  return level;
}

TEST(WithoutInversionsTest, LeavesOutALevelWorseThanACheaperOneButKeepsTies) {
  std::vector<std::string> notes;
  const std::vector<Level> kept = WithoutInversions(
      {LevelWith("residual", 0.90), LevelWith("residual", 0.895), LevelWith("residual", 0.88),
       LevelWith("prefix", 0.5), LevelWith("residual", 0.95), LevelWith("full", 1.0)},
      &notes);
  ASSERT_EQ(kept.size(), 5u);
  EXPECT_EQ(kept[1].metrics.quality, 0.895);
  EXPECT_EQ(kept[2].metrics.quality, 0.5);
  ASSERT_EQ(notes.size(), 1u);
  EXPECT_THAT(notes[0], HasSubstr("0.8800"));
}

}  // namespace
}  // namespace nestor
