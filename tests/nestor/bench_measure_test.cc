#include "nestor/bench_measure.h"

#include <cstdio>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/reference/reference_backend.h"
#include "tests/testing/temporary_directory.h"
#include "tests/testing/tiny_checkpoint.h"

namespace nestor {
namespace {

using ::testing::ElementsAre;

TEST(MedianOfRoundsTest, JobsTakeTurnsAndTheFirstRoundDoesNotCount) {
  std::vector<std::string> order;
  std::vector<double> seconds_of_a = {1000, 3, 9, 1};
  std::vector<double> seconds_of_b = {2000, 4, 6, 5};
  const auto job = [&order](const std::string& name, std::vector<double>* seconds, int64_t tokens) {
    return [=, &order]() -> absl::StatusOr<Timing> {
      order.push_back(name);
      const double next = seconds->front();
      seconds->erase(seconds->begin());
      return Timing{
          .seconds = next, .tokens = tokens, .weight_bytes = 30 * tokens, .flops = 60 * tokens};
    };
  };
  Progress progress("test", 8);
  const auto medians =
      MedianOfRounds({job("a", &seconds_of_a, 12), job("b", &seconds_of_b, 20)}, 3, &progress);
  ASSERT_TRUE(medians.ok()) << medians.status();
  EXPECT_THAT(order, ElementsAre("a", "b", "a", "b", "a", "b", "a", "b"));
  EXPECT_EQ((*medians)[0].seconds, 3);
  EXPECT_EQ((*medians)[0].tokens_per_second(), 4);
  EXPECT_EQ((*medians)[0].weight_gbps(), 120e-9);
  EXPECT_EQ((*medians)[0].gflops(), 240e-9);
  EXPECT_EQ((*medians)[1].seconds, 5);
  EXPECT_EQ((*medians)[1].tokens_per_second(), 4);
}

TEST(MedianOfRoundsTest, AFailureEndsIt) {
  int runs = 0;
  Progress progress("test", 4);
  const auto medians = MedianOfRounds({[&runs]() -> absl::StatusOr<Timing> {
                                        ++runs;
                                        return absl::ResourceExhaustedError("no pages");
                                      }},
                                      3, &progress);
  EXPECT_EQ(medians.status(), absl::ResourceExhaustedError("no pages"));
  EXPECT_EQ(runs, 1);
}

std::unique_ptr<Engine> MakeEngine(const std::string& directory) {
  auto model = NestedModel::Open(directory);
  EXPECT_TRUE(model.ok()) << model.status();
  if (!model.ok()) return nullptr;
  auto engine = Engine::Create(*std::move(model), MakeReferenceBackend(),
                               {.max_step_rows = 16, .max_sequences = 8});
  EXPECT_TRUE(engine.ok()) << engine.status();
  return engine.ok() ? *std::move(engine) : nullptr;
}

class LanguageModelTimerTest : public ::testing::Test {
 protected:
  void SetUp() override {
    ASSERT_TRUE(WriteTinyLlama(directory_.path()).ok());
    engine_ = MakeEngine(directory_.path());
    ASSERT_NE(engine_, nullptr);
  }
  int64_t FullBytes() const { return engine_->model().levels().back().cost.weight_bytes; }
  // Of one token, without attention.
  int64_t FullFlops() const {
    const NestedModel& model = engine_->model();
    return model.levels().back().cost.flops - AttentionFlops(model.spec(), 128);
  }

