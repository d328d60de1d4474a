#include "compress/allocate.h"

#include <algorithm>
#include <limits>
#include <random>

#include "gtest/gtest.h"

namespace nestor {
namespace {

LayerOption Residual(int64_t rank, int64_t cost, double error) {
  return {{Form::kResidual, rank}, cost, error};
}
LayerOption Dense(int64_t cost) { return {{Form::kDense, 0}, cost, 0}; }

// Options whose errors are convex in their costs, so that a greedy walk is exact.
LayerOptions RandomConvexOptions(size_t layers, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::uniform_real_distribution<double> uniform(0.1, 1.0);
  LayerOptions options(layers);
  for (auto& layer : options) {
    double slope = 1 + uniform(random);
    double error = 5;
    int64_t cost = 10 + static_cast<int64_t>(random() % 20);
    for (int64_t rank = 0; rank <= 24; rank += 8) {
      layer.push_back(Residual(rank, cost, error));
      const int64_t step = 1 + static_cast<int64_t>(random() % 3);
      cost += step;
      error -= slope * static_cast<double>(step) * 0.1;
      slope *= 0.3 + 0.6 * uniform(random);
    }
  }
  return options;
}

int64_t CostOf(const LayerOptions& options, const Profile& profile) {
  int64_t cost = 0;
  for (size_t i = 0; i < profile.size(); ++i) {
    for (const LayerOption& option : options[i]) {
      if (option.choice == profile[i]) cost += option.cost;
    }
  }
  return cost;
}

double ErrorOf(const LayerOptions& options, const Profile& profile) {
  double error = 0;
  for (size_t i = 0; i < profile.size(); ++i) {
    for (const LayerOption& option : options[i]) {
      if (option.choice == profile[i]) error += option.error;
    }
  }
  return error;
}

double LeastError(const LayerOptions& options, size_t layer, int64_t budget) {
  if (budget < 0) return std::numeric_limits<double>::infinity();
  if (layer == options.size()) return 0;
  double least = std::numeric_limits<double>::infinity();
  for (const LayerOption& option : options[layer]) {
    least = std::min(least, option.error + LeastError(options, layer + 1, budget - option.cost));
  }
  return least;
}

TEST(AllocateAlongHullsTest, SpendsWhereItRemovesMostError) {
  const LayerOptions options = {{Residual(0, 10, 1.0), Residual(8, 12, 0.2), Dense(20)},
                                {Residual(0, 10, 1.0), Residual(8, 12, 0.9), Dense(20)}};
  const std::vector<Profile> profiles =
      AllocateAlongHulls(options, std::vector<int64_t>{20, 22, 32, 40});
  ASSERT_EQ(profiles.size(), 4u);
  EXPECT_EQ(profiles[0], (Profile{{Form::kResidual, 0}, {Form::kResidual, 0}}));
  EXPECT_EQ(profiles[1], (Profile{{Form::kResidual, 8}, {Form::kResidual, 0}}));
  // Rank 8 of the second layer lies above its hull: dense removes more for each unit of cost.
  EXPECT_EQ(profiles[2], (Profile{{Form::kResidual, 8}, {Form::kDense, 0}}));
  EXPECT_EQ(profiles[3], (Profile{{Form::kDense, 0}, {Form::kDense, 0}}));
}

TEST(AllocateAlongHullsTest, ATargetBelowTheCheapestGivesTheCheapest) {
  const LayerOptions options = {{Dense(20), Residual(0, 10, 1.0)}};
  EXPECT_EQ(AllocateAlongHulls(options, std::vector<int64_t>{3})[0],
            (Profile{{Form::kResidual, 0}}));
}

TEST(AllocateAlongHullsTest, AnOptionThatCostsMoreAndErrsMoreIsNeverTaken) {
  const LayerOptions options = {{Residual(0, 10, 0.5), Residual(8, 12, 0.7), Dense(30)}};
  EXPECT_EQ(AllocateAlongHulls(options, std::vector<int64_t>{29})[0],
            (Profile{{Form::kResidual, 0}}));
}

TEST(AllocateAlongHullsTest, ProfilesAreNestedWithinTheirTargetsAndErrLessAsTheyGrow) {
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    const LayerOptions options = RandomConvexOptions(12, seed);
    std::vector<int64_t> targets;
    const int64_t cheapest =
        CostOf(options, AllocateAlongHulls(options, std::vector<int64_t>{0})[0]);
    for (int64_t extra = 0; extra <= 60; extra += 6) targets.push_back(cheapest + extra);
    const std::vector<Profile> profiles = AllocateAlongHulls(options, targets);
    for (size_t i = 0; i < profiles.size(); ++i) {
      EXPECT_LE(CostOf(options, profiles[i]), targets[i]);
      if (i == 0) continue;
      EXPECT_LE(ErrorOf(options, profiles[i]), ErrorOf(options, profiles[i - 1]));
      for (size_t layer = 0; layer < profiles[i].size(); ++layer) {
        EXPECT_GE(profiles[i][layer].rank, profiles[i - 1][layer].rank);
      }
    }
  }
}

TEST(AllocateAlongHullsTest, AStepThatDoesNotFitDoesNotBlockSmallerOnes) {
  const LayerOptions options = {{Residual(0, 10, 9.0), Dense(20)},
                                {Residual(0, 10, 1.0), Residual(8, 12, 0.5)}};
  const std::vector<Profile> profiles =
      AllocateAlongHulls(options, std::vector<int64_t>{25, 30, 32});
  EXPECT_EQ(profiles[0], (Profile{{Form::kResidual, 0}, {Form::kResidual, 8}}));
  EXPECT_EQ(profiles[1], (Profile{{Form::kResidual, 0}, {Form::kResidual, 8}}));
  EXPECT_EQ(profiles[2], (Profile{{Form::kDense, 0}, {Form::kResidual, 8}}));
}

LayerOption Prefix(int64_t rank, int64_t cost, double error) {
  return {{Form::kPrefix, rank}, cost, error};
}

TEST(AllocateEvenlyTest, GivesEveryLayerTheLargestCommonRankThatFits) {
  const LayerOptions options = {{Dense(40), Prefix(8, 10, 0.9), Prefix(16, 20, 0.5)},
                                {Prefix(8, 5, 0.4), Dense(12)}};
  const std::vector<Profile> profiles =
      AllocateEvenly(options, std::vector<int64_t>{3, 15, 25, 32, 51, 52});
  const Profile least = {{Form::kPrefix, 8}, {Form::kPrefix, 8}};
  EXPECT_EQ(profiles[0], least);
  EXPECT_EQ(profiles[1], least);
  // At rank 16 the second layer is dense, since its factors end before. That does not fit; a step
  // of one layer does.
  EXPECT_EQ(profiles[2], (Profile{{Form::kPrefix, 8}, {Form::kDense, 0}}));
  EXPECT_EQ(profiles[3], (Profile{{Form::kPrefix, 16}, {Form::kDense, 0}}));
  EXPECT_EQ(profiles[4], profiles[3]);
  EXPECT_EQ(profiles[5], (Profile{{Form::kDense, 0}, {Form::kDense, 0}}));
}

TEST(AllocateEvenlyTest, WhatIsLeftGoesWhereItSavesMost) {
  const LayerOptions options = {{Prefix(8, 10, 0.9), Prefix(16, 20, 0.8), Dense(40)},
                                {Prefix(8, 10, 0.9), Prefix(16, 20, 0.2), Dense(40)}};
  EXPECT_EQ(AllocateEvenly(options, std::vector<int64_t>{30})[0],
            (Profile{{Form::kPrefix, 8}, {Form::kPrefix, 16}}));
}

TEST(AllocateEvenlyTest, ProfilesAreNestedAndWithinTheirTargets) {
  std::mt19937_64 random(3);
  for (int trial = 0; trial < 20; ++trial) {
    LayerOptions options(7);
    int64_t cheapest = 0;
    int64_t dearest = 0;
    for (auto& layer : options) {
      const int64_t step = 1 + static_cast<int64_t>(random() % 5);
      const int64_t count = 2 + static_cast<int64_t>(random() % 4);
      for (int64_t i = 1; i <= count; ++i) {
        layer.push_back(Prefix(8 * i, step * i, 1.0 / static_cast<double>(i + random() % 3)));
      }
      layer.push_back(Dense(step * (count + 1)));
      cheapest += step;
      dearest += step * (count + 1);
    }
    std::vector<int64_t> targets;
    for (int64_t target = cheapest; target <= dearest; target += 2) targets.push_back(target);
    const std::vector<Profile> profiles = AllocateEvenly(options, targets);
    for (size_t i = 0; i < profiles.size(); ++i) {
      EXPECT_LE(CostOf(options, profiles[i]), targets[i]);
      for (size_t layer = 0; i > 0 && layer < options.size(); ++layer) {
        const FormAndRank& now = profiles[i][layer];
        EXPECT_TRUE(now.form == Form::kDense || now.rank >= profiles[i - 1][layer].rank);
        EXPECT_TRUE(profiles[i - 1][layer].form != Form::kDense || now.form == Form::kDense);
      }
    }
  }
}

// What AllocateAlongHulls passes through: costs at which the greedy walk is exact.
std::vector<int64_t> ChainCosts(const LayerOptions& options) {
  std::vector<std::pair<double, int64_t>> steps;
  int64_t cost = 0;
  for (const auto& layer : options) {
    cost += layer[0].cost;
    for (size_t i = 1; i < layer.size(); ++i) {
      const int64_t step = layer[i].cost - layer[i - 1].cost;
      steps.emplace_back((layer[i].error - layer[i - 1].error) / static_cast<double>(step), step);
    }
  }
  std::sort(steps.begin(), steps.end());
  std::vector<int64_t> costs = {cost};
  for (const auto& [slope, step] : steps) costs.push_back(cost += step);
  return costs;
}

TEST(AllocateAlongHullsTest, MatchesBruteForceWhereOptionsAreConvex) {
  for (uint64_t seed = 1; seed <= 30; ++seed) {
    const LayerOptions options = RandomConvexOptions(5, seed);
    for (const int64_t cost : ChainCosts(options)) {
      const Profile profile = AllocateAlongHulls(options, std::vector<int64_t>{cost})[0];
      EXPECT_NEAR(ErrorOf(options, profile), LeastError(options, 0, cost), 1e-9)
          << "seed " << seed << ", cost " << cost;
    }
  }
}

}  // namespace
}  // namespace nestor
