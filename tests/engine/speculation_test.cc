#include "engine/speculation.h"

#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "tests/testing/temporary_directory.h"
#include "tests/testing/tiny_nested_model.h"

namespace nestor {
namespace {

constexpr int64_t kLength = 128;
using Output = StepEntry::Output;

absl::StatusOr<std::unique_ptr<Backend>> MakeCpu() { return MakeCpuBackend({.num_threads = 2}); }

// A tiny model with residual and prefix levels, on the CPU: the real arithmetic.
class SpeculationTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    directory_ = std::make_unique<TemporaryDirectory>();
    ASSERT_TRUE(WriteTinyNestedModel(directory_->path()).ok());
    auto model = NestedModel::Open(directory_->path() + "/nested");
    ASSERT_TRUE(model.ok()) << model.status();
    auto engine = Engine::Create(*std::move(model), *MakeCpu(), {.max_sequences = 4});
    ASSERT_TRUE(engine.ok()) << engine.status();
    engine_ = *std::move(engine);
  }
  static void TearDownTestSuite() {
    engine_.reset();
    directory_.reset();
  }

  static int num_levels() { return static_cast<int>(engine_->model().levels().size()); }

  static StepResult::Entry Step(SequenceId sequence, std::span<const int32_t> tokens, int level,
                                Output output) {
    const auto result = engine_->Step(
        {{{.sequence = sequence, .tokens = tokens, .level = level, .output = output}}});
    EXPECT_TRUE(result.ok()) << result.status();
    EXPECT_TRUE(result->entries[0].status.ok());
    return result->entries[0];
  }

  static std::vector<int32_t> Prompt() {
    return *engine_->tokenizer().Encode("hello world", false);
  }

  static std::vector<int32_t> Plain(const SamplingOptions& options, int level, size_t count) {
    const std::vector<int32_t> prompt = Prompt();
    const SequenceId sequence = *engine_->AddSequence(kLength);
    Sampler sampler(options);
    sampler.AddContext(prompt);
    std::vector<int32_t> tokens = {
        sampler.Sample(Step(sequence, prompt, level, Output::kLastLogits).values)};
    while (tokens.size() < count) {
      const auto ran = Step(sequence, std::span(tokens).last(1), level, Output::kLastLogits);
      tokens.push_back(sampler.Sample(ran.values));
    }
    engine_->RemoveSequence(sequence);
    return tokens;
  }

  struct Speculated {
    std::vector<int32_t> tokens;
    int64_t drafted = 0;
    int64_t accepted = 0;
  };
  // `taken_each`: tokens taken of a round at most, as where a reader pauses.
  static Speculated Speculate(const SamplingOptions& options, SpeculativeRound::Shape shape,
                              size_t count, int64_t taken_each = kMaxDrafts + 1) {
    const std::vector<int32_t> prompt = Prompt();
    shape.sequence = *engine_->AddSequence(kLength);
    Sampler sampler(options);
    sampler.AddContext(prompt);
    Speculated result;
    std::vector<int32_t>& tokens = result.tokens;
    tokens.push_back(sampler.Sample(
        Step(shape.sequence, prompt, shape.verify_level, Output::kLastLogits).values));
    SpeculativeRound round(engine_.get());
    while (tokens.size() < count) {
      shape.token = tokens.back();
      const absl::Status status = round.Run(shape, &sampler);
      EXPECT_TRUE(status.ok()) << status;
      EXPECT_TRUE(round.sequence_status().ok());
      bool goes_on = true;
      while (goes_on && tokens.size() < count && round.num_drawn() < taken_each) {
        tokens.push_back(sampler.Sample(round.logits()));
        goes_on = round.Accept(tokens.back());
      }
      round.Settle();
      EXPECT_EQ(engine_->LengthOf(shape.sequence),
                static_cast<int64_t>(prompt.size() + tokens.size()) - 1);
      result.drafted += round.num_drafted();
      result.accepted += round.num_accepted();
    }
    engine_->RemoveSequence(shape.sequence);
    return result;
  }

  inline static std::unique_ptr<TemporaryDirectory> directory_;
  inline static std::unique_ptr<Engine> engine_;
};

