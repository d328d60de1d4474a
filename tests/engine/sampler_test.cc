#include "engine/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <random>
#include <set>

#include "engine/gumbel_noise.h"
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

std::vector<double> Softmax(const std::vector<float>& logits, double temperature) {
  std::vector<double> weights;
  double total = 0;
  for (const float logit : logits) {
    weights.push_back(std::exp(logit / temperature));
    total += weights.back();
  }
  for (double& weight : weights) weight /= total;
  return weights;
}

// Pearson's statistic of `counts` against `probabilities`.
double ChiSquare(const std::vector<int>& counts, const std::vector<double>& probabilities,
                 int draws) {
  double sum = 0;
  for (size_t i = 0; i < counts.size(); ++i) {
    const double expected = draws * probabilities[i];
    sum += (counts[i] - expected) * (counts[i] - expected) / expected;
  }
  return sum;
}

TEST(SamplerTest, FrequenciesAlongAGenerationPassTheChiSquareTest) {
  // Blocks of noise of 16, one of them not full.
  const std::vector<float> logits = RandomLogits(40, 8);
  const std::vector<double> probabilities = Softmax(logits, 1.5);
  constexpr int kDraws = 100000;
  for (const uint64_t seed : {1u, 2u, 3u}) {
    Sampler sampler({.temperature = 1.5, .seed = seed});
    std::vector<int> counts(logits.size());
    for (int i = 0; i < kDraws; ++i) ++counts[static_cast<size_t>(sampler.Sample(logits))];
    EXPECT_LT(ChiSquare(counts, probabilities, kDraws), 72.1);  // 0.1 % of 39 degrees of freedom
  }
}

TEST(SamplerTest, FrequenciesOverSeedsPassTheChiSquareTest) {
  const std::vector<float> logits = RandomLogits(40, 9);
  const std::vector<double> probabilities = Softmax(logits, 1.5);
  constexpr int kDraws = 100000;
  std::vector<int> counts(logits.size());
  for (uint64_t seed = 0; seed < kDraws; ++seed) {
    Sampler sampler({.temperature = 1.5, .seed = seed});
    ++counts[static_cast<size_t>(sampler.Sample(logits))];
  }
  EXPECT_LT(ChiSquare(counts, probabilities, kDraws), 72.1);
}

TEST(SamplerTest, ADrawIsTheHighestLogitWithItsNoise) {
  for (const double temperature : {0.3, 1.0, 5.0}) {
    const std::vector<float> logits = RandomLogits(5003, 4);
    Sampler sampler({.temperature = temperature, .seed = 11});
    for (uint64_t index = 0; index < 100; ++index) {
      const GumbelNoise noise(11, index);
      int32_t best = 0;
      double best_value = -std::numeric_limits<double>::infinity();
      for (int32_t token = 0; token < 5003; ++token) {
        const double value = logits[static_cast<size_t>(token)] / temperature + noise.Of(token);
        if (value > best_value) best = token;
        best_value = std::max(value, best_value);
      }
      EXPECT_EQ(sampler.Sample(logits), best) << temperature << ", " << index;
    }
  }
}

TEST(SamplerTest, DrawsThatShareTheNoiseAgreeAsOftenAsTheBoundSays) {
  const std::vector<float> logits = RandomLogits(200, 5);
  std::vector<float> drafted = logits;
  std::mt19937 random(6);
  std::normal_distribution<float> error(0, 0.5);
  for (float& logit : drafted) logit += error(random);
  const std::vector<double> p = Softmax(logits, 1);
  const std::vector<double> q = Softmax(drafted, 1);
  double distance = 0;
  for (size_t i = 0; i < p.size(); ++i) distance += std::abs(p[i] - q[i]) / 2;
  constexpr int kDraws = 20000;
  Sampler sampler({.temperature = 1, .seed = 7});
  int agreements = 0;
  for (int i = 0; i < kDraws; ++i) {
    const int32_t draft = sampler.Peek(drafted, {});
    agreements += sampler.Sample(logits) == draft;
  }
  const double agreement = static_cast<double>(agreements) / kDraws;
  EXPECT_GT(agreement, (1 - distance) / (1 + distance) - 0.01);
  EXPECT_LT(agreement, 1 - distance + 0.01);
}

