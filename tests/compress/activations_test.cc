#include "compress/activations.h"

#include <random>
#include <string>
#include <vector>

#include "base/file.h"
#include "compress/evaluate.h"
#include "compress/pipeline.h"
#include "compress/self_sample.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "tests/testing/temporary_directory.h"
#include "tests/testing/tiny_checkpoint.h"

namespace nestor {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

// Twelve blocks of one query, one down each, and a head: layers 0, 1, 2, ... 24.
std::vector<LinearSpec> TwelveBlocks() {
  std::vector<LinearSpec> layers;
  for (int32_t block = 0; block < 12; ++block) {
    layers.push_back({.role = LinearRole::kQuery, .block = block, .out = 10, .in = 10});
    layers.push_back({.role = LinearRole::kDown, .block = block, .out = 10, .in = 40});
  }
  layers.push_back({.role = LinearRole::kHead, .block = -1, .out = 100, .in = 10});
  return layers;
}

// Every layer in int8 costs something, and the costs add up.
ActivationLoss Additive(std::vector<double> losses, int* calls = nullptr) {
  return [losses, calls](const std::vector<bool>& is_float) -> absl::StatusOr<double> {
    if (calls != nullptr) ++*calls;
    double loss = 0;
    for (size_t i = 0; i < losses.size(); ++i) loss += is_float[i] ? 0 : losses[i];
    return loss;
  };
}

std::vector<size_t> Floats(const ActivationChoice& choice) {
  std::vector<size_t> layers;
  for (size_t i = 0; i < choice.is_float.size(); ++i) {
    if (choice.is_float[i]) layers.push_back(i);
  }
  return layers;
}

TEST(ChooseActivations, LeavesAllInInt8WhereThatCostsLittle) {
  int calls = 0;
  const auto measure = Additive(std::vector<double>(25, 0.0001), &calls);
  const auto choice = ChooseActivations(TwelveBlocks(), measure, measure);
  ASSERT_TRUE(choice.ok());
  EXPECT_THAT(Floats(*choice), IsEmpty());
  EXPECT_DOUBLE_EQ(choice->int8_loss, 0.0025);
  EXPECT_DOUBLE_EQ(choice->loss, choice->int8_loss);
  EXPECT_EQ(calls, 1);
}

TEST(ChooseActivations, TakesThePartOfTheDepthThatIsToBlame) {
  std::vector<double> losses(25, 0.0001);
  losses[1] = 0.3;   // down of block 0
  losses[23] = 0.2;  // of block 11
  const auto measure = Additive(losses);
  const auto choice = ChooseActivations(TwelveBlocks(), measure, measure);
  ASSERT_TRUE(choice.ok());
  EXPECT_THAT(Floats(*choice), ElementsAre(1, 3, 21, 23));
  EXPECT_NEAR(choice->int8_loss, 0.5023, 1e-9);
  EXPECT_NEAR(choice->loss, 0.0021, 1e-9);
  EXPECT_EQ(FloatLayers(TwelveBlocks(), choice->is_float), "down in 4 of 12 blocks");
}

TEST(ChooseActivations, PrefersALossInFewWeights) {
  std::vector<double> losses(25);
  for (size_t block = 0; block < 12; ++block) {
    losses[2 * block] = 0.0005;      // queries: 0.006 in 1,200 weights
    losses[2 * block + 1] = 0.0004;  // downs: 0.0048 in 4,800
  }
  losses[24] = 0.0045;  // in 1,000
  const auto choice = ChooseActivations(TwelveBlocks(), Additive(losses), Additive(losses));
  ASSERT_TRUE(choice.ok());
  EXPECT_EQ(FloatLayers(TwelveBlocks(), choice->is_float), "query, head");
  EXPECT_NEAR(choice->loss, 0.0048, 1e-12);
}

TEST(ChooseActivations, GoesOnWhileTheWholeIsNotGoodEnough) {
  std::vector<double> losses(25, 0.0);
  losses[24] = 0.1;
  for (size_t block = 0; block < 12; ++block) losses[2 * block] = 0.002;
  // Rough measurements see the head alone.
  std::vector<double> rough(25, 1e-6);
  rough[24] = 0.1;
  const auto choice = ChooseActivations(TwelveBlocks(), Additive(losses), Additive(rough));
  ASSERT_TRUE(choice.ok());
  EXPECT_EQ(FloatLayers(TwelveBlocks(), choice->is_float), "query, head");
  EXPECT_DOUBLE_EQ(choice->loss, 0);
}

TEST(ChooseActivations, HandsOnWhatFails) {
  const auto fails = [](const std::vector<bool>&) -> absl::StatusOr<double> {
    return absl::DataLossError("broken");
  };
  EXPECT_EQ(ChooseActivations(TwelveBlocks(), fails, fails).status().code(),
            absl::StatusCode::kDataLoss);
}

// Random words, so that every line is new to the model.
std::string RandomText(int lines, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::string text;
  for (int i = 0; i < lines; ++i) {
    for (int word = 0; word < 4; ++word) {
      for (uint64_t letters = 2 + random() % 6; letters > 0; --letters) {
        text += static_cast<char>('a' + random() % 26);
      }
      text += word < 3 ? ' ' : '\n';
    }
  }
  return text;
}

absl::StatusOr<std::unique_ptr<Backend>> MakeCpu() { return MakeCpuBackend({.num_threads = 1}); }

class ActivationsOfArtifacts : public testing::Test {
 protected:
  void SetUp() override {
    ASSERT_TRUE(WriteTinyLlama(Path("llama"), {.tied_head = false, .outlier = 100}).ok());
    ASSERT_TRUE(WriteTinyLlama(Path("even"), {.tied_head = false}).ok());
    ASSERT_TRUE(WriteTinyBert(Path("bert")).ok());
    ASSERT_TRUE(WriteFileAtomically(Path("text.txt"), RandomText(800, 1)).ok());
    ASSERT_TRUE(WriteFileAtomically(Path("held_out.txt"), RandomText(200, 2)).ok());
  }

