#include "compress/rank_search.h"

#include <limits>
#include <random>

#include "gtest/gtest.h"

namespace nestor {
namespace {

LayerOption Residual(int64_t rank, int64_t cost, double error) {
  return {{Form::kResidual, rank}, cost, error};
}
LayerOption Prefix(int64_t rank, int64_t cost, double error) {
  return {{Form::kPrefix, rank}, cost, error};
}
LayerOption Dense(int64_t cost) { return {{Form::kDense, 0}, cost, 0}; }

// Errors fall with rank within a form, but are not convex, and forms cross.
LayerOptions RandomOptions(size_t layers, uint64_t seed, bool has_both_forms) {
  std::mt19937_64 random(seed);
  std::uniform_real_distribution<double> uniform(0.1, 1.0);
  LayerOptions options(layers);
  for (auto& layer : options) {
    double errors[2] = {5 * uniform(random), 5 * uniform(random)};
    int64_t costs[2] = {8 + static_cast<int64_t>(random() % 8),
                        4 + static_cast<int64_t>(random() % 8)};
    for (int64_t rank = 8; rank <= 16; rank += 8) {
      layer.push_back(Residual(rank, costs[0], errors[0]));
      if (has_both_forms) layer.push_back(Prefix(rank, costs[1], errors[1]));
      for (int form = 0; form < 2; ++form) {
        errors[form] *= uniform(random);
        costs[form] += 1 + static_cast<int64_t>(random() % 5);
      }
    }
    layer.push_back(Dense(30));
  }
  return options;
}

// Calls `visit` with every combination of options: {profile, cost, error}.
template <typename Visit>
void ForEachProfile(const LayerOptions& options, const Visit& visit, Profile profile = {},
                    int64_t cost = 0, double error = 0) {
  if (profile.size() == options.size()) return visit(profile, cost, error);
  for (const LayerOption& option : options[profile.size()]) {
    Profile longer = profile;
    longer.push_back(option.choice);
    ForEachProfile(options, visit, longer, cost + option.cost, error + option.error);
  }
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

double LeastError(const LayerOptions& options, int64_t budget) {
  double least = std::numeric_limits<double>::infinity();
  ForEachProfile(options, [&](const Profile&, int64_t cost, double error) {
    if (cost <= budget) least = std::min(least, error);
  });
  return least;
}

bool IsNestedProfile(const Profile& low, const Profile& high) {
  for (size_t i = 0; i < low.size(); ++i) {
    if (!IsNested(low[i], high[i])) return false;
  }
  return true;
}

TEST(SearchWithinTest, MatchesExhaustiveSearch) {
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    const LayerOptions options = RandomOptions(5, seed, seed % 2 == 0);
    for (int64_t budget = 15; budget <= 155; budget += 7) {
      const auto result = SearchWithin(options, budget, /*resolution=*/200);
      const double least = LeastError(options, budget);
      ASSERT_EQ(result.has_value(), std::isfinite(least)) << "seed " << seed;
      if (!result.has_value()) continue;
      EXPECT_NEAR(result->error, least, 1e-12) << "seed " << seed << ", budget " << budget;
      EXPECT_LE(result->cost, budget);
      Profile profile;
      for (size_t i = 0; i < options.size(); ++i)
        profile.push_back(options[i][result->choices[i]].choice);
      EXPECT_EQ(CostOf(options, profile), result->cost);
      EXPECT_NEAR(ErrorOfProfile(options, profile), result->error, 1e-12);
    }
  }
}

TEST(SearchWithinTest, ACoarseResolutionStaysWithinTheCostAndNearTheBest) {
  const LayerOptions options = RandomOptions(6, 3, true);
  const auto result = SearchWithin(options, 80, /*resolution=*/8);
  ASSERT_TRUE(result.has_value());
  EXPECT_LE(result->cost, 80);
  EXPECT_LE(result->error, 1.3 * LeastError(options, 80));
}

TEST(RepairMonotonyTest, IsARunningMaximumWithinEachForm) {
  LayerOptions options = {{Residual(8, 10, 0.5), Residual(16, 12, 0.7), Residual(0, 8, 0.6),
                           Prefix(8, 9, 3.0), Prefix(16, 11, -0.1), Dense(20)}};
  RepairMonotony(&options);
  EXPECT_DOUBLE_EQ(options[0][0].error, 0.7);  // rank 16 measured worse
  EXPECT_DOUBLE_EQ(options[0][1].error, 0.7);
  EXPECT_DOUBLE_EQ(options[0][2].error, 0.7);
  EXPECT_DOUBLE_EQ(options[0][3].error, 3.0);
  EXPECT_DOUBLE_EQ(options[0][4].error, 0.0);  // no better than dense
  EXPECT_DOUBLE_EQ(options[0][5].error, 0.0);
}

TEST(AllocateBySearchTest, IsNestedWithinItsTargetsAndAsGoodAsAnyFirstLevel) {
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    const LayerOptions options = RandomOptions(6, seed, true);

    std::vector<int64_t> targets = {60, 80, 100, 140};

    const std::vector<Profile> chain = AllocateBySearch(options, targets);
    ASSERT_EQ(chain.size(), targets.size());
    for (size_t i = 0; i < chain.size(); ++i) {
      EXPECT_LE(CostOf(options, chain[i]), targets[i]) << "seed " << seed;
      if (i == 0) continue;
      EXPECT_TRUE(IsNestedProfile(chain[i - 1], chain[i])) << "seed " << seed;
      EXPECT_LE(ErrorOfProfile(options, chain[i]), ErrorOfProfile(options, chain[i - 1]) + 1e-12);
    }
  }
}

// The least summed log error of two nested levels, by trying all.
double LeastChainError(const LayerOptions& options, int64_t low_target, int64_t high_target) {
  std::vector<std::pair<Profile, double>> low, high;
  ForEachProfile(options, [&](const Profile& profile, int64_t cost, double error) {
    if (cost <= low_target) low.emplace_back(profile, error);
    if (cost <= high_target) high.emplace_back(profile, error);
  });
  double least = std::numeric_limits<double>::infinity();
  for (const auto& [low_profile, low_error] : low) {
    for (const auto& [high_profile, high_error] : high) {
      const double error = std::log(low_error) + std::log(high_error);
      if (error < least && IsNestedProfile(low_profile, high_profile)) least = error;
    }
  }
  return least;
}

TEST(AllocateBySearchTest, AChainOfTwoIsNearTheBestOfAllChains) {
  double total = 0;
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    const LayerOptions options = RandomOptions(4, seed, true);
    const std::vector<Profile> chain = AllocateBySearch(options, std::vector<int64_t>{50, 80});
    const double error =
        std::log(ErrorOfProfile(options, chain[0])) + std::log(ErrorOfProfile(options, chain[1]));
    const double least = LeastChainError(options, 50, 80);
    EXPECT_GE(error, least - 1e-9);
    EXPECT_LE(error, least + 0.7) << "seed " << seed;
    total += error - least;
  }
  EXPECT_LT(total / 20, 0.1);
}

