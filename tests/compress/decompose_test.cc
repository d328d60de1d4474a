#include "compress/decompose.h"

#include <cmath>
#include <random>
#include <string>

#include "gtest/gtest.h"

namespace nestor {
namespace {

struct Shape {
  std::string name;
  int64_t out;
  int64_t in;
  int64_t num_inputs;  // rows the moment is made of; fewer than `in`: singular
};
void PrintTo(const Shape& shape, std::ostream* out) { *out << shape.name; }

std::vector<double> RandomMoment(int64_t size, int64_t rows, std::mt19937_64* random) {
  std::normal_distribution<double> normal;
  std::vector<double> moment(static_cast<size_t>(size * size));
  std::vector<double> x(static_cast<size_t>(size));
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t j = 0; j < size; ++j) {
      // A few dominant directions, as activations have.
      x[static_cast<size_t>(j)] = normal(*random) * (j % 7 == 0 ? 5.0 : 0.5);
    }
    for (int64_t i = 0; i < size; ++i) {
      for (int64_t j = 0; j < size; ++j) {
        moment[static_cast<size_t>(i * size + j)] +=
            x[static_cast<size_t>(i)] * x[static_cast<size_t>(j)] / static_cast<double>(rows);
      }
    }
  }
  return moment;
}

// tr(D S D^T) in plain loops.
double Energy(const std::vector<double>& d, int64_t out, int64_t in,
              const std::vector<double>& moment) {
  double energy = 0;
  for (int64_t i = 0; i < out; ++i) {
    for (int64_t j = 0; j < in; ++j) {
      for (int64_t k = 0; k < in; ++k) {
        energy += d[static_cast<size_t>(i * in + j)] * moment[static_cast<size_t>(j * in + k)] *
                  d[static_cast<size_t>(i * in + k)];
      }
    }
  }
  return energy;
}

// W minus its first `rank` components.
std::vector<double> Remainder(const std::vector<float>& weights, const Decomposition& parts,
                              int64_t out, int64_t in, int64_t rank) {
  std::vector<double> rest(weights.begin(), weights.end());
  for (int64_t k = 0; k < rank; ++k) {
    for (int64_t i = 0; i < out; ++i) {
      for (int64_t j = 0; j < in; ++j) {
        rest[static_cast<size_t>(i * in + j)] -=
            static_cast<double>(parts.bt[static_cast<size_t>(k * out + i)]) *
            parts.a[static_cast<size_t>(k * in + j)];
      }
    }
  }
  return rest;
}

class DecomposeTest : public testing::TestWithParam<Shape> {
 protected:
  void SetUp() override {
    std::mt19937_64 random(7);
    std::normal_distribution<float> normal;
    weights_.resize(static_cast<size_t>(GetParam().out * GetParam().in));
    for (float& weight : weights_) weight = normal(random);
    moment_ = RandomMoment(GetParam().in, GetParam().num_inputs, &random);
  }
  std::vector<float> weights_;
  std::vector<double> moment_;
};

TEST_P(DecomposeTest, TruncationErrorIsTheDroppedSingularValuesSquared) {
  const auto [name, out, in, rows] = GetParam();
  const int64_t full = std::min(out, in);
  const absl::StatusOr<Decomposition> parts = Decompose(weights_, out, in, moment_, full);
  ASSERT_TRUE(parts.ok()) << parts.status();
  ASSERT_EQ(parts->rank, full);
  ASSERT_EQ(static_cast<int64_t>(parts->singular_values.size()), full);
  const double whole = Energy({weights_.begin(), weights_.end()}, out, in, moment_);
  for (int64_t rank = 0; rank <= full; rank += 3) {
    double dropped = 0;
    for (int64_t k = rank; k < full; ++k) {
      dropped += std::pow(parts->singular_values[static_cast<size_t>(k)], 2);
    }
    EXPECT_NEAR(Energy(Remainder(weights_, *parts, out, in, rank), out, in, moment_), dropped,
                1e-5 * whole)
        << "rank " << rank;
  }
}