  std::string Path(const std::string& name) const { return directory_.path() + "/" + name; }

  // The report of a compression into `name`.
  CompressReport Compressed(const std::string& model, const std::string& name,
                            Activations activations,
                            DenseStorage dense = DenseStorage::kPlanes) const {
    CompressOptions options;
    options.source = Path(model);
    options.output = Path(name);
    options.levels = 2;
    options.dense = dense;
    options.max_residual_rank = 16;
    options.corpus.calibration_paths = {Path("text.txt")};
    options.corpus.evaluation_path = Path("held_out.txt");
    options.corpus.calibration_tokens = 2560;
    options.evaluation_tokens = 512;
    options.self_sample_tokens = 0;
    options.activations = activations;
    options.make_backend = MakeCpu;
    const auto report = Compress(options);
    EXPECT_TRUE(report.ok()) << report.status();
    return report.ok() ? *report : CompressReport();
  }

  std::vector<std::string> FloatLayersOf(const std::string& name) const {
    const auto model = NestedModel::Open(Path(name));
    EXPECT_TRUE(model.ok()) << model.status();
    std::vector<std::string> floats;
    for (size_t i = 0; model.ok() && i < (*model)->layers().size(); ++i) {
      std::vector<float> scratch;
      const auto weights = (*model)->Weights(i, &scratch);
      EXPECT_TRUE(weights.ok()) << weights.status();
      if (weights->float_activations) floats.push_back(weights->name);
    }
    return floats;
  }

  // Text that an artifact writes itself, which is what it expects.
  TokenSequences SampleOf(const std::string& name) const {
    auto model = NestedModel::Open(Path(name));
    EXPECT_TRUE(model.ok()) << model.status();
    const auto engine = OpenEngine(*std::move(model), MakeCpu, kSelfSampleBatch * kWindowTokens);
    EXPECT_TRUE(engine.ok()) << engine.status();
    const auto prompts = SequencesOf(*ReadFile(Path("held_out.txt")), (*engine)->tokenizer(),
                                     (*engine)->model().spec(), 1024);
    EXPECT_TRUE(prompts.ok());
    const auto sampled = SampleFromModel(engine->get(), *prompts, {.tokens = 4096, .seed = 3});
    EXPECT_TRUE(sampled.ok()) << sampled.status();
    return *sampled;
  }