TEST(SamplerTest, PeekSeesWhatSampleWillDraw) {
  for (const SamplingOptions& options :
       {SamplingOptions{.repetition_penalty = 3},
        SamplingOptions{.temperature = 1, .repetition_penalty = 3, .seed = 3},
        SamplingOptions{.temperature = 1, .top_k = 40, .repetition_penalty = 3, .seed = 3},
        SamplingOptions{.temperature = 1, .top_p = 0.9, .repetition_penalty = 3, .seed = 3}}) {
    Sampler sampler(options);
    const std::vector<int32_t> prompt = {1, 2};
    sampler.AddContext(prompt);
    std::vector<std::vector<float>> logits;
    for (uint32_t i = 0; i < 12; ++i) logits.push_back(RandomLogits(60, 20 + i));
    std::vector<int32_t> ahead;
    for (const std::vector<float>& row : logits) ahead.push_back(sampler.Peek(row, ahead));
    for (size_t i = 0; i < logits.size(); ++i) EXPECT_EQ(sampler.Sample(logits[i]), ahead[i]);
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

TEST(SamplerTest, TopPFindsItsSetInAnyDistribution) {
  for (const double temperature : {0.1, 1.0, 30.0}) {
    const std::vector<float> logits = RandomLogits(700, 12);
    const std::vector<double> probabilities = Softmax(logits, temperature);
    std::vector<std::pair<double, int32_t>> sorted;
    for (size_t i = 0; i < logits.size(); ++i) {
      sorted.emplace_back(-probabilities[i], static_cast<int32_t>(i));
    }
    std::sort(sorted.begin(), sorted.end());
    std::set<int32_t> allowed;
    double sum = 0;
    for (size_t i = 0; i < sorted.size() && sum < 0.8; ++i) {
      sum -= sorted[i].first;
      allowed.insert(sorted[i].second);
    }
    Sampler sampler({.temperature = temperature, .top_p = 0.8, .seed = 2});
    std::set<int32_t> drawn;
    for (int i = 0; i < 3000; ++i) drawn.insert(sampler.Sample(logits));
    EXPECT_TRUE(std::includes(allowed.begin(), allowed.end(), drawn.begin(), drawn.end()));
    EXPECT_GT(static_cast<double>(drawn.size()), 0.8 * static_cast<double>(allowed.size()));
  }
}

TEST(SamplerTest, TopKOfAFlatDistributionIsExact) {
  std::vector<float> logits(300);
  for (size_t i = 0; i < logits.size(); ++i) logits[i] = static_cast<float>(i % 100) * 0.5f;
  Sampler sampler({.temperature = 100, .top_k = 7, .seed = 1});
  std::set<int32_t> drawn;
  for (int i = 0; i < 500; ++i) drawn.insert(sampler.Sample(logits));
  EXPECT_EQ(drawn, (std::set<int32_t>{97, 98, 99, 198, 199, 298, 299}));
}

TEST(SamplerTest, ATinyTemperatureIsGreedy) {
  const std::vector<float> logits = RandomLogits(500, 3);
  const int32_t likeliest = Sampler({}).Sample(logits);
  for (const double temperature : {1e-6, 1e-300}) {
    EXPECT_EQ(Sampler({.temperature = temperature, .seed = 1}).Sample(logits), likeliest);
    EXPECT_EQ(Sampler({.temperature = temperature, .top_p = 0.5}).Sample(logits), likeliest);
    EXPECT_EQ(Sampler({.temperature = temperature, .top_k = 3}).Sample(logits), likeliest);
  }
}

TEST(GumbelNoiseTest, TheBoundOfABlockHolds) {
  for (uint64_t index = 0; index < 1000; ++index) {
    const GumbelNoise noise(1, index);
    double highest = -100;
    for (int32_t token = 48; token < 64; ++token) highest = std::max(highest, noise.Of(token));
    EXPECT_LE(highest, noise.BoundOf(3));
  }
}

TEST(GumbelNoiseTest, ItsMeanAndVarianceAreThoseOfTheDistribution) {
  double sum = 0;
  double squares = 0;
  constexpr int kBlocks = 4000;
  const GumbelNoise noise(5, 2);
  for (int32_t token = 0; token < 16 * kBlocks; ++token) {
    const double value = noise.Of(token);
    sum += value;
    squares += value * value;
  }
  const double mean = sum / (16 * kBlocks);
  EXPECT_NEAR(mean, 0.5772, 0.02);
  EXPECT_NEAR(squares / (16 * kBlocks) - mean * mean, 1.6449, 0.05);
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