  TemporaryDirectory directory_;
  std::unique_ptr<Engine> engine_;
};

TEST_F(LanguageModelTimerTest, DecodeCountsTokensAndOnePassOverTheWeightsForEachStep) {
  EngineTimer timer(engine_.get());
  const auto measured = timer.Decode({.levels = {0, 0, 0}, .context = 3, .steps = 4});
  ASSERT_TRUE(measured.ok()) << measured.status();
  EXPECT_EQ(measured->tokens, 12);
  EXPECT_EQ(measured->weight_bytes, 4 * FullBytes());
  EXPECT_EQ(measured->flops, 12 * FullFlops());
  EXPECT_GT(measured->seconds, 0);
  EXPECT_EQ(engine_->free_pages(), engine_->num_pages());
}

TEST_F(LanguageModelTimerTest, APromptRunsInChunksAndItsHeadOnce) {
  EngineTimer timer(engine_.get());
  const auto measured = timer.Prefill(0, 40);
  ASSERT_TRUE(measured.ok()) << measured.status();
  EXPECT_EQ(measured->tokens, 40);
  // 16 + 16 + 8 rows; the head runs in the last chunk at least.
  EXPECT_GT(measured->weight_bytes, FullBytes());
  EXPECT_LE(measured->weight_bytes, 3 * FullBytes());
  EXPECT_EQ(engine_->free_pages(), engine_->num_pages());
}

TEST_F(LanguageModelTimerTest, AFailureGivesTheSequencesBack) {
  EngineTimer timer(engine_.get());
  EXPECT_EQ(timer.Decode({.levels = {0, 7}, .context = 3, .steps = 4}).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(timer.Prefill(0, 1 << 20).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(engine_->free_pages(), engine_->num_pages());
}

TEST_F(LanguageModelTimerTest, AModelThatDraftsForItselfIsAlwaysRight) {
  EngineTimer timer(engine_.get());
  const std::vector<std::vector<int32_t>> prompts = {{1, 2, 3}, {4, 5}};
  const auto measured = timer.Speculate({.prompts = prompts, .num_drafts = 4, .tokens = 12});
  ASSERT_TRUE(measured.ok()) << measured.status();
  EXPECT_EQ(measured->acceptance(), 1);
  // Rounds of 5, 5 and 2 tokens.
  EXPECT_EQ(measured->decoding.tokens, 24);
  EXPECT_EQ(measured->verify_steps, 6);
  EXPECT_EQ(measured->draft_steps, 18);
  EXPECT_GT(measured->draft_step_seconds(), 0);
  EXPECT_EQ(engine_->free_pages(), engine_->num_pages());
}

TEST_F(LanguageModelTimerTest, NoDraftsArePlainSteps) {
  EngineTimer timer(engine_.get());
  const std::vector<std::vector<int32_t>> prompts = {{1, 2, 3}};
  const auto measured = timer.Speculate({.prompts = prompts, .tokens = 7});
  ASSERT_TRUE(measured.ok()) << measured.status();
  EXPECT_EQ(measured->decoding.tokens, 7);
  EXPECT_EQ(measured->verify_steps, 7);
  EXPECT_EQ(measured->draft_steps, 0);
  EXPECT_EQ(measured->acceptance(), 0);
}

TEST(EncoderTimerTest, TextsFillStepsUpToTheirRows) {
  TemporaryDirectory directory;
  ASSERT_TRUE(WriteTinyBert(directory.path()).ok());
  const std::unique_ptr<Engine> engine = MakeEngine(directory.path());
  ASSERT_NE(engine, nullptr);
  EngineTimer timer(engine.get());
  const std::vector<std::vector<int32_t>> texts(8, std::vector<int32_t>(5, 1));
  // Three texts of 5 tokens fit 16 rows: 8 texts take three steps, batches of 4 two each.
  for (const auto& [batch, steps] :
       {std::pair(1, 8), std::pair(2, 4), std::pair(4, 4), std::pair(8, 3), std::pair(100, 3)}) {
    const auto measured = timer.Embed(0, texts, batch);
    ASSERT_TRUE(measured.ok()) << measured.status();
    EXPECT_EQ(measured->tokens, 40);
    EXPECT_EQ(measured->weight_bytes, steps * engine->model().levels().back().cost.weight_bytes)
        << batch;
  }
}

TEST(EncoderTimerTest, ATextLongerThanAStepIsRefused) {
  TemporaryDirectory directory;
  ASSERT_TRUE(WriteTinyBert(directory.path()).ok());
  const std::unique_ptr<Engine> engine = MakeEngine(directory.path());
  ASSERT_NE(engine, nullptr);
  const std::vector<std::vector<int32_t>> texts = {{1, 2}, std::vector<int32_t>(17, 1)};
  EXPECT_EQ(EngineTimer(engine.get()).Embed(0, texts, 2).status().code(),
            absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace nestor