  // Perplexity of the full level, in steps that all machines round alike.
  double PerplexityOf(const std::string& name, const TokenSequences& windows) const {
    auto model = NestedModel::Open(Path(name));
    EXPECT_TRUE(model.ok()) << model.status();
    const auto engine = OpenEngine(*std::move(model), MakeCpu, kWindowTokens, /*max_rows=*/16);
    EXPECT_TRUE(engine.ok()) << engine.status();
    const int full = static_cast<int>((*engine)->model().levels().size()) - 1;
    const auto scores = ScoreWindows(engine->get(), windows, full, nullptr);
    EXPECT_TRUE(scores.ok()) << scores.status();
    return Perplexity(*scores);
  }

  TemporaryDirectory directory_;
};

TEST_F(ActivationsOfArtifacts, KeepFloatsWhereAnInputHasOutliers) {
  const CompressReport report = Compressed("llama", "auto", Activations::kAuto);
  EXPECT_THAT(FloatLayersOf("auto"),
              ElementsAre("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"));
  ASSERT_FALSE(report.notes.empty());
  EXPECT_THAT(report.notes[0], HasSubstr("with floats for down they cost"));

  Compressed("llama", "int8", Activations::kInt8);
  Compressed("llama", "float", Activations::kFloat);
  EXPECT_THAT(FloatLayersOf("int8"), IsEmpty());
  EXPECT_EQ(FloatLayersOf("float").size(), 15u);
  const TokenSequences windows = SampleOf("float");
  const double exact = PerplexityOf("float", windows);
  EXPECT_GT(exact / PerplexityOf("auto", windows), 1 - kMaxActivationLoss);
  EXPECT_LT(exact / PerplexityOf("int8", windows), 1 - kMaxActivationLoss);
}

TEST_F(ActivationsOfArtifacts, AreInt8WhereNothingIsLost) {
  const CompressReport report = Compressed("even", "auto", Activations::kAuto);
  EXPECT_THAT(FloatLayersOf("auto"), IsEmpty());
  ASSERT_FALSE(report.notes.empty());
  EXPECT_THAT(report.notes[0], HasSubstr("int8 activations cost 0."));
  // An artifact says nothing then, as one of an older writer.
  EXPECT_EQ(ReadFile(Path("auto/nested.json"))->find("activations"), std::string::npos);
}

TEST_F(ActivationsOfArtifacts, OfAnEncoderAndOfBf16AreMeasuredToo) {
  for (const DenseStorage dense : {DenseStorage::kPlanes, DenseStorage::kBf16}) {
    const CompressReport report = Compressed(
        "bert", dense == DenseStorage::kBf16 ? "bert16" : "bert8", Activations::kAuto, dense);
    ASSERT_FALSE(report.notes.empty());
    EXPECT_THAT(report.notes[0], HasSubstr("int8 activations cost 0."));
  }
  Compressed("llama", "llama16", Activations::kAuto, DenseStorage::kBf16);
  // Its full level is never rounded; the residual level below it is.
  EXPECT_THAT(FloatLayersOf("llama16"),
              ElementsAre("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"));
}

TEST_F(ActivationsOfArtifacts, OfAnUnknownKindAreRefusedByName) {
  Compressed("even", "out", Activations::kFloat);
  std::string text = *ReadFile(Path("out/nested.json"));
  const std::string known = "\"activations\": \"float\"";
  ASSERT_NE(text.find(known), std::string::npos);
  for (const std::string value : {"\"half\"", "\"int8\"", "16", "null"}) {
    std::string changed = text;
    changed.replace(changed.find(known), known.size(), "\"activations\": " + value);
    ASSERT_TRUE(WriteFileAtomically(Path("out/nested.json"), changed).ok());
    const absl::Status status = NestedModel::Open(Path("out")).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(status.message()),
                HasSubstr("nested.json: layers[0].activations: " + value + ", expected \"float\""));
  }
}

}  // namespace
}  // namespace nestor
