#include "engine/engine.h"

#include <cmath>
#include <map>
#include <random>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/reference/reference_backend.h"
#include "tests/testing/temporary_directory.h"
#include "tests/testing/tiny_checkpoint.h"

namespace nestor {
namespace {

using ::testing::HasSubstr;
using Output = StepEntry::Output;

constexpr int kVocabulary = 258;

std::vector<int32_t> RandomTokens(size_t count, uint32_t seed) {
  std::mt19937 random(seed);
  std::uniform_int_distribution<int32_t> token(0, kVocabulary - 1);
  std::vector<int32_t> tokens(count);
  for (int32_t& value : tokens) value = token(random);
  return tokens;
}

std::unique_ptr<Backend> CpuBackend(KvCacheType kv_cache_type = KvCacheType::kBfloat16) {
  absl::StatusOr<std::unique_ptr<Backend>> backend =
      MakeCpuBackend({.num_threads = 2, .kv_cache_type = kv_cache_type});
  EXPECT_TRUE(backend.ok()) << backend.status();
  return *std::move(backend);
}

std::unique_ptr<Engine> MakeEngine(const std::string& directory, std::unique_ptr<Backend> backend,
                                   const EngineOptions& options = {}) {
  absl::StatusOr<std::unique_ptr<NestedModel>> model = NestedModel::Open(directory);
  EXPECT_TRUE(model.ok()) << model.status();
  absl::StatusOr<std::unique_ptr<Engine>> engine =
      Engine::Create(*std::move(model), std::move(backend), options);
  EXPECT_TRUE(engine.ok()) << engine.status();
  return *std::move(engine);
}

double MaxDifference(std::span<const float> a, std::span<const float> b) {
  EXPECT_EQ(a.size(), b.size());
  double largest = 0;
  for (size_t i = 0; i < a.size(); ++i) largest = std::max<double>(largest, std::abs(a[i] - b[i]));
  return largest;
}

class EngineTest : public ::testing::Test {
 protected:
  void SetUp() override { ASSERT_TRUE(WriteTinyLlama(directory_.path()).ok()); }

  // Logits after `tokens`, given in chunks of `chunk`.
  static std::vector<float> LogitsAfter(Engine* engine, std::span<const int32_t> tokens,
                                        size_t chunk) {
    const SequenceId sequence = *engine->AddSequence(static_cast<int64_t>(tokens.size()));
    std::vector<float> logits;
    for (size_t begin = 0; begin < tokens.size(); begin += chunk) {
      const size_t count = std::min(chunk, tokens.size() - begin);
      const auto result = engine->Step(
          {{{.sequence = sequence,
             .tokens = tokens.subspan(begin, count),
             .output = begin + count == tokens.size() ? Output::kLastLogits : Output::kNone}}});
      EXPECT_TRUE(result.ok()) << result.status();
      const std::span<const float> values = result->entries[0].values;
      logits.assign(values.begin(), values.end());
    }
    engine->RemoveSequence(sequence);
    return logits;
  }

