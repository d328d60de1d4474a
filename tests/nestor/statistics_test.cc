#include "nestor/statistics.h"

#include <cmath>
#include <vector>

#include "gtest/gtest.h"

namespace nestor {
namespace {

TEST(MedianTest, IsTheMiddleOrTheMeanOfTheTwoInTheMiddle) {
  EXPECT_EQ(Median({5, 1, 100}), 5);
  EXPECT_EQ(Median({4, 1, 2, 100}), 3);
  EXPECT_EQ(Median({7}), 7);
}

TEST(CosineSimilarityTest, KnowsAnglesAndIgnoresLengths) {
  const std::vector<float> a = {3, 4};
  const std::vector<float> opposite = {-6, -8};
  const std::vector<float> right = {-4, 3};
  const std::vector<float> other = {4, 3};
  EXPECT_DOUBLE_EQ(CosineSimilarity(a, a), 1);
  EXPECT_DOUBLE_EQ(CosineSimilarity(a, opposite), -1);
  EXPECT_DOUBLE_EQ(CosineSimilarity(a, right), 0);
  EXPECT_DOUBLE_EQ(CosineSimilarity(a, other), 0.96);
}

TEST(CosineSimilarityTest, OfNothingIsZero) {
  const std::vector<float> a = {3, 4};
  const std::vector<float> zero = {0, 0};
  EXPECT_EQ(CosineSimilarity(a, zero), 0);
}

TEST(PerplexityTest, OfEqualChancesIsTheirNumber) {
  const std::vector<double> quarters(10, std::log(0.25));
  EXPECT_DOUBLE_EQ(Perplexity(quarters), 4);
  const std::vector<double> mixed = {std::log(0.5), std::log(0.125)};
  EXPECT_DOUBLE_EQ(Perplexity(mixed), 4);
}

}  // namespace
}  // namespace nestor
