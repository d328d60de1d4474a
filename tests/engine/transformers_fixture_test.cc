// The engine against PyPI transformers: logits and embeddings in double precision that
// scripts/make_model_fixtures.py computed for tiny random checkpoints, and for the real models
// where models/ holds them.

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <limits>

#include "base/file.h"
#include "engine/engine.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/cpu_info.h"
#include "kernels/reference/reference_backend.h"
#include "nlohmann/json.hpp"

namespace nestor {
namespace {

using Json = nlohmann::json;
using Output = StepEntry::Output;

constexpr const char* kFixtures = NESTOR_SOURCE_DIR "/tests/data/transformers/";

std::unique_ptr<Engine> MakeEngine(const std::string& directory, bool uses_reference) {
  absl::StatusOr<std::unique_ptr<NestedModel>> model = NestedModel::Open(directory);
  EXPECT_TRUE(model.ok()) << model.status();
  absl::StatusOr<std::unique_ptr<Backend>> backend = MakeReferenceBackend();
  if (!uses_reference) {
    // With AVX-512 BF16 the inputs of more than 16 rows are rounded: too much for what is compared.
    backend = MakeCpuBackend(
        {.instruction_set = std::min(BestInstructionSet(), CpuInstructionSet::kAvx512),
         .kv_cache_type = KvCacheType::kFloat32});
  }
  EXPECT_TRUE(backend.ok()) << backend.status();
  absl::StatusOr<std::unique_ptr<Engine>> engine =
      Engine::Create(*std::move(model), *std::move(backend), {});
  EXPECT_TRUE(engine.ok()) << engine.status();
  return *std::move(engine);
}

// Logits after each of `tokens`, one step each: the cache is on trial too.
std::vector<std::vector<float>> LogitsOf(Engine* engine, const std::vector<int32_t>& tokens) {
  const SequenceId sequence = *engine->AddSequence(static_cast<int64_t>(tokens.size()));
  std::vector<std::vector<float>> logits;
  for (const int32_t token : tokens) {
    const auto result = engine->Step(
        {{{.sequence = sequence, .tokens = {&token, 1}, .output = Output::kLastLogits}}});
    EXPECT_TRUE(result.ok()) << result.status();
    logits.emplace_back(result->entries[0].values.begin(), result->entries[0].values.end());
  }
  engine->RemoveSequence(sequence);
  return logits;
}

// Logits after the last of `tokens`, all in one step.
std::vector<float> LogitsAfterPrompt(Engine* engine, const std::vector<int32_t>& tokens) {
  const SequenceId sequence = *engine->AddSequence(static_cast<int64_t>(tokens.size()));
  const auto result =
      engine->Step({{{.sequence = sequence, .tokens = tokens, .output = Output::kLastLogits}}});
  EXPECT_TRUE(result.ok()) << result.status();
  engine->RemoveSequence(sequence);
  return {result->entries[0].values.begin(), result->entries[0].values.end()};
}

// Or a classifier's logits.
std::vector<float> EmbeddingOf(Engine* engine, const std::vector<int32_t>& tokens,
                               size_t second_text = std::numeric_limits<size_t>::max()) {
  const SequenceId sequence = *engine->AddSequence(static_cast<int64_t>(tokens.size()));
  const auto result = engine->Step({{{.sequence = sequence,
                                      .tokens = tokens,
                                      .output = Output::kEmbedding,
                                      .second_text = second_text}}});
  EXPECT_TRUE(result.ok()) << result.status();
  engine->RemoveSequence(sequence);
  return {result->entries[0].values.begin(), result->entries[0].values.end()};
}

void ExpectNear(std::span<const float> actual, const Json& expected, double tolerance) {
  ASSERT_LE(expected.size(), actual.size());
  double scale = 0;
  double error = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    scale = std::max(scale, std::abs(expected[i].get<double>()));
    error = std::max(error, std::abs(actual[i] - expected[i].get<double>()));
  }
  EXPECT_GT(scale, 0);
  EXPECT_LE(error, tolerance * scale);
}

// The fixture's name, and whether the reference runs it or the CPU backend.
class TinyFixtureTest : public ::testing::TestWithParam<std::tuple<std::string, bool>> {};

// The logits of the tokens whose outputs a fixture keeps: `vocabulary`, or all.
std::vector<float> Kept(const std::vector<float>& logits, const Json& expected) {
  if (!expected.contains("vocabulary")) return logits;
  std::vector<float> kept;
  for (const size_t token : expected["vocabulary"].get<std::vector<size_t>>()) {
    kept.push_back(logits[token]);
  }
  return kept;
}

TEST_P(TinyFixtureTest, OutputsEqualThoseOfTransformers) {
  const auto& [name, uses_reference] = GetParam();
  // Logits come back as floats, so the reference cannot be closer than half a unit of their last
  // place (6e-8); the CPU backend rounds in every operation.
  const double tolerance = uses_reference ? 1e-6 : 2e-5;
  const std::string directory = std::string(kFixtures) + name;
  const Json expected = Json::parse(*ReadFile(directory + "/expected.json"));
  const auto engine = MakeEngine(directory, uses_reference);
  for (size_t i = 0; i < expected["input_ids"].size(); ++i) {
    const std::vector<int32_t> tokens = expected["input_ids"][i];
    if (engine->model().spec().is_classifier()) {
      const Json& logits = expected["label_logits"][i];
      ASSERT_EQ(logits.size(), engine->model().spec().classifier.labels.size());
      ExpectNear(EmbeddingOf(engine.get(), tokens, expected["second_text"][i].get<size_t>()),
                 logits, tolerance);
      continue;
    }
    if (engine->model().spec().is_encoder()) {
      ExpectNear(EmbeddingOf(engine.get(), tokens), expected["embedding"][i], tolerance);
      continue;
    }
    const Json& logits = expected["logits"][i];
    const std::vector<std::vector<float>> decoded = LogitsOf(engine.get(), tokens);
    for (size_t position = 0; position < tokens.size(); ++position) {
      ExpectNear(Kept(decoded[position], expected), logits[position], tolerance);
    }
    ExpectNear(Kept(LogitsAfterPrompt(engine.get(), tokens), expected), logits.back(), tolerance);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Tiny, TinyFixtureTest,
    ::testing::Combine(::testing::Values("tiny_llama", "tiny_llama_tied", "tiny_llama3_rope",
                                         "tiny_llama_linear_rope", "tiny_qwen2", "tiny_qwen3",
                                         "tiny_gpt2", "tiny_gpt2_bare", "tiny_bert",
                                         "tiny_bert_cls", "tiny_bert_classifier"),
                       ::testing::Bool()),
    [](const auto& test) {
      return std::get<0>(test.param) + (std::get<1>(test.param) ? "_reference" : "_cpu");
    });

class RealModelTest : public ::testing::TestWithParam<bool> {
 protected:
  // The fixture and the engine for models/NAME; skips where the quickstart has not made it.
  void Load(const std::string& name) {
    const std::string directory = std::string(NESTOR_SOURCE_DIR "/models/") + name;
    if (!std::filesystem::exists(directory + "/model.safetensors")) {
      GTEST_SKIP() << directory << " is absent: ./quickstart.sh makes it";
    }
    expected_ = Json::parse(*ReadFile(std::string(kFixtures) + name + ".json"));
    engine_ = MakeEngine(directory, /*uses_reference=*/GetParam());
  }

  Json expected_;
  std::unique_ptr<Engine> engine_;
};

TEST_P(RealModelTest, SmolLm2LogitsEqualThoseOfTransformers) {
  ASSERT_NO_FATAL_FAILURE(Load("smollm2-135m-instruct"));
  if (IsSkipped()) return;
  const std::vector<int32_t> tokens = expected_["input_ids"];
  EXPECT_EQ(*engine_->tokenizer().Encode(expected_["text"], /*adds_special_tokens=*/true), tokens);
  const std::vector<std::vector<float>> logits = LogitsOf(engine_.get(), tokens);
  for (size_t i = 0; i < expected_["positions"].size(); ++i) {
    ExpectNear(Kept(logits[expected_["positions"][i].get<size_t>()], expected_),
               expected_["logits"][i], GetParam() ? 1e-6 : 1e-4);
  }
}

TEST_P(RealModelTest, MiniLmEmbeddingsEqualThoseOfTransformers) {
  ASSERT_NO_FATAL_FAILURE(Load("all-minilm-l6-v2"));
  if (IsSkipped()) return;
  for (size_t i = 0; i < expected_["texts"].size(); ++i) {
    const std::vector<int32_t> tokens = expected_["input_ids"][i];
    EXPECT_EQ(*engine_->tokenizer().Encode(expected_["texts"][i], /*adds_special_tokens=*/true),
              tokens);
    ExpectNear(EmbeddingOf(engine_.get(), tokens), expected_["embedding"][i],
               GetParam() ? 1e-6 : 2e-5);
  }
}

INSTANTIATE_TEST_SUITE_P(Real, RealModelTest, ::testing::Bool(), [](const auto& test) {
  return std::string(test.param ? "Reference" : "Cpu");
});

}  // namespace
}  // namespace nestor
