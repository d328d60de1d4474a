#include "compress/quantise.h"

#include <cmath>
#include <random>

#include "base/bfloat16.h"
#include "compress/error_feedback.h"
#include "gtest/gtest.h"
#include "kernels/nested_linear.h"

namespace nestor {
namespace {

std::vector<float> RandomValues(int64_t size, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal(0.0f, 0.3f);
  std::vector<float> values(static_cast<size_t>(size));
  for (float& value : values) value = normal(random);
  return values;
}

TEST(SplitTest, EveryCodeComesBackFromItsTwoNibbles) {
  for (int code = -128; code <= 119; ++code) {
    const auto [hi, lo] = Split(code);
    EXPECT_EQ(16 * hi + lo, code);
    EXPECT_GE(hi, -8);
    EXPECT_LE(hi, 7);
    EXPECT_GE(lo, -8);
    EXPECT_LE(lo, 7);
  }
}

TEST(QuantisePlanesTest, EveryCodeIsStoredAsTheFormatSays) {
  // A scale of exactly 1: absmax 119, and all the codes as weights.
  for (int code = -119; code <= 119; ++code) {
    const std::vector<float> weights = {119.0f, static_cast<float>(code)};
    const Planes planes = QuantisePlanes(weights, 1, 2);
    ASSERT_EQ(FloatFromBfloat16(planes.scales[0]), 1.0f);
    const int hi = (planes.coarse[0] >> 4) - 8;
    const int lo = (planes.fine[0] >> 4) - 8;
    EXPECT_EQ(16 * hi + lo, code);
    EXPECT_EQ(planes.coarse[0] & 15, 7 + 8);
    EXPECT_EQ(planes.fine[0] & 15, 7 + 8);
    EXPECT_EQ(DequantiseDense(planes)[1], static_cast<float>(code));
    EXPECT_EQ(DequantiseCoarse(planes)[1], static_cast<float>(16 * hi));
  }
}

TEST(QuantisePlanesTest, PaddingIsEight) {
  const Planes planes = QuantisePlanes(RandomValues(3 * 33, 1), 3, 33);
  ASSERT_EQ(planes.coarse.size(), 3u * 32);
  ASSERT_EQ(planes.scales.size(), 6u);
  for (size_t row = 0; row < 3; ++row) {
    EXPECT_EQ(planes.coarse[row * 32 + 16] >> 4, 8);
    EXPECT_EQ(planes.fine[row * 32 + 16] >> 4, 8);
    for (size_t j = 17; j < 32; ++j) {
      EXPECT_EQ(planes.coarse[row * 32 + j], 0x88);
      EXPECT_EQ(planes.fine[row * 32 + j], 0x88);
    }
  }
}

TEST(QuantisePlanesTest, DenseIsWithinHalfAStepMiddleWithinThreeAndCoarseWithinNine) {
  constexpr int64_t kOut = 37, kIn = 100;
  const std::vector<float> weights = RandomValues(kOut * kIn, 2);
  const Planes planes = QuantisePlanes(weights, kOut, kIn);
  const std::vector<float> dense = DequantiseDense(planes);
  const std::vector<float> middle = DequantiseMiddle(planes);
  const std::vector<float> coarse = DequantiseCoarse(planes);
  ASSERT_EQ(planes.middle.size(), static_cast<size_t>(kOut * PaddedToGroup(kIn) / 4));
  for (int64_t i = 0; i < kOut; ++i) {
    for (int64_t j = 0; j < kIn; ++j) {
      const size_t index = static_cast<size_t>(i * kIn + j);
      const float scale = FloatFromBfloat16(
          planes.scales[static_cast<size_t>(i * NumGroups(kIn) + j / kGroupSize)]);
      // Rounding the scale to bf16 may clip the extreme by 119 * 2^-9 of a step.
      EXPECT_NEAR(dense[index], weights[index], 0.75f * scale);
      // Its hi is that of the rounded code, whose half a step may be beyond the outermost mid's.
      EXPECT_NEAR(middle[index], weights[index], 2.75f * scale);
      EXPECT_NEAR(coarse[index], weights[index], 8.75f * scale);
    }
  }
}

TEST(QuantisePlanesTest, ZeroGroupsStayZero) {
  std::vector<float> weights = RandomValues(2 * 64, 3);
  for (size_t j = 32; j < 64; ++j) weights[j] = 0;
  const Planes planes = QuantisePlanes(weights, 2, 64, std::vector<float>(64, 1.0f));
  const std::vector<float> dense = DequantiseDense(planes);
  for (size_t j = 32; j < 64; ++j) EXPECT_EQ(dense[j], 0.0f);
  EXPECT_NE(dense[64], 0.0f);
}

TEST(QuantisePlanesTest, InputEnergiesLowerTheWeightedErrorOfTheCoarsePlane) {
  constexpr int64_t kOut = 64, kIn = 96;
  const std::vector<float> weights = RandomValues(kOut * kIn, 4);
  std::vector<float> energies = RandomValues(kIn, 5);
  for (float& energy : energies) energy = energy * energy;
  const auto error = [&](const std::vector<float>& approximation) {
    double sum = 0;
    for (size_t i = 0; i < weights.size(); ++i) {
      sum += energies[i % kIn] * std::pow(weights[i] - approximation[i], 2);
    }
    return sum;
  };
  const Planes plain = QuantisePlanes(weights, kOut, kIn);
  const Planes searched = QuantisePlanes(weights, kOut, kIn, energies);
  EXPECT_LT(error(DequantiseCoarse(searched)), 0.95 * error(DequantiseCoarse(plain)));
  EXPECT_LT(error(DequantiseDense(searched)), 2 * error(DequantiseDense(plain)));
}

// Inputs of different energy that share three directions.
std::vector<double> CorrelatedMoment(int64_t in, uint64_t seed) {
  std::vector<double> moment(static_cast<size_t>(in * in));
  const std::vector<float> directions = RandomValues(3 * in, seed);
  for (int64_t i = 0; i < in; ++i) {
    for (int64_t j = 0; j < in; ++j) {
      double& sum = moment[static_cast<size_t>(i * in + j)];
      if (i == j) sum = 0.1 * static_cast<double>(1 + i % 5);
      for (int64_t k = 0; k < 3; ++k) {
        sum += directions[static_cast<size_t>(k * in + i)] *
               directions[static_cast<size_t>(k * in + j)] * 4;
      }
    }
  }
  return moment;
}

TEST(QuantisePlanesTest, FeedbackLowersTheOutputErrorOfTheCoarsePlaneAndKeepsTheFullOneFine) {
  constexpr int64_t kOut = 64, kIn = 100;
  const std::vector<float> weights = RandomValues(kOut * kIn, 7);
  const std::vector<double> moment = CorrelatedMoment(kIn, 8);
  std::vector<float> energies;
  for (int64_t j = 0; j < kIn; ++j) {
    energies.push_back(static_cast<float>(moment[static_cast<size_t>(j * kIn + j)]));
  }
  const auto error = [&](const std::vector<float>& approximation) {
    double sum = 0;
    for (int64_t i = 0; i < kOut * kIn; i += kIn) {
      for (int64_t j = 0; j < kIn * kIn; ++j) {
        const auto first = static_cast<size_t>(i + j / kIn);
        const auto second = static_cast<size_t>(i + j % kIn);
        sum += moment[static_cast<size_t>(j)] * (weights[first] - approximation[first]) *
               (weights[second] - approximation[second]);
      }
    }
    return sum;
  };
  const absl::StatusOr<ErrorFeedback> feedback = ErrorFeedback::Of(moment, kIn);
  ASSERT_TRUE(feedback.ok()) << feedback.status();
  const Planes nearest = QuantisePlanes(weights, kOut, kIn, energies);
  const Planes fed = QuantisePlanes(weights, kOut, kIn, energies, &*feedback);
  EXPECT_LT(error(DequantiseCoarse(fed)), 0.7 * error(DequantiseCoarse(nearest)));
  EXPECT_LT(error(DequantiseDense(fed)), 1.5 * error(DequantiseDense(nearest)));
  // Two bits more are a quarter of the step.
  EXPECT_LT(error(DequantiseMiddle(nearest)), 0.1 * error(DequantiseCoarse(nearest)));
  EXPECT_LT(error(DequantiseMiddle(fed)), 0.2 * error(DequantiseCoarse(fed)));
  EXPECT_LT(error(DequantiseMiddle(fed)), error(DequantiseMiddle(nearest)));
}

TEST(QuantisePlanesTest, WithFeedbackCodesStayInRangeAndPaddingIsEight) {
  constexpr int64_t kOut = 64, kIn = 100;
  const std::vector<float> weights = RandomValues(kOut * kIn, 9);
  const std::vector<double> moment = CorrelatedMoment(kIn, 10);
  const absl::StatusOr<ErrorFeedback> feedback = ErrorFeedback::Of(moment, kIn);
  ASSERT_TRUE(feedback.ok()) << feedback.status();
  const Planes planes =
      QuantisePlanes(weights, kOut, kIn, std::vector<float>(kIn, 1.0f), &*feedback);
  int num_negative_scales = 0;
  for (int64_t i = 0; i < kOut; ++i) {
    for (int64_t j = 0; j < PaddedToGroup(kIn); ++j) {
      const int64_t index = i * PaddedToGroup(kIn) + j;
      const int shift = j % 2 == 0 ? 0 : 4;
      const int hi = ((planes.coarse[static_cast<size_t>(index / 2)] >> shift) & 15) - 8;
      const int lo = ((planes.fine[static_cast<size_t>(index / 2)] >> shift) & 15) - 8;
      if (j >= kIn) {
        EXPECT_EQ(hi, 0);
        EXPECT_EQ(lo, 0);
        continue;
      }
      // The kernels add both nibbles in a byte: 16 hi + lo + 128 must not fall below 0.
      EXPECT_GE(16 * hi + lo, -128);
      const int mid = planes.middle[static_cast<size_t>(index / 4)] >> (2 * (index % 4)) & 3;
      EXPECT_GE(16 * hi + 4 * mid - 6, -128);
      const float scale = FloatFromBfloat16(
          planes.scales[static_cast<size_t>(i * NumGroups(kIn) + j / kGroupSize)]);
      num_negative_scales += scale < 0 ? 1 : 0;
      const float code = weights[static_cast<size_t>(i * kIn + j)] / scale;
      if (code > -128 && code < 119) {
        EXPECT_LE(std::fabs(code - static_cast<float>(16 * hi)), 9.51f);
      }
    }
  }
  EXPECT_GT(num_negative_scales, 0);
}

TEST(QuantiseFactorTest, ValuesComeBackWithinHalfAStepAndPaddingIsZero) {
  constexpr int64_t kRank = 5, kSize = 45;
  const std::vector<float> values = RandomValues(kRank * kSize, 6);
  const FactorCodes factor = QuantiseFactor(values, kRank, kSize);
  ASSERT_EQ(factor.codes.size(), 5u * 64);
  ASSERT_EQ(factor.scales.size(), 10u);
  const std::vector<float> restored = DequantiseFactor(factor);
  for (int64_t k = 0; k < kRank; ++k) {
    for (int64_t j = 0; j < kSize; ++j) {
      const float scale =
          FloatFromBfloat16(factor.scales[static_cast<size_t>(k * 2 + j / kGroupSize)]);
      const size_t index = static_cast<size_t>(k * kSize + j);
      EXPECT_NEAR(restored[index], values[index], 0.75f * scale);
    }
    for (int64_t j = kSize; j < 64; ++j) {
      EXPECT_EQ(factor.codes[static_cast<size_t>(k * 64 + j)], 0);
    }
  }
}

}  // namespace
}  // namespace nestor