TEST_P(DecomposeTest, SingularValuesDescendAndTheirSquaresSumToTheOutputEnergy) {
  const auto [name, out, in, rows] = GetParam();
  const absl::StatusOr<Decomposition> parts = Decompose(weights_, out, in, moment_, 4);
  ASSERT_TRUE(parts.ok()) << parts.status();
  double sum = 0;
  for (size_t k = 0; k < parts->singular_values.size(); ++k) {
    if (k > 0) {
      EXPECT_LE(parts->singular_values[k], parts->singular_values[k - 1]);
    }
    sum += std::pow(parts->singular_values[k], 2);
  }
  const double energy = OutputEnergy(weights_, out, in, moment_);
  EXPECT_NEAR(sum, energy, 1e-9 * energy);
  EXPECT_NEAR(energy, Energy({weights_.begin(), weights_.end()}, out, in, moment_), 1e-9 * energy);
}

TEST_P(DecomposeTest, SmallerMaximumRanksArePrefixes) {
  const auto [name, out, in, rows] = GetParam();
  const absl::StatusOr<Decomposition> large = Decompose(weights_, out, in, moment_, 12);
  const absl::StatusOr<Decomposition> small = Decompose(weights_, out, in, moment_, 5);
  ASSERT_TRUE(large.ok() && small.ok());
  ASSERT_EQ(small->rank, 5);
  for (size_t i = 0; i < small->a.size(); ++i) EXPECT_FLOAT_EQ(small->a[i], large->a[i]);
  for (size_t i = 0; i < small->bt.size(); ++i) EXPECT_FLOAT_EQ(small->bt[i], large->bt[i]);
}

TEST_P(DecomposeTest, NoOtherFactorsOfThatRankErrLess) {
  const auto [name, out, in, rows] = GetParam();
  constexpr int64_t kRank = 6;
  const absl::StatusOr<Decomposition> parts = Decompose(weights_, out, in, moment_, kRank);
  ASSERT_TRUE(parts.ok());
  const double best = Energy(Remainder(weights_, *parts, out, in, kRank), out, in, moment_);
  std::mt19937_64 random(8);
  std::normal_distribution<float> normal(0.0f, 0.02f);
  for (int trial = 0; trial < 5; ++trial) {
    Decomposition other = *parts;
    for (float& value : other.a) value += normal(random);
    for (float& value : other.bt) value += normal(random);
    EXPECT_GT(Energy(Remainder(weights_, other, out, in, kRank), out, in, moment_), best);
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, DecomposeTest,
                         testing::Values(Shape{"wide", 24, 40, 200}, Shape{"square", 30, 30, 200},
                                         Shape{"tall", 50, 24, 200},
                                         Shape{"wide_singular", 24, 40, 15},
                                         Shape{"tall_singular", 50, 24, 10}),
                         [](const auto& info) { return info.param.name; });

TEST(DecomposeFullRankTest, EqualsTheDenseMatrixOnBothSides) {
  std::mt19937_64 random(9);
  std::normal_distribution<float> normal;
  for (const auto& [out, in] : {std::pair<int64_t, int64_t>{20, 33}, {33, 20}}) {
    std::vector<float> weights(static_cast<size_t>(out * in));
    for (float& weight : weights) weight = normal(random);
    const std::vector<double> moment = RandomMoment(in, 300, &random);
    const absl::StatusOr<Decomposition> parts = Decompose(weights, out, in, moment, 33);
    ASSERT_TRUE(parts.ok());
    ASSERT_EQ(parts->rank, 20);
    for (const double rest : Remainder(weights, *parts, out, in, 20)) EXPECT_NEAR(rest, 0, 1e-4);
  }
}

TEST(DecomposeZeroTest, AZeroMatrixHasNothingToKeep) {
  std::mt19937_64 random(10);
  const std::vector<double> moment = RandomMoment(8, 50, &random);
  for (const int64_t out : {4, 12}) {
    const absl::StatusOr<Decomposition> parts =
        Decompose(std::vector<float>(static_cast<size_t>(out * 8)), out, 8, moment, 3);
    ASSERT_TRUE(parts.ok());
    for (const float value : parts->a) EXPECT_EQ(value, 0.0f);
    for (const double value : parts->singular_values) EXPECT_EQ(value, 0.0);
  }
}

}  // namespace
}  // namespace nestor
