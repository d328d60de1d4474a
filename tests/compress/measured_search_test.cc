// A compression that searches ranks by measurement, from checkpoint to artifact.

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <random>

#include "absl/strings/str_cat.h"
#include "base/file.h"
#include "compress/layer.h"
#include "compress/layer_times.h"
#include "compress/pipeline.h"
#include "compress/probe.h"
#include "compress/report.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "tests/testing/llama2c_import.h"
#include "tests/testing/temporary_directory.h"
#include "tests/testing/tiny_checkpoint.h"

namespace nestor {
namespace {

namespace fs = std::filesystem;
using testing::HasSubstr;

constexpr const char* kData = NESTOR_SOURCE_DIR "/../shared/data/";

std::string RandomText(int lines, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::string text;
  for (int i = 0; i < lines; ++i) {
    for (int word = 0; word < 4; ++word) {
      for (uint64_t letters = 2 + random() % 6; letters > 0; --letters) {
        text += static_cast<char>('a' + random() % 26);
      }
      text += word < 3 ? ' ' : '\n';
    }
  }
  return text;
}

absl::StatusOr<std::unique_ptr<Backend>> MakeCpu() { return MakeCpuBackend({.num_threads = 1}); }

// An AllocateFunction of one level: every layer at the largest rank it has.
std::vector<Profile> LargestRanks(const LayerOptions& layers, std::span<const int64_t>) {
  Profile profile;
  for (const std::vector<LayerOption>& layer : layers) {
    const auto largest = std::max_element(
        layer.begin(), layer.end(),
        [](const LayerOption& a, const LayerOption& b) { return a.choice.rank < b.choice.rank; });
    profile.push_back(largest->choice);
  }
  return {profile};
}

class MeasuredSearchTest : public testing::Test {
 protected:
  void SetUp() override {
    ASSERT_TRUE(WriteTinyLlama(Path("llama")).ok());
    ASSERT_TRUE(WriteTinyBert(Path("bert")).ok());
    ASSERT_TRUE(WriteFileAtomically(Path("text.txt"), RandomText(400, 1)).ok());
    ASSERT_TRUE(WriteFileAtomically(Path("held_out.txt"), RandomText(100, 2)).ok());
  }

  std::string Path(const std::string& name) const { return directory_.path() + "/" + name; }

  CompressOptions Options(const std::string& model) const {
    CompressOptions options;
    options.source = Path(model);
    options.output = Path("out.nested");
    options.max_residual_rank = 16;
    options.max_head_residual_rank = 16;
    options.corpus.calibration_paths = {Path("text.txt")};
    options.corpus.evaluation_path = Path("held_out.txt");
    options.corpus.calibration_tokens = 2560;
    options.evaluation_tokens = 512;
    options.self_sample_tokens = 0;
    options.refit_tokens = 0;
    options.make_backend = MakeCpu;
    options.search.method = RankSearch::kMeasured;
    options.search.probes = 2;
    options.search.probe_tokens = 512;
    return options;
  }

  absl::Status Refused(const CompressOptions& options) const {
    const absl::Status status = Compress(options).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
    EXPECT_FALSE(fs::exists(options.output));
    return status;
  }