TEST(AllocateBySearchTest, KeepsTheFormOfALayerWhereAFreeChoiceWouldChangeIt) {
  // Alone, the cheap level takes the prefix and the dear one the residual.
  const LayerOptions options = {{Prefix(8, 5, 1.0), Residual(8, 10, 0.1), Dense(30)}};
  ASSERT_EQ(AllocateBySearch(options, std::vector<int64_t>{5})[0], (Profile{{Form::kPrefix, 8}}));
  ASSERT_EQ(AllocateBySearch(options, std::vector<int64_t>{10})[0],
            (Profile{{Form::kResidual, 8}}));
  const std::vector<Profile> chain = AllocateBySearch(options, std::vector<int64_t>{5, 10});
  EXPECT_EQ(chain[0], (Profile{{Form::kPrefix, 8}}));  // nothing else fits
  EXPECT_EQ(chain[1], (Profile{{Form::kPrefix, 8}}));
}

TEST(AllocateBySearchTest, ATargetBelowTheCheapestGivesTheCheapest) {
  const LayerOptions options = {{Dense(20), Residual(0, 10, 1.0)}};
  EXPECT_EQ(AllocateBySearch(options, std::vector<int64_t>{3, 20}),
            (std::vector<Profile>{{{Form::kResidual, 0}}, {{Form::kDense, 0}}}));
}

}  // namespace
}  // namespace nestor
