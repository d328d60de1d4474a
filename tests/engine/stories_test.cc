// A real model with a known text: stories260K, where ../shared/data holds it.

#include <cmath>
#include <filesystem>

#include "base/file.h"
#include "engine/engine.h"
#include "engine/sampler.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "tests/testing/llama2c_import.h"
#include "tests/testing/temporary_directory.h"

namespace nestor {
namespace {

using ::testing::StartsWith;
using Output = StepEntry::Output;

constexpr const char* kData = NESTOR_SOURCE_DIR "/../shared/data/";
constexpr int32_t kBeginToken = 1;

class StoriesTest : public ::testing::Test {
 protected:
  void SetUp() override {
    const std::string folder = std::string(kData) + "stories260K/";
    if (!std::filesystem::exists(folder)) GTEST_SKIP() << folder << " is absent";
    ASSERT_TRUE(
        ImportLlama2c(folder + "stories260K.bin", folder + "tok512.bin", directory_.path()).ok());
    auto model = NestedModel::Open(directory_.path());
    ASSERT_TRUE(model.ok()) << model.status();
    auto backend = MakeCpuBackend({});
    ASSERT_TRUE(backend.ok()) << backend.status();
    auto engine = Engine::Create(*std::move(model), *std::move(backend), {});
    ASSERT_TRUE(engine.ok()) << engine.status();
    engine_ = *std::move(engine);
  }

  const TemporaryDirectory directory_;
  std::unique_ptr<Engine> engine_;
};

TEST_F(StoriesTest, GreedyTextIsTheKnownOne) {
  const SequenceId sequence = *engine_->AddSequence(64);
  Sampler sampler({});
  StreamingDecoder decoder(&engine_->tokenizer());
  std::string text;
  int32_t token = kBeginToken;
  for (int i = 0; i < 60; ++i) {
    const auto result = engine_->Step(
        {{{.sequence = sequence, .tokens = {&token, 1}, .output = Output::kLastLogits}}});
    ASSERT_TRUE(result.ok()) << result.status();
    token = sampler.Sample(result->entries[0].values);
    text += decoder.Push(token);
  }
  text += decoder.Flush();
  EXPECT_THAT(text, StartsWith("Once upon a time, there was a little girl named Lily. She loved to "
                               "play outside in the park. One day, she saw a big, red ball."));
}

TEST_F(StoriesTest, PerplexityIsTheKnownOne) {
  constexpr size_t kWindow = 512;
  constexpr size_t kNumWindows = 300;
  const std::string text = *ReadFile(std::string(kData) + "text/tinystories_val.txt");
  const std::vector<int32_t> tokens =
      *engine_->tokenizer().Encode(text, /*adds_special_tokens=*/false);
  ASSERT_GT(tokens.size(), kWindow * kNumWindows);
  double sum = 0;
  for (size_t window = 0; window < kNumWindows; ++window) {
    const std::span<const int32_t> part = std::span(tokens).subspan(window * kWindow, kWindow);
    std::vector<int32_t> targets(part.begin() + 1, part.end());
    targets.push_back(-1);
    const SequenceId sequence = *engine_->AddSequence(kWindow);
    const auto result = engine_->Step({{{.sequence = sequence,
                                         .tokens = part,
                                         .output = Output::kLogProbabilities,
                                         .targets = targets}}});
    ASSERT_TRUE(result.ok()) << result.status();
    for (const double value : result->entries[0].log_probabilities) sum += value;
    engine_->RemoveSequence(sequence);
  }
  EXPECT_NEAR(std::exp(-sum / (kNumWindows * (kWindow - 1))), 4.3, 0.4);
}

}  // namespace
}  // namespace nestor