  TemporaryDirectory directory_;
};

TEST_F(MeasuredSearchTest, LevelsStandAtTheirCostsAndStateAllCostsAndLosses) {
  // So few tokens that no level of random weights measures worse than a cheaper one beyond doubt,
  // and is left out.
  ASSERT_TRUE(WriteTinyLlama(Path("other"), {.seed = 3}).ok());
  CompressOptions options = Options("other");
  options.evaluation_tokens = 64;
  options.search.costs = {1, 0.8, 0.7, 0.65};
  const auto report = Compress(options);
  ASSERT_TRUE(report.ok()) << report.status();
  ASSERT_EQ(report->levels.size(), 4u);
  ASSERT_EQ(report->search.size(), 4u);
  // Two ranks and the middle plane of seven layers in each of two blocks, and of the head.
  EXPECT_EQ(report->probes, 3 * 15);
  EXPECT_EQ(report->resumed_probes, 0);
  const double costs[] = {0.65, 0.7, 0.8};
  for (size_t i = 0; i < 3; ++i) {
    EXPECT_LE(report->levels[i].relative_cost, costs[i]);
    EXPECT_GT(report->levels[i].relative_cost, costs[i] - 0.03);
    const SearchedLevel& search = report->search[i];
    EXPECT_EQ(search.profile, report->levels[i].profile);
    EXPECT_GT(search.seconds, 0);
    EXPECT_GT(search.relative_time, 0);
    EXPECT_GT(search.predicted_loss, report->search[i + 1].predicted_loss);
    // A random model, so layers are as good as independent.
    EXPECT_GT(search.measured_loss, 0.4 * *search.predicted_loss);
    EXPECT_LT(search.measured_loss, 2.5 * *search.predicted_loss);
  }
  EXPECT_EQ(report->search[3].measured_loss, 0);
  EXPECT_EQ(report->search[3].relative_time, 1);
  // Opening verifies nesting.
  ASSERT_TRUE(NestedModel::Open(options.output).ok());
  EXPECT_THAT(SearchTable(*report, 1), HasSubstr("predicted"));
  EXPECT_EQ(SearchReport(*report).size(), 4u);
  EXPECT_EQ(SearchReport(*report)[0]["predicted_loss"], *report->search[0].predicted_loss);
}

TEST_F(MeasuredSearchTest, AnExtraLevelStatesItsTimeButNoPrediction) {
  ASSERT_TRUE(WriteTinyLlama(Path("other"), {.seed = 3}).ok());
  CompressOptions options = Options("other");
  options.evaluation_tokens = 64;
  options.search.costs = {0.65};
  options.extra_costs = {{"residual", 0.75}};
  const auto report = Compress(options);
  ASSERT_TRUE(report.ok()) << report.status();
  ASSERT_EQ(report->levels.size(), 3u) << testing::PrintToString(report->notes);
  ASSERT_EQ(report->search.size(), 3u);
  for (size_t i = 0; i < 3; ++i) {
    EXPECT_EQ(report->search[i].profile, report->levels[i].profile);
    EXPECT_EQ(report->search[i].predicted_loss.has_value(), i != 1);
    EXPECT_GT(report->search[i].seconds, 0);
  }
  EXPECT_GT(report->search[1].relative_time, 0);
  EXPECT_GT(report->levels[1].relative_cost, report->levels[0].relative_cost);
  EXPECT_LE(report->levels[1].relative_cost, 0.75);
}

TEST_F(MeasuredSearchTest, AMixedLadderIsNestedAndRunsWhateverItsObjective) {
  for (const RankObjective objective :
       {RankObjective::kBytes, RankObjective::kFlops, RankObjective::kTime}) {
    CompressOptions options = Options("bert");
    options.ladder = LadderChoice::kMixed;
    options.search.objective = objective;
    options.search.rows = 4;
    options.levels = 3;
    options.refit_tokens = 1024;
    options.overwrites = true;
    const auto report = Compress(options);
    ASSERT_TRUE(report.ok()) << report.status();
    ASSERT_GE(report->levels.size(), 2u);
    EXPECT_EQ(report->levels[0].ladder, "mixed");
    const auto model = NestedModel::Open(options.output);
    ASSERT_TRUE(model.ok()) << model.status();
    EXPECT_EQ((*model)->levels()[0].profile, report->levels[0].profile);
    const auto is_prefix = [](const FormAndRank& choice) { return choice.form == Form::kPrefix; };
    const Profile& cheapest = report->levels[0].profile;
    if (objective != RankObjective::kTime) {
      // At the lowest cost nothing else is as cheap.
      EXPECT_TRUE(std::any_of(cheapest.begin(), cheapest.end(), is_prefix));
    }
  }
}

TEST_F(MeasuredSearchTest, AKilledSearchGoesOnAfterItsLastProbe) {
  CompressOptions options = Options("llama");
  options.search.costs = {0.7, 0.8};
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    // All probes are done by then.
    options.allocate = [](const LayerOptions&, std::span<const int64_t>) -> std::vector<Profile> {
      kill(getpid(), SIGKILL);
      return {};
    };
    (void)Compress(options);
    _exit(1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  ASSERT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);

  // As if it had been killed while it wrote the fourth probe.
  const std::string path = options.output + ".calibration/probes.jsonl";
  const std::string log = *ReadFile(path);
  EXPECT_EQ(std::count(log.begin(), log.end(), '\n'), 1 + 3 * 15);
  size_t end = 0;
  for (int line = 0; line < 4; ++line) end = log.find('\n', end) + 1;
  ASSERT_TRUE(WriteFileAtomically(path, log.substr(0, end + 10)).ok());
  const auto resumed = Compress(options);
  ASSERT_TRUE(resumed.ok()) << resumed.status();
  EXPECT_EQ(resumed->resumed_probes, 3);
  EXPECT_EQ(resumed->resumed_sequences, 10);

  options.output = Path("again.nested");
  const auto fresh = Compress(options);
  ASSERT_TRUE(fresh.ok()) << fresh.status();
  EXPECT_EQ(fresh->resumed_probes, 0);
  EXPECT_EQ(*ReadFile(Path("again.nested/nested.safetensors")),
            *ReadFile(Path("out.nested/nested.safetensors")));
}

TEST_F(MeasuredSearchTest, CostsThatNoLevelCanHaveAreRefusedBeforeAnythingRuns) {
  CompressOptions options = Options("llama");
  const auto message = [&](std::vector<double> costs) {
    options.search.costs = std::move(costs);
    const std::string text(Refused(options).message());
    EXPECT_FALSE(fs::exists(options.output + ".calibration"));
    return text;
  };
  EXPECT_THAT(message({0.8, 0.2}),
              HasSubstr("costs: 0.2 is less than the cheapest residual level"));
  EXPECT_THAT(message({0.8, 0.7, 0.8}), HasSubstr("costs: 0.8 is there twice"));
  EXPECT_THAT(message({0.8, 0}), HasSubstr("costs: must be in (0, 1]; was 0"));
  EXPECT_THAT(message({0.8, 1.5}), HasSubstr("costs: must be in (0, 1]; was 1.5"));
  EXPECT_THAT(message({1}), HasSubstr("expected one that is below"));
}

TEST_F(MeasuredSearchTest, TwoCostsThatGiveOneLevelAreRefused) {
  CompressOptions options = Options("llama");
  options.search.costs = {0.7, 0.7000001};
  EXPECT_THAT(std::string(Refused(options).message()), HasSubstr("has no level of its own"));
}

TEST_F(MeasuredSearchTest, WhatNeedsAMeasuredSearchSaysSo) {
  CompressOptions options = Options("llama");
  options.search.method = RankSearch::kEnergy;
  options.ladder = LadderChoice::kMixed;
  EXPECT_THAT(std::string(Refused(options).message()), HasSubstr("mixed ladder needs a measured"));
  options.ladder = LadderChoice::kResidual;
  options.search.objective = RankObjective::kTime;
  EXPECT_THAT(std::string(Refused(options).message()), HasSubstr("time as the objective needs"));
}

TEST_F(MeasuredSearchTest, TooLittleTextToProbeIsRefused) {
  CompressOptions options = Options("llama");
  options.search.probe_tokens = 4096;
  EXPECT_THAT(std::string(Refused(options).message()),
              HasSubstr("probe tokens: 4096 of only 2560 calibration tokens"));
  options.search.probe_tokens = 0;
  EXPECT_THAT(std::string(Refused(options).message()),
              HasSubstr("probe tokens: must be positive; was 0"));
}

TEST_F(MeasuredSearchTest, AProbeLosesWhatItsLayerLosesAndNothingWhereItIsDense) {
  CompressOptions options = Options("llama");
  options.levels = 1;
  options.allocate = LargestRanks;
  ASSERT_TRUE(Compress(options).ok());
  auto model = NestedModel::Open(options.output);
  ASSERT_TRUE(model.ok()) << model.status();
  constexpr size_t kDown = 6;  // of the first block
  const int64_t rank = (*model)->StoredRank(kDown, Form::kResidual);
  ASSERT_GT(rank, 0);
  std::vector<Probe> probes = {{.layer = kDown, .choice = {Form::kDense, 0}, .loss = -1},
                               {.layer = kDown, .choice = {Form::kResidual, 0}, .loss = -1},
                               {.layer = kDown, .choice = {Form::kResidual, rank}, .loss = -1}};
  const size_t num_layers = (*model)->layers().size();
  // They are not nested, which levels to be served must be.
  EXPECT_FALSE((*model)->SetLevels(ProbeLevels({probes[2], probes[1]}, num_layers)).ok());
  ASSERT_TRUE((*model)->SetProbes(ProbeLevels(probes, num_layers)).ok());
  auto engine = OpenEngine(*std::move(model), MakeCpu, kWindowTokens);
  ASSERT_TRUE(engine.ok()) << engine.status();
  auto log = ProbeLog::Open(Path("probes.jsonl"), "key");
  ASSERT_TRUE(log.ok());
  std::vector<int32_t> window(200);
  for (size_t i = 0; i < window.size(); ++i) window[i] = static_cast<int32_t>(i * 37 % 256);
  const auto resumed = MeasureProbes(engine->get(), {window}, &probes, &*log);
  ASSERT_TRUE(resumed.ok()) << resumed.status();
  EXPECT_EQ(*resumed, 0);
  EXPECT_EQ(probes[0].loss, 0);
  EXPECT_GT(probes[1].loss, 0);
  EXPECT_GT(probes[2].loss, 0);
  EXPECT_LT(probes[2].loss, probes[1].loss);
  std::vector<Probe> again = probes;
  for (Probe& probe : again) probe.loss = -1;
  EXPECT_EQ(*MeasureProbes(engine->get(), {window}, &again, &*log), 3);
  for (size_t i = 0; i < probes.size(); ++i) EXPECT_EQ(again[i].loss, probes[i].loss);
}

TEST_F(MeasuredSearchTest, LayerTimesAreOfEveryFormAndAddUpToAProfile) {
  CompressOptions options = Options("llama");
  options.ladder = LadderChoice::kBoth;
  options.levels = 1;
  options.gar_levels = std::vector<int>();  // plain factors are stored
  options.allocate = LargestRanks;
  const auto report = Compress(options);
  ASSERT_TRUE(report.ok()) << report.status();
  const auto model = NestedModel::Open(options.output);
  ASSERT_TRUE(model.ok());
  const auto times = LayerTimes::Measure(**model, MakeCpu, 3);
  ASSERT_TRUE(times.ok()) << times.status();
  const std::vector<LinearSpec>& layers = (*model)->layers();
  const Profile full(layers.size());
  int64_t total = 0;
  for (const LinearSpec& layer : layers) {
    EXPECT_GT(times->Of(layer, {}), 0);
    EXPECT_GT(times->Of(layer, {Form::kResidual, 0}), 0);
    const std::vector<int64_t> ranks = PrefixRanks(layer.out, layer.in, /*may_be_gar=*/false);
    ASSERT_GE(ranks.size(), 3u);
    for (const int64_t rank : ranks) EXPECT_GT(times->Of(layer, {Form::kPrefix, rank}), 0);
    // As plain factors of as many weights.
    const int64_t sizes = layer.out + layer.in;
    EXPECT_EQ(times->Of(layer, {Form::kGar, ranks.back()}),
              times->Of(layer, {Form::kPrefix, ranks.back() * (sizes - ranks.back()) / sizes}));
    total += times->Of(layer, {});
  }
  EXPECT_EQ(times->OfProfile(layers, full), total);
}

TEST_F(MeasuredSearchTest, Stories260KPrefixesAreBetterThanByEnergies) {
  const std::string folder = std::string(kData) + "stories260K/";
  if (!fs::exists(folder)) GTEST_SKIP() << folder << " is not there";
  ASSERT_TRUE(
      ImportLlama2c(folder + "stories260K.bin", folder + "tok512.bin", Path("stories")).ok());
  const std::string text = *ReadFile(std::string(kData) + "text/tinystories_val.txt");
  ASSERT_TRUE(WriteFileAtomically(Path("text.txt"), text.substr(0, 200000)).ok());
  ASSERT_TRUE(WriteFileAtomically(Path("held_out.txt"), text.substr(400000, 100000)).ok());
  CompressOptions options = Options("stories");
  options.ladder = LadderChoice::kPrefix;
  options.corpus.calibration_tokens = 8192;
  options.evaluation_tokens = 4096;
  options.search.probe_tokens = 1024;
  options.search.probes = 3;
  options.search.costs = {0.8, 0.9};
  const auto measured = Compress(options);
  ASSERT_TRUE(measured.ok()) << measured.status();
  options.search.method = RankSearch::kEnergy;
  options.output = Path("energy.nested");
  const auto energy = Compress(options);
  ASSERT_TRUE(energy.ok()) << energy.status();
  EXPECT_TRUE(energy->search.empty());
  ASSERT_EQ(measured->levels.size(), 3u);
  ASSERT_EQ(energy->levels.size(), 3u);
  for (size_t i = 0; i < 2; ++i) {
    EXPECT_GT(measured->levels[i].metrics.quality, 1.5 * energy->levels[i].metrics.quality) << i;
  }
}

}  // namespace
}  // namespace nestor
