#include "engine/sampler.h"

#include <cmath>
#include <limits>
#include <map>
#include <random>
#include <set>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace nestor {
namespace {

using ::testing::HasSubstr;

std::vector<float> RandomLogits(size_t size, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, 2);
  std::vector<float> logits(size);
  for (float& logit : logits) logit = normal(random);
  return logits;
}

TEST(SamplerTest, GreedyTakesTheHighestAndTheFirstOfEquals) {
  std::vector<float> logits = RandomLogits(1003, 1);
  logits[700] = logits[100] = 50;
  Sampler sampler({});
  EXPECT_EQ(sampler.Sample(logits), 100);
}

TEST(SamplerTest, GreedyFindsTheHighestAtEveryPlace) {
  for (size_t place = 0; place < 37; ++place) {
    std::vector<float> logits = RandomLogits(37, 2);
    logits[place] = 100;
    Sampler sampler({});
    EXPECT_EQ(sampler.Sample(logits), static_cast<int32_t>(place));
  }
}

TEST(SamplerTest, FrequenciesFollowTheSoftmax) {
  const std::vector<float> logits = {0.5f, -1.0f, 2.0f, 1.0f};
  constexpr double kTemperature = 0.7;
  constexpr int kDraws = 40000;
  Sampler sampler({.temperature = kTemperature, .seed = 7});
  std::map<int32_t, int> counts;
  for (int i = 0; i < kDraws; ++i) ++counts[sampler.Sample(logits)];
  double total = 0;
  for (const float logit : logits) total += std::exp(logit / kTemperature);
  for (size_t i = 0; i < logits.size(); ++i) {
    const double p = std::exp(logits[i] / kTemperature) / total;
    // Four standard deviations of a binomial count.
    EXPECT_NEAR(counts[static_cast<int32_t>(i)], kDraws * p, 4 * std::sqrt(kDraws * p * (1 - p)));
  }
}

TEST(SamplerTest, TheSameSeedDrawsTheSameTokens) {
  const std::vector<float> logits = RandomLogits(500, 3);
  Sampler first({.temperature = 1, .seed = 5});
  Sampler second({.temperature = 1, .seed = 5});
  Sampler other({.temperature = 1, .seed = 6});
  int differences = 0;
  for (int i = 0; i < 50; ++i) {
    const int32_t token = first.Sample(logits);
    EXPECT_EQ(token, second.Sample(logits));
    differences += token != other.Sample(logits);
  }
  EXPECT_GT(differences, 10);
}

TEST(SamplerTest, TopKDrawsOnlyTheHighest) {
  const std::vector<float> logits = {1, 5, 3, 4, 2};
  Sampler sampler({.temperature = 2, .top_k = 2, .seed = 1});
  std::set<int32_t> drawn;
  for (int i = 0; i < 300; ++i) drawn.insert(sampler.Sample(logits));
  EXPECT_EQ(drawn, (std::set<int32_t>{1, 3}));
}

TEST(SamplerTest, TopPDrawsTheSmallestSetThatReachesIt) {
  // Probabilities 0.5, 0.3, 0.15, 0.05.
  const std::vector<float> logits = {std::log(0.15f), std::log(0.5f), std::log(0.05f),
                                     std::log(0.3f)};
  Sampler sampler({.temperature = 1, .top_p = 0.7, .seed = 1});
  std::set<int32_t> drawn;
  for (int i = 0; i < 300; ++i) drawn.insert(sampler.Sample(logits));
  EXPECT_EQ(drawn, (std::set<int32_t>{1, 3}));
}

TEST(SamplerTest, TheRepetitionPenaltyCountsThePromptAndWhatWasSampled) {
  const std::vector<float> logits = {3.0f, 2.9f, 2.8f, -1.0f};
  Sampler sampler({.repetition_penalty = 1.5});
  const std::vector<int32_t> prompt = {0};
  sampler.AddContext(prompt);
  EXPECT_EQ(sampler.Sample(logits), 1);  // 0 counts 2.0
  EXPECT_EQ(sampler.Sample(logits), 2);  // 1 counts 1.93
}

TEST(SamplingOptionsTest, EveryFieldOutOfRangeIsNamed) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  EXPECT_TRUE(Validate(SamplingOptions{}).ok());
  EXPECT_THAT(std::string(Validate(SamplingOptions{.temperature = -1}).message()),
              HasSubstr("temperature"));
  EXPECT_FALSE(Validate(SamplingOptions{.temperature = nan}).ok());
  EXPECT_THAT(std::string(Validate(SamplingOptions{.top_k = -1}).message()), HasSubstr("top_k"));
  EXPECT_THAT(std::string(Validate(SamplingOptions{.top_p = 0}).message()), HasSubstr("top_p"));
  EXPECT_FALSE(Validate(SamplingOptions{.top_p = nan}).ok());
  EXPECT_THAT(std::string(Validate(SamplingOptions{.repetition_penalty = 0}).message()),
              HasSubstr("repetition_penalty"));
}

TEST(StopMatcherTest, TextBeforeTheStopIsShown) {
  StopMatcher matcher({"END"});
  EXPECT_EQ(matcher.Push("hello END world"), "hello ");
  EXPECT_TRUE(matcher.matched());
  EXPECT_EQ(matcher.Push("more"), "");
  EXPECT_EQ(matcher.Flush(), "");
}

TEST(StopMatcherTest, AStopAcrossTokensIsFound) {
  StopMatcher matcher({"\n\nQ:", "END"});
  EXPECT_EQ(matcher.Push("a\n"), "a");
  EXPECT_EQ(matcher.Push("\nQ"), "");
  EXPECT_EQ(matcher.Push(":"), "");
  EXPECT_TRUE(matcher.matched());
}

TEST(StopMatcherTest, AHeldTailIsShownOnceItCannotMatch) {
  StopMatcher matcher({"abcd"});
  EXPECT_EQ(matcher.Push("xabc"), "x");
  EXPECT_EQ(matcher.Push("e"), "abce");
  EXPECT_EQ(matcher.Push("ab"), "");
  EXPECT_EQ(matcher.Flush(), "ab");
  EXPECT_FALSE(matcher.matched());
}

TEST(StopMatcherTest, TheFirstOfTwoStopsWins) {
  StopMatcher matcher({"later", "now"});
  EXPECT_EQ(matcher.Push("do it now or later"), "do it ");
}

}  // namespace
}  // namespace nestor
