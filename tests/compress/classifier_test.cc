// Sequence classifiers: labels that are read, accuracy that is measured, artifacts that keep it.

#include <algorithm>
#include <cmath>
#include <random>

#include "base/file.h"
#include "compress/divergence.h"
#include "compress/evaluate.h"
#include "compress/labelled_texts.h"
#include "compress/pipeline.h"
#include "compress/report.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "tests/testing/temporary_directory.h"

namespace nestor {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

const std::string kFixture = NESTOR_SOURCE_DIR "/tests/data/transformers/tiny_bert_classifier";

std::string RandomText(int lines, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::string text;
  for (int i = 0; i < lines; ++i) {
    for (int letter = 0; letter < 20; ++letter) {
      text += letter % 5 == 4 ? ' ' : static_cast<char>('a' + random() % 26);
    }
    text += '\n';
  }
  return text;
}

class LabelledTextsTest : public testing::Test {
 protected:
  void SetUp() override {
    auto tokenizer = Tokenizer::Load(kFixture + "/tokenizer.json");
    ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
    tokenizer_ = *std::move(tokenizer);
    auto spec = ReadModelSpec(kFixture);
    ASSERT_TRUE(spec.ok()) << spec.status();
    spec_ = *spec;
  }
  absl::StatusOr<EvaluationSet> Read(const std::string& name, const std::string& content) {
    const std::string path = directory_.path() + "/" + name;
    EXPECT_TRUE(WriteFileAtomically(path, content).ok());
    return ReadLabelledTexts(path, *tokenizer_, spec_);
  }
  std::string ErrorOf(const std::string& name, const std::string& content) {
    const absl::Status status = Read(name, content).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    return std::string(status.message());
  }

