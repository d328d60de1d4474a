#include "compress/error_feedback.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

#include "gtest/gtest.h"

namespace nestor {
namespace {

constexpr int64_t kOut = 300;  // more than one block of rows
constexpr int64_t kIn = 45;    // and of columns

std::vector<float> RandomWeights(uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal(0.0f, 3.0f);
  std::vector<float> weights(kOut * kIn);
  for (float& weight : weights) weight = normal(random);
  return weights;
}

// Of inputs that share a few directions, as a model's do, and differ in energy.
std::vector<double> CorrelatedMoment(uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<double> normal;
  std::vector<double> moment(kIn * kIn);
  std::vector<double> input(kIn);
  std::vector<double> directions(4 * kIn);
  for (double& value : directions) value = normal(random);
  for (int sample = 0; sample < 500; ++sample) {
    for (int64_t j = 0; j < kIn; ++j) {
      input[static_cast<size_t>(j)] = normal(random) * (1 + static_cast<double>(j % 7)) / 4;
    }
    for (int64_t k = 0; k < 4; ++k) {
      const double strength = normal(random);
      for (int64_t j = 0; j < kIn; ++j) {
        input[static_cast<size_t>(j)] += strength * directions[static_cast<size_t>(k * kIn + j)];
      }
    }
    for (int64_t i = 0; i < kIn; ++i) {
      for (int64_t j = 0; j < kIn; ++j) {
        moment[static_cast<size_t>(i * kIn + j)] +=
            input[static_cast<size_t>(i)] * input[static_cast<size_t>(j)] / 500;
      }
    }
  }
  return moment;
}

// GPTQ's equations as they stand, with an inverse that is updated column by column.
template <typename Round>
std::vector<double> ReferenceFeedback(const std::vector<float>& weights,
                                      const std::vector<double>& moment, Round round) {
  std::vector<int64_t> order(kIn);
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(),
            [&](int64_t a, int64_t b) { return moment[a * kIn + a] > moment[b * kIn + b]; });
  double energy = 0;
  for (int64_t j = 0; j < kIn; ++j) energy += moment[j * kIn + j];
  std::vector<double> left = moment;
  std::vector<double> inverse(kIn * kIn);
  for (int64_t j = 0; j < kIn; ++j) {
    left[j * kIn + j] += 0.01 * energy / kIn;
    inverse[j * kIn + j] = 1;
  }
  for (int64_t pivot = 0; pivot < kIn; ++pivot) {  // Gauss-Jordan
    const double scale = 1 / left[pivot * kIn + pivot];
    for (int64_t j = 0; j < kIn; ++j) {
      left[pivot * kIn + j] *= scale;
      inverse[pivot * kIn + j] *= scale;
    }
    for (int64_t i = 0; i < kIn; ++i) {
      const double factor = left[i * kIn + pivot];
      if (i == pivot) continue;
      for (int64_t j = 0; j < kIn; ++j) {
        left[i * kIn + j] -= factor * left[pivot * kIn + j];
        inverse[i * kIn + j] -= factor * inverse[pivot * kIn + j];
      }
    }
  }
  std::vector<double> values(weights.begin(), weights.end());
  for (const int64_t j : order) {
    const double diagonal = inverse[j * kIn + j];
    for (int64_t i = 0; i < kOut; ++i) {
      const double rounded = round(values[i * kIn + j]);
      const double share = (values[i * kIn + j] - rounded) / diagonal;
      for (int64_t k = 0; k < kIn; ++k) values[i * kIn + k] -= share * inverse[j * kIn + k];
      values[i * kIn + j] = rounded;
    }
    const std::vector<double> before = inverse;
    for (int64_t i = 0; i < kIn; ++i) {
      for (int64_t k = 0; k < kIn; ++k) {
        inverse[i * kIn + k] -= before[i * kIn + j] * before[j * kIn + k] / diagonal;
      }
    }
    // What is rounded is left alone from now on.
    for (int64_t k = 0; k < kIn; ++k) inverse[j * kIn + k] = inverse[k * kIn + j] = 0;
  }
  return values;
}

double OutputError(const std::vector<float>& a, const std::vector<float>& b,
                   const std::vector<double>& moment) {
  double sum = 0;
  for (int64_t i = 0; i < kOut; ++i) {
    for (int64_t j = 0; j < kIn; ++j) {
      for (int64_t k = 0; k < kIn; ++k) {
        sum += (a[i * kIn + j] - b[i * kIn + j]) * moment[j * kIn + k] *
               (a[i * kIn + k] - b[i * kIn + k]);
      }
    }
  }
  return sum;
}

TEST(ErrorFeedbackTest, IsWhatTheEquationsSay) {
  const std::vector<float> weights = RandomWeights(1);
  const std::vector<double> moment = CorrelatedMoment(2);
  // Smooth, so that noise does not turn into a whole step.
  const auto shrink = [](double value) { return 0.8 * value; };
  const std::vector<double> expected = ReferenceFeedback(weights, moment, shrink);
  const absl::StatusOr<ErrorFeedback> feedback = ErrorFeedback::Of(moment, kIn);
  ASSERT_TRUE(feedback.ok()) << feedback.status();
  std::vector<float> values = weights;
  feedback->Round(values.data(), kOut,
                  [&](int64_t, int64_t, float value) { return static_cast<float>(shrink(value)); });
  for (size_t i = 0; i < values.size(); ++i) ASSERT_NEAR(values[i], expected[i], 2e-4) << i;
}

TEST(ErrorFeedbackTest, LowersTheErrorOfTheOutputOfRoundedWeights) {
  const std::vector<float> weights = RandomWeights(3);
  const std::vector<double> moment = CorrelatedMoment(4);
  std::vector<float> nearest = weights;
  for (float& value : nearest) value = std::round(value);
  const absl::StatusOr<ErrorFeedback> feedback = ErrorFeedback::Of(moment, kIn);
  ASSERT_TRUE(feedback.ok()) << feedback.status();
  std::vector<float> values = weights;
  feedback->Round(values.data(), kOut,
                  [](int64_t, int64_t, float value) { return std::round(value); });
  for (const float value : values) ASSERT_EQ(value, std::round(value));
  EXPECT_LT(OutputError(values, weights, moment), 0.6 * OutputError(nearest, weights, moment));
}

TEST(ErrorFeedbackTest, RowAndColumnAreThoseOfTheWeight) {
  std::vector<float> values = RandomWeights(5);
  const std::vector<float> weights = values;
  const absl::StatusOr<ErrorFeedback> feedback = ErrorFeedback::Of(CorrelatedMoment(6), kIn);
  ASSERT_TRUE(feedback.ok()) << feedback.status();
  feedback->Round(values.data(), kOut, [&](int64_t row, int64_t column, float value) {
    // Nothing was rounded before, so that nothing is fed back.
    EXPECT_EQ(value, weights[static_cast<size_t>(row * kIn + column)]);
    return value;
  });
  EXPECT_EQ(values, weights);
}

TEST(ErrorFeedbackTest, WithoutInputsNothingIsFedBack) {
  std::vector<float> values = RandomWeights(7);
  const std::vector<float> weights = values;
  const absl::StatusOr<ErrorFeedback> feedback =
      ErrorFeedback::Of(std::vector<double>(kIn * kIn, 0.0), kIn);
  ASSERT_TRUE(feedback.ok()) << feedback.status();
  feedback->Round(values.data(), kOut,
                  [](int64_t, int64_t, float value) { return std::round(value); });
  for (size_t i = 0; i < values.size(); ++i) ASSERT_EQ(values[i], std::round(weights[i]));
}

TEST(ErrorFeedbackTest, AMomentThatIsNoneIsAnError) {
  std::vector<double> moment(kIn * kIn, 0.0);
  for (int64_t j = 0; j < kIn; ++j) moment[static_cast<size_t>(j * kIn + j)] = 1;
  moment[1] = moment[kIn] = 5;  // two inputs of energy 1 cannot correlate by 5
  const absl::StatusOr<ErrorFeedback> feedback = ErrorFeedback::Of(moment, kIn);
  ASSERT_FALSE(feedback.ok());
  EXPECT_NE(feedback.status().message().find("45 x 45 moment"), absl::string_view::npos);
}

}  // namespace
}  // namespace nestor
