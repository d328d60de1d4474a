#include "compress/probe.h"

#include <cmath>
#include <random>

#include "base/file.h"
#include "gtest/gtest.h"
#include "tests/testing/temporary_directory.h"

namespace nestor {
namespace {

// Residual ranks 0, 8, ... with energies 1 / (rank + 8), prefix ranks 8, 16, ..., and dense.
LayerOptions Options(int64_t largest_residual, int64_t largest_prefix) {
  std::vector<LayerOption> layer = {{.choice = {}, .cost = 1000, .error = 0}};
  for (int64_t rank = 0; rank <= largest_residual; rank += 8) {
    layer.push_back({{Form::kResidual, rank}, 100 + rank, 1.0 / static_cast<double>(rank + 8)});
  }
  for (int64_t rank = 8; rank <= largest_prefix; rank += 8) {
    layer.push_back({{Form::kPrefix, rank}, 2 * rank, 4.0 / static_cast<double>(rank)});
  }
  return {layer};
}

std::vector<int64_t> RanksOf(const std::vector<Probe>& probes, Form form) {
  std::vector<int64_t> ranks;
  for (const Probe& probe : probes) {
    if (probe.choice.form == form) ranks.push_back(probe.choice.rank);
  }
  return ranks;
}

TEST(ChooseProbesTest, RanksOfEachFormInGeometricSteps) {
  const std::vector<Probe> probes = ChooseProbes(Options(64, 256), 3);
  EXPECT_EQ(RanksOf(probes, Form::kResidual), (std::vector<int64_t>{0, 16, 64}));
  EXPECT_EQ(RanksOf(probes, Form::kPrefix), (std::vector<int64_t>{32, 88, 256}));
  for (const Probe& probe : probes) EXPECT_GT(probe.energy, 0);
}

TEST(ChooseProbesTest, RanksDoNotDependOnTheStepOfOptions) {
  std::vector<LayerOption> layer = {{.choice = {}, .cost = 1000, .error = 0}};
  for (int64_t rank = 0; rank <= 64; rank += 4) {
    layer.push_back({{Form::kResidual, rank}, rank, 1.0 / static_cast<double>(rank + 1)});
  }
  EXPECT_EQ(RanksOf(ChooseProbes({layer}, 3), Form::kResidual), (std::vector<int64_t>{0, 16, 64}));
}

TEST(ChooseProbesTest, OneProbeStandsWhereALadderSpendsMost) {
  const std::vector<Probe> probes = ChooseProbes(Options(64, 256), 1);
  EXPECT_EQ(RanksOf(probes, Form::kResidual), (std::vector<int64_t>{16}));
  EXPECT_EQ(RanksOf(probes, Form::kPrefix), (std::vector<int64_t>{104}));
}

TEST(ChooseProbesTest, AFormOfFewRanksHasNoProbeTwice) {
  EXPECT_EQ(RanksOf(ChooseProbes(Options(8, 0), 5), Form::kResidual), (std::vector<int64_t>{0, 8}));
  EXPECT_TRUE(ChooseProbes({{{.choice = {}, .cost = 5, .error = 0}}}, 3).empty());
}

TEST(ProbeLevelsTest, EachLevelHasOneLayerCutAndTheLastNone) {
  const std::vector<Probe> probes = {{.layer = 2, .choice = {Form::kPrefix, 24}},
                                     {.layer = 0, .choice = {Form::kResidual, 8}}};
  const std::vector<Level> levels = ProbeLevels(probes, 3);
  ASSERT_EQ(levels.size(), 3u);
  EXPECT_EQ(levels[0].profile, (Profile{{}, {}, {Form::kPrefix, 24}}));
  EXPECT_EQ(levels[1].profile, (Profile{{Form::kResidual, 8}, {}, {}}));
  EXPECT_EQ(levels[2].profile, Profile(3));
  EXPECT_EQ(levels[2].ladder, "full");
}

TEST(ErrorsFromProbesTest, FollowAPowerOfEnergyBetweenProbesAndEnergyBeyond) {
  LayerOptions options = Options(64, 0);
  std::vector<Probe> probes = ChooseProbes(options, 3);
  for (Probe& probe : probes) probe.loss = std::pow(probe.energy, 1.5);
  probes.erase(probes.begin());  // rank 0 lies beyond
  ErrorsFromProbes(probes, &options);
  for (const LayerOption& option : options[0]) {
    if (option.choice.form == Form::kDense) {
      EXPECT_EQ(option.error, 0);
      continue;
    }
    const double energy = 1.0 / static_cast<double>(option.choice.rank + 8);
    const double expected =
        option.choice.rank >= 16 ? std::pow(energy, 1.5) : std::pow(1.0 / 24, 1.5) * energy * 24;
    EXPECT_NEAR(option.error, expected, 1e-9 * expected) << option.choice.rank;
  }
}

TEST(ErrorsFromProbesTest, NoisyProbesGiveErrorsThatFallWithRank) {
  std::mt19937_64 random(5);
  std::lognormal_distribution<double> noise(0, 2);
  for (int trial = 0; trial < 20; ++trial) {
    LayerOptions options = Options(64, 256);
    std::vector<Probe> probes = ChooseProbes(options, 4);
    for (Probe& probe : probes) probe.loss = 1e-3 * noise(random);
    ErrorsFromProbes(probes, &options);
    for (size_t i = 1; i + 1 < options[0].size(); ++i) {
      if (options[0][i].choice.form != options[0][i + 1].choice.form) continue;
      EXPECT_GE(options[0][i].error, options[0][i + 1].error) << i;
      EXPECT_GT(options[0][i + 1].error, 0);
    }
  }
}

TEST(ProbeLogTest, ForgetsATornLineAndKeepsWhatIsBeforeIt) {
  const TemporaryDirectory directory;
  const std::string path = directory.path() + "/probes.jsonl";
  const Probe first = {.layer = 3, .choice = {Form::kPrefix, 16}, .loss = 0.1 / 3};
  const Probe second = {.layer = 4, .choice = {Form::kResidual, 0}, .loss = 2.5};
  {
    auto log = ProbeLog::Open(path, "model a");
    ASSERT_TRUE(log.ok()) << log.status();
    EXPECT_EQ(log->Find(first), nullptr);
    ASSERT_TRUE(log->Add(first).ok());
    ASSERT_TRUE(log->Add(second).ok());
  }
  const std::string text = *ReadFile(path);
  ASSERT_TRUE(WriteFileAtomically(path, text.substr(0, text.size() - 9)).ok());
  auto log = ProbeLog::Open(path, "model a");
  ASSERT_TRUE(log.ok());
  ASSERT_NE(log->Find(first), nullptr);
  EXPECT_EQ(*log->Find(first), first.loss);
  EXPECT_EQ(log->Find(second), nullptr);
  // What is added after the tear can be read again.
  ASSERT_TRUE(log->Add(second).ok());
  auto again = ProbeLog::Open(path, "model a");
  ASSERT_TRUE(again.ok());
  ASSERT_NE(again->Find(second), nullptr);
  EXPECT_EQ(*again->Find(second), 2.5);
}

TEST(ProbeLogTest, OfAnotherModelIsBegunAnew) {
  const TemporaryDirectory directory;
  const std::string path = directory.path() + "/probes.jsonl";
  const Probe probe = {.layer = 1, .choice = {Form::kResidual, 8}, .loss = 1};
  ASSERT_TRUE(ProbeLog::Open(path, "model a")->Add(probe).ok());
  EXPECT_EQ(ProbeLog::Open(path, "model b")->Find(probe), nullptr);
  EXPECT_EQ(ProbeLog::Open(path, "model a")->Find(probe), nullptr);
}

TEST(ProbeLogTest, AFolderThatIsNotThereIsNamed) {
  const auto log = ProbeLog::Open("/nonexistent/probes.jsonl", "key");
  ASSERT_FALSE(log.ok());
  EXPECT_NE(std::string(log.status().message()).find("/nonexistent/probes.jsonl"),
            std::string::npos);
}

}  // namespace
}  // namespace nestor