  const TemporaryDirectory directory_;
};

TEST_F(EngineTest, CpuLogitsEqualTheReferences) {
  const auto reference = MakeEngine(directory_.path(), MakeReferenceBackend());
  const auto cpu = MakeEngine(directory_.path(), CpuBackend(KvCacheType::kFloat32));
  const std::vector<int32_t> tokens = RandomTokens(41, 1);
  EXPECT_LT(
      MaxDifference(LogitsAfter(reference.get(), tokens, 41), LogitsAfter(cpu.get(), tokens, 41)),
      1e-3);
}

TEST_F(EngineTest, AChunkedPromptEqualsAWholeOne) {
  const auto engine = MakeEngine(directory_.path(), MakeReferenceBackend());
  const std::vector<int32_t> tokens = RandomTokens(50, 2);
  const std::vector<float> whole = LogitsAfter(engine.get(), tokens, 50);
  EXPECT_LT(MaxDifference(whole, LogitsAfter(engine.get(), tokens, 7)), 1e-5);
  EXPECT_LT(MaxDifference(whole, LogitsAfter(engine.get(), tokens, 1)), 1e-5);
}

TEST_F(EngineTest, ASequenceDoesNotSeeItsNeighbours) {
  const auto engine = MakeEngine(directory_.path(), CpuBackend());
  std::vector<std::vector<int32_t>> prompts;
  std::vector<SequenceId> sequences;
  StepPlan plan;
  for (uint32_t i = 0; i < 3; ++i) {
    prompts.push_back(RandomTokens(3 + i, 10 + i));
    sequences.push_back(*engine->AddSequence(32));
  }
  for (size_t i = 0; i < 3; ++i) {
    plan.entries.push_back(
        {.sequence = sequences[i], .tokens = prompts[i], .output = Output::kLastLogits});
  }
  const auto together = engine->Step(plan);
  ASSERT_TRUE(together.ok()) << together.status();
  std::vector<std::vector<float>> logits;
  for (const auto& entry : together->entries) {
    logits.emplace_back(entry.values.begin(), entry.values.end());
  }
  for (size_t i = 0; i < 3; ++i) {
    // Bit for bit: up to 16 rows the company does not change the arithmetic.
    EXPECT_EQ(logits[i], LogitsAfter(engine.get(), prompts[i], prompts[i].size()));
  }
}

TEST_F(EngineTest, LogProbabilitiesFollowFromTheLogits) {
  const auto engine = MakeEngine(directory_.path(), MakeReferenceBackend());
  const std::vector<int32_t> tokens = RandomTokens(80, 3);
  std::vector<int32_t> targets(tokens.begin() + 1, tokens.end());
  targets.push_back(-1);
  const SequenceId sequence = *engine->AddSequence(80);
  const auto result = engine->Step({{{.sequence = sequence,
                                      .tokens = tokens,
                                      .output = Output::kLogProbabilities,
                                      .targets = targets}}});
  ASSERT_TRUE(result.ok()) << result.status();
  const std::vector<double> scored(result->entries[0].log_probabilities.begin(),
                                   result->entries[0].log_probabilities.end());
  EXPECT_EQ(scored.back(), 0);
  for (const size_t length : {1, 66, 79}) {
    const std::vector<float> logits =
        LogitsAfter(engine.get(), std::span(tokens).first(length), length);
    double sum = 0;
    for (const float logit : logits) sum += std::exp(static_cast<double>(logit));
    EXPECT_NEAR(scored[length - 1], logits[static_cast<size_t>(tokens[length])] - std::log(sum),
                1e-4);
  }
}

TEST_F(EngineTest, AllLogitsAreThoseAfterEveryToken) {
  const auto engine = MakeEngine(directory_.path(), MakeReferenceBackend());
  const std::vector<int32_t> tokens = RandomTokens(70, 9);  // more than are delivered at once
  const std::vector<int32_t> other = RandomTokens(4, 10);
  const SequenceId first = *engine->AddSequence(70);
  const SequenceId second = *engine->AddSequence(4);
  const auto result =
      engine->Step({{{.sequence = first, .tokens = tokens, .output = Output::kAllLogits},
                     {.sequence = second, .tokens = other, .output = Output::kLastLogits}}});
  ASSERT_TRUE(result.ok()) << result.status();
  ASSERT_EQ(result->entries[0].values.size(), 70u * kVocabulary);
  const std::vector<float> all(result->entries[0].values.begin(), result->entries[0].values.end());
  const std::vector<float> last(result->entries[1].values.begin(), result->entries[1].values.end());
  EXPECT_LT(MaxDifference(last, LogitsAfter(engine.get(), other, 4)), 1e-5);
  for (const size_t length : {1, 33, 65, 70}) {
    EXPECT_LT(MaxDifference(std::span(all).subspan((length - 1) * kVocabulary, kVocabulary),
                            LogitsAfter(engine.get(), std::span(tokens).first(length), length)),
              1e-5);
  }
}

TEST_F(EngineTest, ATruncatedSequenceGoesOnAsIfTheRestHadNeverRun) {
  const auto engine = MakeEngine(directory_.path(), CpuBackend());
  const std::vector<int32_t> tokens = RandomTokens(12, 11);
  const std::vector<int32_t> wrong = RandomTokens(5, 12);
  const SequenceId sequence = *engine->AddSequence(12);
  const std::span<const int32_t> all(tokens);
  const int64_t free_pages = engine->free_pages();
  ASSERT_TRUE(engine->Step({{{.sequence = sequence, .tokens = all.first(7)}}}).ok());
  ASSERT_TRUE(engine->Step({{{.sequence = sequence, .tokens = wrong}}}).ok());
  engine->Truncate(sequence, 7);
  EXPECT_EQ(engine->LengthOf(sequence), 7);
  EXPECT_EQ(engine->free_pages(), free_pages);
  const auto result = engine->Step(
      {{{.sequence = sequence, .tokens = all.subspan(7), .output = Output::kLastLogits}}});
  ASSERT_TRUE(result.ok()) << result.status();
  const std::vector<float> logits(result->entries[0].values.begin(),
                                  result->entries[0].values.end());
  EXPECT_EQ(logits, LogitsAfter(engine.get(), tokens, 12));
}

TEST_F(EngineTest, PagesAreReservedAndComeBack) {
  const auto engine = MakeEngine(directory_.path(), MakeReferenceBackend(),
                                 {.kv_cache_bytes = 1 << 16, .page_size = 8});
  const int64_t pages = engine->num_pages();
  ASSERT_GT(pages, 4);
  const SequenceId first = *engine->AddSequence(17);
  EXPECT_EQ(engine->free_pages(), pages - 3);
  EXPECT_FALSE(engine->HasRoomFor((pages - 2) * 8));
  EXPECT_TRUE(absl::IsResourceExhausted(engine->AddSequence((pages - 2) * 8).status()));
  engine->RemoveSequence(first);
  EXPECT_EQ(engine->free_pages(), pages);
}

TEST_F(EngineTest, TheReservationBoundsTheSequence) {
  const auto engine = MakeEngine(directory_.path(), MakeReferenceBackend());
  const SequenceId sequence = *engine->AddSequence(4);
  const std::vector<int32_t> tokens = RandomTokens(5, 4);
  const auto result = engine->Step({{{.sequence = sequence, .tokens = tokens}}});
  EXPECT_THAT(std::string(result.status().message()), HasSubstr("reserved for 4"));
  EXPECT_EQ(engine->LengthOf(sequence), 0);
}

TEST_F(EngineTest, APlanThatDoesNotFitRunsNothing) {
  const auto engine = MakeEngine(directory_.path(), MakeReferenceBackend(), {.max_step_rows = 16});
  const SequenceId sequence = *engine->AddSequence(64);
  const std::vector<int32_t> good = RandomTokens(3, 5);
  const std::vector<int32_t> bad = {1, kVocabulary};
  const std::vector<int32_t> negative = {-1};
  const std::vector<int32_t> many = RandomTokens(17, 6);
  const auto error = [&](const StepPlan& plan) {
    const absl::Status status = engine->Step(plan).status();
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
    EXPECT_EQ(engine->LengthOf(sequence), 0);
    return std::string(status.message());
  };
  EXPECT_THAT(error({}), HasSubstr("empty"));
  EXPECT_THAT(error({{{.sequence = sequence, .tokens = bad}}}), HasSubstr("258"));
  EXPECT_THAT(error({{{.sequence = sequence, .tokens = negative}}}), HasSubstr("-1"));
  EXPECT_THAT(error({{{.sequence = sequence, .tokens = many}}}), HasSubstr("max_step_rows"));
  EXPECT_THAT(error({{{.sequence = sequence, .tokens = good, .level = 1}}}), HasSubstr("level"));
  EXPECT_THAT(
      error({{{.sequence = sequence, .tokens = good}, {.sequence = sequence, .tokens = good}}}),
      HasSubstr("twice"));
  EXPECT_THAT(error({{{.sequence = 99, .tokens = good}}}), HasSubstr("unknown"));
  EXPECT_THAT(error({{{.sequence = sequence, .tokens = good, .output = Output::kEmbedding}}}),
              HasSubstr("encoder"));
}

TEST_F(EngineTest, ExecutedCostIsTheStatedOne) {
  const auto engine = MakeEngine(directory_.path(), CpuBackend());
  const SequenceId sequence = *engine->AddSequence(8);
  const std::vector<int32_t> token = RandomTokens(1, 7);
  const auto result =
      engine->Step({{{.sequence = sequence, .tokens = token, .output = Output::kLastLogits}}});
  ASSERT_TRUE(result.ok()) << result.status();
  const Level& full = engine->model().levels().back();
  const int64_t attention = AttentionFlops(engine->model().spec(), 128);
  EXPECT_EQ(result->executed.weight_bytes, full.cost.weight_bytes);
  EXPECT_EQ(result->executed.flops, full.cost.flops - attention);
}

TEST_F(EngineTest, AMissingTokenizerIsAFailedPrecondition) {
  ASSERT_EQ(std::remove((directory_.path() + "/tokenizer.json").c_str()), 0);
  auto model = NestedModel::Open(directory_.path());
  EXPECT_TRUE(absl::IsFailedPrecondition(
      Engine::Create(*std::move(model), MakeReferenceBackend(), {}).status()));
}

TEST_F(EngineTest, OptionsOutOfRangeAreNamed) {
  auto model = NestedModel::Open(directory_.path());
  EXPECT_THAT(
      std::string(Engine::Create(*std::move(model), MakeReferenceBackend(), {.page_size = 0})
                      .status()
                      .message()),
      HasSubstr("page_size"));
}

TEST_F(EngineTest, ACacheTooSmallForOnePageIsRefused) {
  auto model = NestedModel::Open(directory_.path());
  EXPECT_TRUE(absl::IsResourceExhausted(
      Engine::Create(*std::move(model), MakeReferenceBackend(), {.kv_cache_bytes = 10}).status()));
}

class RecordingObserver final : public LinearInputObserver {
 public:
  void Observe(size_t layer, const float* inputs, int64_t rows, int64_t cols) override {
    rows_[layer] += rows;
    for (int64_t i = 0; i < rows * cols; ++i) energy_[layer] += inputs[i] * inputs[i];
  }
  std::map<size_t, int64_t> rows_;
  std::map<size_t, double> energy_;
};

TEST_F(EngineTest, TheObserverSeesEveryLayersInput) {
  const auto engine = MakeEngine(directory_.path(), CpuBackend());
  RecordingObserver observer;
  engine->SetObserver(&observer);
  const std::vector<int32_t> tokens = RandomTokens(9, 8);
  LogitsAfter(engine.get(), tokens, 9);
  EXPECT_EQ(observer.rows_.size(), engine->model().layers().size());
  for (const auto& [layer, rows] : observer.rows_) {
    EXPECT_EQ(rows, layer + 1 == engine->model().layers().size() ? 1 : 9) << layer;
    EXPECT_GT(observer.energy_[layer], 0) << layer;
  }
}

class EncoderTest : public ::testing::Test {
 protected:
  void SetUp() override { ASSERT_TRUE(WriteTinyBert(directory_.path()).ok()); }