TEST_F(SpeculationTest, ManyRowsGiveTheBitsOfSingleOnesAtEveryLevel) {
  const std::vector<int32_t> prompt = Prompt();
  std::vector<int32_t> tokens;
  for (int32_t i = 0; i < kMaxDrafts + 1; ++i) tokens.push_back(17 * i + 3);
  for (int level = 0; level < num_levels(); ++level) {
    const SequenceId one = *engine_->AddSequence(kLength);
    const SequenceId all = *engine_->AddSequence(kLength);
    Step(one, prompt, level, Output::kNone);
    Step(all, prompt, level, Output::kNone);
    std::vector<std::vector<float>> expected;
    for (const int32_t& token : tokens) {
      const auto ran = Step(one, {&token, 1}, level, Output::kLastLogits);
      expected.emplace_back(ran.values.begin(), ran.values.end());
    }
    // What lower levels leave in the cache is overwritten.
    Step(all, tokens, 0, Output::kNone);
    engine_->Truncate(all, static_cast<int64_t>(prompt.size()));
    const auto ran = Step(all, tokens, level, Output::kAllLogits);
    const size_t vocabulary = expected[0].size();
    ASSERT_EQ(ran.values.size(), tokens.size() * vocabulary);
    for (size_t i = 0; i < tokens.size(); ++i) {
      const auto row = ran.values.subspan(i * vocabulary, vocabulary);
      EXPECT_EQ(std::vector<float>(row.begin(), row.end()), expected[i])
          << "level " << level << ", row " << i;
    }
    engine_->RemoveSequence(one);
    engine_->RemoveSequence(all);
  }
}

TEST_F(SpeculationTest, TokensAreThoseOfPlainDecoding) {
  int64_t rejected = 0;
  int64_t accepted = 0;
  for (const SamplingOptions& options :
       {SamplingOptions{}, SamplingOptions{.temperature = 0.7, .seed = 1},
        SamplingOptions{.temperature = 1.3, .top_k = 20, .seed = 2},
        SamplingOptions{.temperature = 1, .top_p = 0.8, .seed = 3},
        SamplingOptions{.repetition_penalty = 1.3},
        SamplingOptions{.temperature = 1, .repetition_penalty = 1.3, .seed = 4}}) {
    for (const int verify_level : {num_levels() - 1, 2}) {
      const std::vector<int32_t> plain = Plain(options, verify_level, 60);
      for (const int64_t num_drafts : {1, 3, 8}) {
        const Speculated speculated = Speculate(
            options, {.draft_level = 0, .verify_level = verify_level, .num_drafts = num_drafts},
            60);
        EXPECT_EQ(speculated.tokens, plain);
        accepted += speculated.accepted;
        rejected += speculated.drafted - speculated.accepted;
      }
    }
  }
  EXPECT_GT(accepted, 100);
  EXPECT_GT(rejected, 100);
}

TEST_F(SpeculationTest, ARoundMayEndBeforeWhatItAccepted) {
  const SamplingOptions options = {.temperature = 0.5, .seed = 9};
  const int full = num_levels() - 1;
  EXPECT_EQ(Speculate(options, {.draft_level = full, .verify_level = full, .num_drafts = 5}, 50,
                      /*taken_each=*/2)
                .tokens,
            Plain(options, full, 50));
}

TEST_F(SpeculationTest, AModelAgreesWithItself) {
  const int full = num_levels() - 1;
  const Speculated speculated =
      Speculate({.temperature = 1, .seed = 9},
                {.draft_level = full, .verify_level = full, .num_drafts = 4}, 51);
  EXPECT_EQ(speculated.drafted, 40);
  EXPECT_EQ(speculated.accepted, 40);
}

TEST_F(SpeculationTest, ARoundNamesItsSteps) {
  const int full = num_levels() - 1;
  const std::vector<int32_t> prompt = Prompt();
  const SequenceId sequence = *engine_->AddSequence(kLength);
  Step(sequence, prompt, full, Output::kNone);
  Sampler sampler({});
  SpeculativeRound round(engine_.get());
  ASSERT_TRUE(
      round.Run({.sequence = sequence, .token = 5, .verify_level = full, .num_drafts = 2}, &sampler)
          .ok());
  ASSERT_EQ(round.steps().size(), 3u);
  EXPECT_EQ(round.steps()[1].level, 0);
  EXPECT_EQ(round.steps()[1].rows, 1);
  EXPECT_EQ(round.steps()[2].level, full);
  EXPECT_EQ(round.steps()[2].rows, 3);
  EXPECT_EQ(round.steps()[2].weight_bytes, engine_->model().levels().back().cost.weight_bytes);
  engine_->RemoveSequence(sequence);
}

TEST_F(SpeculationTest, ARoundBeyondTheReservationIsRefused) {
  const std::vector<int32_t> prompt = Prompt();
  const SequenceId sequence = *engine_->AddSequence(static_cast<int64_t>(prompt.size()) + 2);
  Step(sequence, prompt, 0, Output::kNone);
  Sampler sampler({});
  SpeculativeRound round(engine_.get());
  EXPECT_TRUE(absl::IsInvalidArgument(
      round.Run({.sequence = sequence, .token = 5, .num_drafts = 2}, &sampler)));
  engine_->RemoveSequence(sequence);
}

}  // namespace
}  // namespace nestor