  const TemporaryDirectory directory_;
  std::unique_ptr<Tokenizer> tokenizer_;
  ModelSpec spec_;
};

TEST_F(LabelledTextsTest, CommasQuotesAndPairsAreRead) {
  const auto set = Read("a.csv",
                        "text,text2,Label\n"
                        "42 owls?,a few,neutral\n"
                        "\"no\",\"The willow\nbends.\",2\r\n"
                        "\"a \"\"b\"\", c\",a,contradiction");
  ASSERT_TRUE(set.ok()) << set.status();
  EXPECT_THAT(set->classes, ElementsAre(1, 2, 0));
  ASSERT_EQ(set->sequences.size(), 3u);
  // As scripts/make_model_fixtures.py puts a pair together.
  const std::vector<int32_t> pair = {2, 35, 69, 19, 63, 52, 59, 80, 3, 5, 10, 45, 63, 3};
  EXPECT_EQ(set->sequences[0], pair);
  EXPECT_EQ(set->second_texts[0], 9u);
  EXPECT_EQ(set->sequences[2], [&] {
    std::vector<int32_t> first = *tokenizer_->Encode("a \"b\", c", true);
    const std::vector<int32_t> second = *tokenizer_->Encode("a", true);
    first.insert(first.end(), second.begin() + 1, second.end());
    return first;
  }());
}

TEST_F(LabelledTextsTest, TabsAreReadWithoutQuotes) {
  const auto set = Read("a.tsv", "a \"quote\tneutral\n\nb, c\t0\n");
  ASSERT_TRUE(set.ok()) << set.status();
  EXPECT_THAT(set->classes, ElementsAre(1, 0));
  EXPECT_EQ(set->sequences[0], *tokenizer_->Encode("a \"quote", true));
  EXPECT_EQ(set->second_texts[0], set->sequences[0].size());
}

TEST_F(LabelledTextsTest, LongTextsAreCutTheLongerOfAPairFirst) {
  const std::string long_text(100, 'a');
  const auto set =
      Read("a.tsv", "bcd\t" + long_text + "\t0\n" + long_text + "\t" + long_text + "\t1\n");
  ASSERT_TRUE(set.ok()) << set.status();
  for (const std::vector<int32_t>& sequence : set->sequences) {
    EXPECT_EQ(sequence.size(), 64u);
    EXPECT_EQ(sequence.back(), 3);
  }
  EXPECT_EQ(set->second_texts[0], 5u);
  EXPECT_EQ(set->second_texts[1], 32u);
}

TEST_F(LabelledTextsTest, ABadLineIsNamed) {
  EXPECT_THAT(ErrorOf("a.csv", "a,neutral\nb,positive\n"),
              AllOf(HasSubstr("a.csv: line 2: label \"positive\""),
                    HasSubstr("contradiction, neutral, entailment, or a number up to 2")));
  EXPECT_THAT(ErrorOf("a.csv", "a,3\n"), HasSubstr("line 1: label \"3\""));
  EXPECT_THAT(ErrorOf("a.csv", "a,b,0\nc,1\n"), HasSubstr("line 2: 2 columns"));
  EXPECT_THAT(ErrorOf("a.csv", "0\n"), HasSubstr("line 1: 1 columns"));
  EXPECT_THAT(ErrorOf("a.csv", "\"a\nb,0\n"), HasSubstr("line 1: a quote that does not end"));
  EXPECT_THAT(ErrorOf("a.csv", "text,label\n"), HasSubstr("no texts"));
  spec_.num_token_types = 1;
  EXPECT_THAT(ErrorOf("a.csv", "a,b,0\n"), HasSubstr("line 1: a second text"));
}

Measurement Labelled(const std::vector<int>& labels) {
  Measurement measurement;
  for (const int label : labels) {
    measurement.logits.push_back({-1, -1, -1});
    measurement.logits.back()[static_cast<size_t>(label)] = 0.5;
  }
  return measurement;
}

TEST(ClassifierMetricsTest, QualityIsTheRatioOfAccuracies) {
  EvaluationSet set;
  set.classes = {0, 1, 2, 0, 1};
  const Measurement full = Labelled({0, 1, 2, 0, 0});    // 4 of 5
  const Measurement level = Labelled({0, 1, 0, 2, 1});   // 3 of 5, as full: 2
  const Measurement source = Labelled({0, 1, 2, 0, 1});  // all
  const LevelMetrics metrics = MetricsOf(set, level, full, &source);
  EXPECT_NEAR(*metrics.accuracy, 0.6, 1e-12);
  EXPECT_NEAR(*metrics.agreement, 0.4, 1e-12);
  EXPECT_NEAR(metrics.quality, 0.75, 1e-12);
  EXPECT_NEAR(*metrics.quality_vs_source, 0.6, 1e-12);
  // Differences 0, 0, -1, -1, 1 around -0.2: squares 2.8, so sqrt(2.8 / 4 / 5) / 0.8.
  EXPECT_NEAR(*metrics.standard_error, std::sqrt(2.8 / 20) / 0.8, 1e-12);
}

TEST(ClassifierMetricsTest, WithoutClassesQualityIsAgreementWithTheFullLevel) {
  const Measurement full = Labelled({0, 1, 2, 0});
  const Measurement level = Labelled({0, 1, 1, 0});
  const Measurement source = Labelled({0, 2, 1, 0});
  const LevelMetrics metrics = MetricsOf({}, level, full, &source);
  EXPECT_FALSE(metrics.accuracy.has_value());
  EXPECT_NEAR(metrics.quality, 0.75, 1e-12);
  EXPECT_NEAR(*metrics.quality_vs_source, 0.75, 1e-12);
  EXPECT_EQ(MetricsOf({}, full, full, nullptr).quality, 1);
}

TEST(ClassifierDivergenceTest, WeighsLogProbabilitiesByTheirLabels) {
  ModelSpec spec;
  spec.causal = false;
  spec.classifier.labels = {"no", "yes"};
  // Equal halves against shares of 1/4 and 3/4.
  const Outputs even = {{0, 0}, {5, 5}};
  const Outputs tilted = {{0, static_cast<float>(std::log(3.0))}, {5, 5}};
  const double down = std::log(0.5), up = std::log(1.5);
  EXPECT_NEAR(DivergenceOf(spec, even, tilted), 0.5 * 0.5 * 0.5 * (down * down + up * up), 1e-7);
  EXPECT_EQ(DivergenceOf(spec, even, even), 0);
}

TEST(ClassifierArtifactTest, KeepsTheHeadAndMeasuresAgreement) {
  const TemporaryDirectory directory;
  CompressOptions options;
  options.source = kFixture;
  options.output = directory.path() + "/out";
  options.ladder = LadderChoice::kBoth;
  options.levels = 3;
  options.corpus.calibration_paths = {directory.path() + "/text.txt"};
  options.corpus.evaluation_path = directory.path() + "/held_out.txt";
  options.corpus.calibration_tokens = 2560;
  options.evaluation_tokens = 2048;
  options.refit_tokens = 0;
  options.make_backend = [] { return MakeCpuBackend({.num_threads = 1}); };
  ASSERT_TRUE(WriteFileAtomically(options.corpus.calibration_paths[0], RandomText(300, 1)).ok());
  ASSERT_TRUE(WriteFileAtomically(options.corpus.evaluation_path, RandomText(200, 2)).ok());
  const auto report = Compress(options);
  ASSERT_TRUE(report.ok()) << report.status();
  ASSERT_GE(report->levels.size(), 3u);
  for (const Level& level : report->levels) {
    EXPECT_EQ(level.metrics.quality, *level.metrics.agreement);
    EXPECT_LE(level.metrics.quality, 1);
  }
  EXPECT_EQ(report->levels.back().metrics.quality, 1);
  EXPECT_GT(*report->levels.back().metrics.quality_vs_source, 0.9);

  auto model = NestedModel::Open(options.output);
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_THAT((*model)->spec().classifier.labels,
              ElementsAre("contradiction", "neutral", "entailment"));
  const auto source = NestedModel::Open(kFixture);
  ASSERT_TRUE(source.ok()) << source.status();
  for (const std::string name :
       {"pooler.dense.weight", "pooler.dense.bias", "classifier.weight", "classifier.bias"}) {
    const auto view = (*source)->tensors().tensors().at(name);
    EXPECT_EQ(*(*model)->tensors().GetFloats(name, view.shape),
              *(*source)->tensors().GetFloats(name, view.shape));
  }

  const MeasuredModel measured{
      .title = "tiny", .levels = report->levels, .coarse = std::nullopt, .tokens = 2048};
  const nlohmann::json figures = FigureReport(**model, measured);
  EXPECT_EQ(figures["quality_text"]["quality"], "share of labels that agree with the full level");
  EXPECT_EQ(figures["levels"].size(), report->levels.size());
  EXPECT_EQ(figures["levels"][0]["ranks"].size(), figures["layers"].size());
  EXPECT_EQ(figures["layers"][0]["role"], "query");
  EXPECT_EQ(figures["layers"][5]["role"], "down");
  EXPECT_EQ(figures["spectra"].size(), figures["layers"].size());
  const nlohmann::json& spectrum = figures["spectra"][0]["prefix"];
  ASSERT_EQ(spectrum["ranks"].size(), spectrum["left"].size());
  EXPECT_GT(spectrum["left"].front(), spectrum["left"].back());
  ASSERT_EQ(figures["marks"].size(), 3u);
  EXPECT_EQ(figures["marks"][1]["name"], "int8");
  EXPECT_EQ(figures["marks"][1]["relative_cost"], 1);
  EXPECT_EQ(figures["marks"][1]["quality"], 1);
  // Rows of 40 weights, which groups of 32 pad to 64.
  EXPECT_GT(figures["marks"][0]["relative_cost"], 1.2);
  EXPECT_LT(figures["marks"][2]["relative_cost"], 0.7);
  int64_t resident = 0;
  for (const auto& [part, bytes] : figures["resident_bytes"].items())
    resident += bytes.get<int64_t>();
  int64_t stored = 0;
  for (const auto& [name, view] : (*model)->tensors().tensors()) {
    stored += std::ssize(view.bytes);
  }
  EXPECT_EQ(resident, stored);
}

}  // namespace
}  // namespace nestor