  static std::vector<float> Embedding(Engine* engine, const std::vector<int32_t>& tokens) {
    const SequenceId sequence = *engine->AddSequence(static_cast<int64_t>(tokens.size()));
    const auto result =
        engine->Step({{{.sequence = sequence, .tokens = tokens, .output = Output::kEmbedding}}});
    EXPECT_TRUE(result.ok()) << result.status();
    engine->RemoveSequence(sequence);
    return {result->entries[0].values.begin(), result->entries[0].values.end()};
  }

  const TemporaryDirectory directory_;
};

TEST_F(EncoderTest, CpuEmbeddingsEqualTheReferences) {
  const auto reference = MakeEngine(directory_.path(), MakeReferenceBackend());
  const auto cpu = MakeEngine(directory_.path(), CpuBackend(KvCacheType::kFloat32));
  const std::vector<int32_t> tokens = *cpu->tokenizer().Encode("the quick brown fox", true);
  const std::vector<float> embedding = Embedding(cpu.get(), tokens);
  EXPECT_LT(MaxDifference(embedding, Embedding(reference.get(), tokens)), 1e-5);
  double norm = 0;
  for (const float value : embedding) norm += value * value;
  EXPECT_NEAR(norm, 1, 1e-5);
}

TEST_F(EncoderTest, ABatchEqualsItsSentencesAlone) {
  const auto engine = MakeEngine(directory_.path(), CpuBackend());
  std::vector<std::vector<int32_t>> sentences;
  for (const char* text : {"one", "two words", "a third sentence, longer than the others"}) {
    sentences.push_back(*engine->tokenizer().Encode(text, true));
  }
  StepPlan plan;
  for (const auto& tokens : sentences) {
    plan.entries.push_back(
        {.sequence = *engine->AddSequence(64), .tokens = tokens, .output = Output::kEmbedding});
  }
  const auto result = engine->Step(plan);
  ASSERT_TRUE(result.ok()) << result.status();
  std::vector<std::vector<float>> together;
  for (const auto& entry : result->entries) {
    together.emplace_back(entry.values.begin(), entry.values.end());
  }
  for (size_t i = 0; i < sentences.size(); ++i) {
    EXPECT_LT(MaxDifference(together[i], Embedding(engine.get(), sentences[i])), 1e-4);
  }
}

TEST_F(EncoderTest, AnEncoderHasNoLogits) {
  const auto engine = MakeEngine(directory_.path(), MakeReferenceBackend());
  const SequenceId sequence = *engine->AddSequence(4);
  const std::vector<int32_t> tokens = {2, 5, 3};
  EXPECT_THAT(
      std::string(
          engine->Step({{{.sequence = sequence, .tokens = tokens, .output = Output::kLastLogits}}})
              .status()
              .message()),
      HasSubstr("encoder"));
}

}  // namespace
}  // namespace nestor
