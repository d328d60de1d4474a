#include "compress/pipeline.h"

#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <limits>
#include <random>

#include "absl/strings/str_cat.h"
#include "base/file.h"
#include "compress/evaluate.h"
#include "compress/quantise.h"
#include "engine/engine.h"
#include "engine/interpolate.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/reference/reference_backend.h"
#include "nlohmann/json.hpp"
#include "tests/testing/temporary_directory.h"
#include "tests/testing/tiny_checkpoint.h"

namespace nestor {
namespace {

namespace fs = std::filesystem;
using testing::HasSubstr;

// Random words, so that every line is new to the model.
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

absl::StatusOr<std::unique_ptr<Backend>> MakeReference() { return MakeReferenceBackend(); }
absl::StatusOr<std::unique_ptr<Backend>> MakeRoundingReference() {
  return MakeReferenceBackend({.quantises_activations = true});
}
absl::StatusOr<std::unique_ptr<Backend>> MakeCpu() { return MakeCpuBackend({.num_threads = 1}); }
// Rounds what goes into linear layers, but not keys and values.
absl::StatusOr<std::unique_ptr<Backend>> MakeFp32CacheCpu() {
  return MakeCpuBackend({.num_threads = 1, .kv_cache_type = KvCacheType::kFloat32});
}
// Kernels whose steps of many rows are in fp32.
absl::StatusOr<std::unique_ptr<Backend>> MakeFp32Cpu() {
  return MakeCpuBackend({.num_threads = 1,
                         .instruction_set = CpuInstructionSet::kPortable,
                         .kv_cache_type = KvCacheType::kFloat32});
}

// Levels of random weights that measure worse than cheaper ones beyond doubt are left out.
constexpr int64_t kTooFewToLeaveOutALevel = 64;

class PipelineTest : public testing::Test {
 protected:
  void SetUp() override {
    ASSERT_TRUE(WriteTinyLlama(Path("llama")).ok());
    ASSERT_TRUE(WriteTinyBert(Path("bert")).ok());
    for (const std::string name : {"tiny_qwen2", "tiny_qwen3", "tiny_gpt2", "tiny_gpt2_bare"}) {
      fs::copy(NESTOR_SOURCE_DIR "/tests/data/transformers/" + name, Path(name));
    }
    ASSERT_TRUE(WriteFileAtomically(Path("text.txt"), RandomText(800, 1)).ok());
    ASSERT_TRUE(WriteFileAtomically(Path("held_out.txt"), RandomText(100, 2)).ok());
  }

  std::string Path(const std::string& name) const { return directory_.path() + "/" + name; }

  CompressOptions Options(const std::string& model) const {
    CompressOptions options;
    options.source = Path(model);
    options.output = Path("out.nested");
    options.levels = 4;
    options.max_residual_rank = 16;
    options.corpus.calibration_paths = {Path("text.txt")};
    options.corpus.evaluation_path = Path("held_out.txt");
    options.corpus.calibration_tokens = 2560;
    options.evaluation_tokens = 512;
    options.self_sample_tokens = 0;
    options.threads = 2;
    options.make_backend = MakeCpu;
    return options;
  }

  // A prefix ladder of one level of the tiny Llama, whose ranks depend on no measurement.
  CompressOptions OptionsOfOneLevel() const {
    CompressOptions options = Options("llama");
    options.ladder = LadderChoice::kPrefix;
    options.search.method = RankSearch::kEnergy;
    options.search.costs = {0.7};
    options.evaluation_tokens = kTooFewToLeaveOutALevel;
    return options;
  }

  // Runs a compression in a child that dies once everything is decomposed.
  void RunAndKill(CompressOptions options) const {
    const pid_t child = fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
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
  }

  TemporaryDirectory directory_;
};

std::unique_ptr<Engine> OpenArtifact(const std::string& path, const BackendFactory& make_backend) {
  auto model = NestedModel::Open(path);
  EXPECT_TRUE(model.ok()) << model.status();
  if (!model.ok()) return nullptr;
  auto engine = OpenEngine(*std::move(model), make_backend, kWindowTokens);
  EXPECT_TRUE(engine.ok()) << engine.status();
  return engine.ok() ? *std::move(engine) : nullptr;
}

// Of more rows z = A x is rounded to int8, too, which the reference does not do.
constexpr size_t kFewRows = 16;

// Largest difference of log-probabilities (or embeddings) between two engines at one level, over
// texts of `lengths` tokens (language models).
double LargestDifference(Engine* a, Engine* b, int level, const std::string& text,
                         const std::vector<size_t>& lengths) {
  const ModelSpec& spec = a->model().spec();
  const auto sequences = SequencesOf(text, a->tokenizer(), spec, 64);
  EXPECT_TRUE(sequences.ok());
  std::vector<double> values[2];
  Engine* const engines[] = {a, b};
  for (int i = 0; i < 2; ++i) {
    if (spec.is_encoder()) {
      const auto embeddings = EmbedSentences(engines[i], *sequences, level, nullptr);
      EXPECT_TRUE(embeddings.ok()) << embeddings.status();
      for (const auto& row : *embeddings) values[i].insert(values[i].end(), row.begin(), row.end());
      continue;
    }
    // Prefixes of different lengths give one sum of log-probabilities each.
    for (const size_t length : lengths) {
      const TokenSequences window = {
          {(*sequences)[0].begin(), (*sequences)[0].begin() + static_cast<ptrdiff_t>(length)}};
      const auto scores = ScoreWindows(engines[i], window, level, nullptr);
      EXPECT_TRUE(scores.ok()) << scores.status();
      values[i].push_back((*scores)[0].log_likelihood / static_cast<double>(length));
    }
  }
  double largest = 0;
  EXPECT_EQ(values[0].size(), values[1].size());
  for (size_t i = 0; i < values[0].size(); ++i) {
    largest = std::max(largest, std::fabs(values[0][i] - values[1][i]));
  }
  return largest;
}

struct Case {
  std::string name;
  std::string model;
  LadderChoice ladder;
  DenseStorage dense;
};
void PrintTo(const Case& value, std::ostream* out) { *out << value.name; }

class ArtifactTest : public PipelineTest, public testing::WithParamInterface<Case> {};

TEST_P(ArtifactTest, OpensAndEveryLevelEqualsTheReference) {
  CompressOptions options = Options(GetParam().model);
  options.ladder = GetParam().ladder;
  options.dense = GetParam().dense;
  const auto report = Compress(options);
  ASSERT_TRUE(report.ok()) << report.status();
  const std::unique_ptr<Engine> cpu = OpenArtifact(options.output, MakeCpu);
  const std::unique_ptr<Engine> fp32_cache_cpu = OpenArtifact(options.output, MakeFp32CacheCpu);
  const std::unique_ptr<Engine> fp32_cpu = OpenArtifact(options.output, MakeFp32Cpu);
  const std::unique_ptr<Engine> reference = OpenArtifact(options.output, MakeReference);
  const std::unique_ptr<Engine> rounding = OpenArtifact(options.output, MakeRoundingReference);
  ASSERT_TRUE(cpu != nullptr && fp32_cache_cpu != nullptr && fp32_cpu != nullptr &&
              reference != nullptr && rounding != nullptr);
  const std::vector<Level>& levels = cpu->model().levels();
  // Random text does not tell which level is better, so that some may be left out.
  ASSERT_GE(levels.size(), 2u);
  ASSERT_EQ(levels.size(), report->levels.size());
  for (size_t i = 0; i < levels.size(); ++i) {
    EXPECT_EQ(levels[i].profile, report->levels[i].profile);
    EXPECT_DOUBLE_EQ(levels[i].metrics.quality, report->levels[i].metrics.quality);
    const int level = static_cast<int>(i);
    EXPECT_LT(
        LargestDifference(fp32_cpu.get(), reference.get(), level, RandomText(20, 3), {24, 48, 60}),
        1e-4)
        << "level " << i;
    // Rounded to int8, and keys and values to bf16; these tiny random models are sensitive.
    EXPECT_LT(LargestDifference(cpu.get(), reference.get(), level, RandomText(20, 3), {24, 48, 60}),
              0.1)
        << "level " << i;
    if (cpu->model().spec().is_encoder()) continue;
    // What is left is an activation that rounds to the neighbouring code, and z as integers.
    EXPECT_LT(LargestDifference(fp32_cache_cpu.get(), rounding.get(), level, RandomText(20, 3),
                                {2, 7, kFewRows}),
              3e-2)
        << "level " << i;
  }
  EXPECT_EQ(levels.back().ladder, "full");
  EXPECT_GT(*levels.back().metrics.quality_vs_source, 0.97);
  EXPECT_LT(*levels.back().metrics.quality_vs_source, 1.02);
  EXPECT_FALSE(fs::exists(options.output + ".partial"));
  EXPECT_FALSE(fs::exists(options.output + ".calibration"));
}

// One token for each of two sequences, at `levels`.
std::vector<StepResult::Entry> StepOfTwo(Engine* engine, const std::vector<int>& levels,
                                         LevelSet may_run,
                                         std::vector<std::vector<float>>* logits) {
  const std::vector<int32_t> token = {65};
  StepPlan plan;
  for (const int level : levels) {
    plan.entries.push_back({.sequence = engine->AddSequence(4).value(),
                            .tokens = token,
                            .level = level,
                            .may_run = may_run,
                            .output = StepEntry::Output::kLastLogits});
  }
  const StepResult result = engine->Step(plan).value();
  logits->clear();
  for (const StepResult::Entry& entry : result.entries)
    logits->emplace_back(entry.values.begin(), entry.values.end());
  for (const StepEntry& entry : plan.entries) engine->RemoveSequence(entry.sequence);
  return result.entries;
}

TEST_F(PipelineTest, ARowRunsAtABetterLevelThatItsStepReadsAnywayWhereItMay) {
  CompressOptions options = Options("llama");
  options.ladder = LadderChoice::kBoth;
  ASSERT_TRUE(Compress(options).ok());
  const std::unique_ptr<Engine> engine = OpenArtifact(options.output, MakeCpu);
  ASSERT_NE(engine, nullptr);
  const int full = static_cast<int>(engine->model().levels().size()) - 1;
  std::vector<std::vector<float>> logits;
  for (int low = 0; low < full; ++low) {
    SCOPED_TRACE(low);
    EXPECT_EQ(StepOfTwo(engine.get(), {low, full}, 0, &logits)[0].executed_level, low);
    // Another level of the set that no row runs is no reason to move.
    EXPECT_EQ(StepOfTwo(engine.get(), {low, low}, SetOf(full), &logits)[0].executed_level, low);
    const auto raised = StepOfTwo(engine.get(), {low, full}, SetOf(full), &logits);
    EXPECT_EQ(raised[0].executed_level, full);
    EXPECT_EQ(raised[1].executed_level, full);
    EXPECT_EQ(logits[0], logits[1]);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Kinds, ArtifactTest,
    testing::Values(
        Case{"llama_int8_both", "llama", LadderChoice::kBoth, DenseStorage::kPlanes},
        Case{"llama_bf16_residual", "llama", LadderChoice::kResidual, DenseStorage::kBf16},
        Case{"qwen3_int8_both", "tiny_qwen3", LadderChoice::kBoth, DenseStorage::kPlanes},
        Case{"gpt2_int8_both", "tiny_gpt2_bare", LadderChoice::kBoth, DenseStorage::kPlanes},
        Case{"bert_int8_both", "bert", LadderChoice::kBoth, DenseStorage::kPlanes},
        Case{"bert_bf16_prefix", "bert", LadderChoice::kPrefix, DenseStorage::kBf16}),
    [](const auto& info) { return info.param.name; });

class ExactArtifactTest : public PipelineTest, public testing::WithParamInterface<const char*> {};

// These checkpoints' weights are exact in bf16, so nothing may be lost on the way.
TEST_P(ExactArtifactTest, TheFullLevelOfABf16ArtifactEqualsItsSource) {
  CompressOptions options = Options(GetParam());
  options.dense = DenseStorage::kBf16;
  ASSERT_TRUE(Compress(options).ok());
  const std::unique_ptr<Engine> source = OpenArtifact(options.source, MakeReference);
  const std::unique_ptr<Engine> artifact = OpenArtifact(options.output, MakeReference);
  ASSERT_TRUE(source != nullptr && artifact != nullptr);
  std::vector<int32_t> tokens(64);
  for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<int32_t>(i * 37 % 256);
  const int full = static_cast<int>(artifact->model().levels().size()) - 1;
  const auto expected = LogProbabilities(source.get(), tokens, 0);
  const auto actual = LogProbabilities(artifact.get(), tokens, full);
  ASSERT_TRUE(expected.ok() && actual.ok());
  EXPECT_THAT(*actual, testing::Pointwise(testing::DoubleNear(1e-6), *expected));
}

INSTANTIATE_TEST_SUITE_P(Families, ExactArtifactTest,
                         testing::Values("tiny_qwen2", "tiny_qwen3", "tiny_gpt2"),
                         [](const auto& info) { return std::string(info.param); });

// Mean squared distance of a level's embeddings of `text` from the full level's.
double DistanceFromFull(const std::string& artifact, int level, const std::string& text) {
  const std::unique_ptr<Engine> engine = OpenArtifact(artifact, MakeCpu);
  const auto sequences = SequencesOf(text, engine->tokenizer(), engine->model().spec(), 0);
  EXPECT_TRUE(sequences.ok());
  const int full = static_cast<int>(engine->model().levels().size()) - 1;
  const auto cut = EmbedSentences(engine.get(), *sequences, level, nullptr);
  const auto whole = EmbedSentences(engine.get(), *sequences, full, nullptr);
  EXPECT_TRUE(cut.ok() && whole.ok());
  double sum = 0;
  for (size_t i = 0; i < cut->size(); ++i) {
    for (size_t j = 0; j < (*cut)[i].size(); ++j) {
      sum += std::pow(static_cast<double>((*cut)[i][j]) - (*whole)[i][j], 2);
    }
  }
  return sum / static_cast<double>(cut->size());
}

TEST_F(PipelineTest, RefittedPrefixesStayCloserToTheFullLevel) {
  CompressOptions options = Options("bert");
  options.ladder = LadderChoice::kPrefix;
  options.refit_tokens = 0;
  ASSERT_TRUE(Compress(options).ok());
  options.output = Path("refitted.nested");
  options.refit_tokens = 2560;
  const auto report = Compress(options);
  ASSERT_TRUE(report.ok()) << report.status();
  // The second level is one of those that are walked; the text is new.
  const std::string text = RandomText(100, 4);
  EXPECT_LT(DistanceFromFull(options.output, 1, text),
            0.9 * DistanceFromFull(Path("out.nested"), 1, text));
}

int64_t CountGar(const Level& level) {
  return std::count_if(level.profile.begin(), level.profile.end(),
                       [](const FormAndRank& layer) { return layer.form == Form::kGar; });
}

TEST_F(PipelineTest, LevelsBetweenThoseOfGarPairsRunAtTheCostThatTheyState) {
  CompressOptions options = OptionsOfOneLevel();
  options.search.costs = {0.7, 0.85};
  const auto report = Compress(options);
  ASSERT_TRUE(report.ok()) << report.status();
  ASSERT_GT(CountGar(report->levels[0]), 0);
  auto model = NestedModel::Open(options.output);
  ASSERT_TRUE(model.ok()) << model.status();
  const auto swept = WithSweptLevels(**model, 5);
  ASSERT_TRUE(swept.ok()) << swept.status();
  ASSERT_GT(swept->size(), report->levels.size());
  ASSERT_TRUE((*model)->SetLevels(*swept).ok());
  const auto engine = Engine::Create(*std::move(model), MakeReferenceBackend(), {});
  ASSERT_TRUE(engine.ok()) << engine.status();
  const std::vector<int32_t> tokens = {1, 2, 3};
  for (size_t i = 0; i < swept->size(); ++i) {
    const auto sequence = (*engine)->AddSequence(8);
    ASSERT_TRUE(sequence.ok());
    StepPlan plan;
    plan.entries.push_back({.sequence = *sequence,
                            .tokens = tokens,
                            .level = static_cast<int>(i),
                            .output = StepEntry::Output::kAllLogits});
    const auto result = (*engine)->Step(plan);
    ASSERT_TRUE(result.ok()) << result.status();
    EXPECT_EQ(result->executed.weight_bytes, (*swept)[i].cost.weight_bytes) << i;
    (*engine)->RemoveSequence(*sequence);
  }
}

TEST_F(PipelineTest, ExtraCostsAreMeasuredAndStoredLikeOtherLevels) {
  ASSERT_TRUE(WriteTinyLlama(Path("other"), {.seed = 3}).ok());
  CompressOptions options = Options("other");
  options.levels = 1;
  options.evaluation_tokens = kTooFewToLeaveOutALevel;
  options.extra_costs = {{"", 0.8}, {"residual", 0.01}};
  const auto report = Compress(options);
  ASSERT_TRUE(report.ok()) << report.status();
  ASSERT_EQ(report->levels.size(), 3u) << testing::PrintToString(report->notes);
  EXPECT_THAT(
      report->notes,
      testing::Contains(HasSubstr("left out the extra cost residual:0.01: must be between")));

  const auto model = NestedModel::Open(options.output);
  ASSERT_TRUE(model.ok()) << model.status();
  const Level& extra = report->levels[1];
  EXPECT_GT(extra.relative_cost, 0.75);
  EXPECT_LE(extra.relative_cost, 0.8);
  EXPECT_FALSE(extra.is_interpolated);
  const Level& stored = (*model)->levels()[1];
  EXPECT_EQ(stored.profile, extra.profile);
  EXPECT_EQ(stored.metrics.perplexity, extra.metrics.perplexity);
  EXPECT_TRUE(stored.metrics.perplexity.has_value());  // which no estimate is

  // The same levels, in whatever order costs are named.
  options.overwrites = true;
  options.evaluation_tokens = 512;
  std::vector<std::vector<Level>> made;
  for (const std::vector<WantedLevel>& costs :
       {std::vector<WantedLevel>{{"", 0.7}, {"", 0.85}}, {{"", 0.85}, {"", 0.7}}}) {
    options.extra_costs = costs;
    ASSERT_TRUE(Compress(options).ok());
    const auto again = NestedModel::Open(options.output);
    ASSERT_TRUE(again.ok()) << again.status();
    made.push_back((*again)->levels());
  }
  ASSERT_EQ(made[0].size(), made[1].size());
  ASSERT_GT(made[0].size(), 2u);
  for (size_t i = 0; i < made[0].size(); ++i) EXPECT_EQ(made[0][i].profile, made[1][i].profile);
}

TEST_F(PipelineTest, AnArtifactToTrainHasTheRanksOfGarPairsAsPlainFactors) {
  CompressOptions options = OptionsOfOneLevel();
  const auto with = Compress(options);
  ASSERT_TRUE(with.ok()) << with.status();
  options.output = Path("to_train.nested");
  options.makes_gar_pairs = false;
  const auto to_train = Compress(options);
  ASSERT_TRUE(to_train.ok()) << to_train.status();
  EXPECT_EQ(to_train->gar_pairs, 0);
  EXPECT_GT(to_train->levels[0].relative_flops, with->levels[0].relative_flops + 0.01);
  const Profile& pairs = with->levels[0].profile;
  const Profile& plain = to_train->levels[0].profile;
  int64_t num_pairs = 0;
  for (size_t layer = 0; layer < pairs.size(); ++layer) {
    EXPECT_EQ(plain[layer].rank, pairs[layer].rank) << layer;
    EXPECT_NE(plain[layer].form, Form::kGar) << layer;
    EXPECT_EQ(plain[layer].form == Form::kDense, pairs[layer].form == Form::kDense) << layer;
    num_pairs += pairs[layer].form == Form::kGar ? 1 : 0;
  }
  EXPECT_GT(num_pairs, 0);

  options.search = {};
  options.output = Path("residual.nested");
  options.ladder = LadderChoice::kResidual;
  EXPECT_THAT(Compress(options).status().message(),
              HasSubstr("gar levels: put off, but a residual ladder"));
}

TEST_F(PipelineTest, WithoutGarPairsALevelHasSmallerRanks) {
  CompressOptions options = OptionsOfOneLevel();
  const auto with = Compress(options);
  ASSERT_TRUE(with.ok()) << with.status();
  options.output = Path("plain.nested");
  options.gar_levels = std::vector<int>();
  const auto without = Compress(options);
  ASSERT_TRUE(without.ok()) << without.status();
  EXPECT_EQ(without->gar_pairs, 0);
  EXPECT_EQ(CountGar(without->levels[0]), 0);
  EXPECT_GT(CountGar(with->levels[0]), 0);
  // Dense layers count with all their ranks.
  int64_t sums[2] = {};
  const auto model = NestedModel::Open(options.output);
  ASSERT_TRUE(model.ok());
  for (size_t layer = 0; layer < (*model)->layers().size(); ++layer) {
    const LinearSpec& spec = (*model)->layers()[layer];
    for (const auto* report : {&with, &without}) {
      const auto [form, rank] = (**report).levels[0].profile[layer];
      sums[report == &with ? 0 : 1] += form == Form::kDense ? std::min(spec.out, spec.in) : rank;
    }
  }
  EXPECT_GT(sums[0], sums[1]);
  EXPECT_LE(with->levels[0].relative_flops, 0.7);
}

TEST_F(PipelineTest, GarLevelsThatAreNotThereAreRefused) {
  CompressOptions options = Options("llama");
  options.gar_levels = {{0}};
  EXPECT_THAT(std::string(Compress(options).status().message()),
              HasSubstr("gar levels: 0, but a residual ladder has no gar pairs"));
  options.ladder = LadderChoice::kPrefix;
  options.gar_levels = {{1, 4}};
  EXPECT_THAT(std::string(Compress(options).status().message()),
              HasSubstr("gar levels: expected 0 to 3, from the ladder's cheapest; was 4"));
  options.search.costs = {1, 0.8, 0.6};
  options.gar_levels = {{2}};
  EXPECT_THAT(std::string(Compress(options).status().message()),
              HasSubstr("gar levels: expected 0 to 1"));
}

TEST_F(PipelineTest, DamagedGarPairsAreRefusedByName) {
  CompressOptions options = Options("llama");
  options.ladder = LadderChoice::kPrefix;
  options.evaluation_tokens = kTooFewToLeaveOutALevel;
  ASSERT_TRUE(Compress(options).ok());
  const std::string description_path = options.output + "/nested.json";
  const std::string tensors_path = options.output + "/nested.safetensors";
  const nlohmann::json description = nlohmann::json::parse(*ReadFile(description_path));
  size_t layer = 0;
  while (!description["layers"].at(layer).contains("gar_ranks")) ++layer;
  const int64_t rank = description["layers"][layer]["gar_ranks"][0];
  const std::string name = description["layers"][layer]["name"];
  const auto message = [&] {
    return std::string(NestedModel::Open(options.output).status().message());
  };
  const auto write = [&](const nlohmann::json& json) {
    ASSERT_TRUE(WriteFileAtomically(description_path, json.dump()).ok());
  };

  nlohmann::json damaged = description;
  damaged["layers"][layer].erase("gar_ranks");
  write(damaged);
  EXPECT_THAT(message(), HasSubstr(absl::StrCat("layer ", name, ": gar rank ", rank,
                                                ", but no pair of that rank is stored")));
  for (const nlohmann::json& ranks : {nlohmann::json("all"), nlohmann::json({rank, rank}),
                                      nlohmann::json({0}), nlohmann::json({1000})}) {
    damaged = description;
    damaged["layers"][layer]["gar_ranks"] = ranks;
    write(damaged);
    EXPECT_THAT(message(), HasSubstr(absl::StrCat("layers[", layer, "].gar_ranks: ", ranks.dump(),
                                                  ", expected ascending counts")));
  }
  damaged = description;
  damaged["layers"][layer]["gar_ranks"].push_back(71);
  write(damaged);
  EXPECT_THAT(message(), HasSubstr(absl::StrCat(name, ".gar.71.a")));
  write(description);

  const auto tensors = TensorFile::Open({tensors_path});
  ASSERT_TRUE(tensors.ok());
  const std::string rows_name = absl::StrCat(name, ".gar.", rank, ".rows");
  const std::byte* least = nullptr;
  for (const auto& [key, view] : (*tensors)->tensors()) {
    if (least == nullptr || view.bytes.data() < least) least = view.bytes.data();
  }
  const std::byte* const rows_data = (*tensors)->tensors().at(rows_name).bytes.data();
  std::string bytes = *ReadFile(tensors_path);
  uint64_t header = 0;
  std::memcpy(&header, bytes.data(), sizeof(header));
  char* const rows = bytes.data() + sizeof(header) + header + (rows_data - least);
  std::swap_ranges(rows, rows + 4, rows + 4);
  ASSERT_TRUE(WriteFileAtomically(tensors_path, bytes).ok());
  EXPECT_THAT(message(), HasSubstr(rows_name + ": its bytes do not have the checksum"));
  std::copy_n(rows, 4, rows + 4);
  ASSERT_TRUE(WriteFileAtomically(tensors_path, bytes).ok());
  EXPECT_THAT(message(), HasSubstr(rows_name + ": element 1 is"));
}

TEST_F(PipelineTest, PlanesHoldTheSourceWeights) {
  const CompressOptions options = Options("llama");
  ASSERT_TRUE(Compress(options).ok());
  const auto source = NestedModel::Open(options.source);
  const auto artifact = NestedModel::Open(options.output);
  ASSERT_TRUE(source.ok() && artifact.ok()) << artifact.status();
  for (size_t i = 0; i < (*source)->layers().size(); ++i) {
    const LinearSpec& spec = (*source)->layers()[i];
    std::vector<float> scratch, artifact_scratch;
    const auto weights = (*source)->Weights(i, &scratch);
    const auto parts = (*artifact)->Weights(i, &artifact_scratch);
    ASSERT_TRUE(weights.ok() && parts.ok());
    const int64_t plane_bytes = spec.out * PaddedToGroup(spec.in) / 2;
    const Planes planes{.out = spec.out,
                        .in = spec.in,
                        .coarse = {parts->coarse, parts->coarse + plane_bytes},
                        .fine = {parts->fine, parts->fine + plane_bytes},
                        .scales = {parts->scales, parts->scales + spec.out * NumGroups(spec.in)}};
    const std::vector<float> dense = DequantiseDense(planes);
    double error = 0;
    double energy = 0;
    for (size_t j = 0; j < dense.size(); ++j) {
      error += std::pow(dense[j] - weights->dense_f32[j], 2);
      energy += std::pow(weights->dense_f32[j], 2);
    }
    // 3e-5 if every code were the nearest one; what counts is the output.
    EXPECT_LT(error, 1e-3 * energy) << spec.name;
    EXPECT_GT(error, 0) << spec.name;
  }
}

TEST_F(PipelineTest, AKilledRunLeavesNoArtifactAndResumesFromItsCalibration) {
  const CompressOptions options = Options("llama");
  RunAndKill(options);
  EXPECT_FALSE(fs::exists(options.output));
  EXPECT_TRUE(fs::exists(options.output + ".calibration/calibration.json"));
  const auto resumed = Compress(options);
  ASSERT_TRUE(resumed.ok()) << resumed.status();
  EXPECT_EQ(resumed->resumed_sequences, 10);  // 2,560 tokens in windows of 256
  EXPECT_FALSE(fs::exists(options.output + ".calibration"));
  EXPECT_FALSE(fs::exists(options.output + ".partial"));

  CompressOptions other = options;
  other.output = Path("again.nested");
  const auto fresh = Compress(other);
  ASSERT_TRUE(fresh.ok()) << fresh.status();
  EXPECT_EQ(fresh->resumed_sequences, 0);
  EXPECT_EQ(*ReadFile(Path("again.nested/nested.safetensors")),
            *ReadFile(Path("out.nested/nested.safetensors")));
}

TEST_F(PipelineTest, ADamagedOrForeignCalibrationIsReplaced) {
  CompressOptions options = Options("llama");
  RunAndKill(options);
  const std::string moments = options.output + ".calibration/moments-10.safetensors";
  std::string bytes = *ReadFile(moments);
  bytes[bytes.size() / 2] ^= 0x40;
  ASSERT_TRUE(WriteFileAtomically(moments, bytes).ok());
  const auto repaired = Compress(options);
  ASSERT_TRUE(repaired.ok()) << repaired.status();
  EXPECT_EQ(repaired->resumed_sequences, 0);

  options.overwrites = true;
  RunAndKill(options);
  ASSERT_TRUE(WriteFileAtomically(Path("text.txt"), RandomText(800, 9)).ok());
  const auto foreign = Compress(options);
  ASSERT_TRUE(foreign.ok()) << foreign.status();
  EXPECT_EQ(foreign->resumed_sequences, 0);
}

TEST_F(PipelineTest, AFullDiskNamesTheFileAndLeavesNothing) {
  const CompressOptions options = Options("llama");
  RunAndKill(options);  // so that only the artifact itself is left to write
  rlimit old_limit = {};
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &old_limit), 0);
  // Files may not grow beyond this: smaller than the parts, larger than what else is written.
  const rlimit limit = {.rlim_cur = 50000, .rlim_max = old_limit.rlim_max};
  const auto old_handler = signal(SIGXFSZ, SIG_IGN);
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &limit), 0);
  const absl::Status status = Compress(options).status();
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &old_limit), 0);
  signal(SIGXFSZ, old_handler);
  ASSERT_FALSE(status.ok());
  EXPECT_THAT(std::string(status.message()), HasSubstr("out.nested.partial/parts.spill"));
  EXPECT_FALSE(fs::exists(options.output));
  EXPECT_FALSE(fs::exists(options.output + ".partial"));
  EXPECT_TRUE(fs::exists(options.output + ".calibration"));
}

TEST_F(PipelineTest, TextThatIsTooShortIsRefused) {
  CompressOptions options = Options("llama");
  ASSERT_TRUE(WriteFileAtomically(Path("text.txt"), RandomText(10, 1)).ok());
  const absl::Status status = Compress(options).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("at least 2048 are needed"));
  EXPECT_FALSE(fs::exists(options.output));
}

TEST_F(PipelineTest, WeightsThatAreNotFiniteAreRefusedByName) {
  const CompressOptions options = Options("llama");
  const std::string path = Path("llama/model.safetensors");
  std::string bytes = *ReadFile(path);
  const auto tensors = TensorFile::Open({path});
  ASSERT_TRUE(tensors.ok());
  const auto view = (*tensors)->Get("model.layers.1.mlp.down_proj.weight", {72, 100});
  ASSERT_TRUE(view.ok());
  const auto first = (*tensors)->Get("model.embed_tokens.weight", {-1, 72});
  ASSERT_TRUE(first.ok());
  const float bad = std::numeric_limits<float>::quiet_NaN();
  // The header's length, then the header, then the tensors: find the offset from the mapping.
  uint64_t header = 0;
  std::memcpy(&header, bytes.data(), sizeof(header));
  const std::byte* least = view->bytes.data();
  for (const auto& [name, tensor] : (*tensors)->tensors()) {
    least = std::min(least, tensor.bytes.data());
  }
  const size_t offset =
      sizeof(header) + header + static_cast<size_t>(view->bytes.data() - least) + 8;
  std::memcpy(bytes.data() + offset, &bad, sizeof(bad));
  ASSERT_TRUE(WriteFileAtomically(path, bytes).ok());
  const absl::Status status = Compress(options).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()),
              HasSubstr("model.layers.1.mlp.down_proj.weight: element 2"));
}

TEST_F(PipelineTest, AnExistingOutputIsKeptUnlessForced) {
  CompressOptions options = Options("llama");
  options.levels = 2;
  ASSERT_TRUE(Compress(options).ok());
  const std::string before = *ReadFile(options.output + "/nested.json");
  options.evaluation_tokens = 256;
  EXPECT_EQ(Compress(options).status().code(), absl::StatusCode::kAlreadyExists);
  EXPECT_EQ(*ReadFile(options.output + "/nested.json"), before);
  options.overwrites = true;
  options.output += "/";
  ASSERT_TRUE(Compress(options).ok());
  EXPECT_NE(*ReadFile(options.output + "/nested.json"), before);
}

TEST_F(PipelineTest, SampledTextIsDeterministicAndOnlyForLanguageModels) {
  CompressOptions options = Options("llama");
  options.self_sample_tokens = 1024;
  options.levels = 2;
  const auto report = Compress(options);
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_EQ(report->calibration_tokens, 2560 + 1024);
  options.output = Path("again.nested");
  ASSERT_TRUE(Compress(options).ok());
  EXPECT_EQ(*ReadFile(Path("again.nested/nested.safetensors")),
            *ReadFile(Path("out.nested/nested.safetensors")));

  CompressOptions encoder = Options("bert");
  encoder.self_sample_tokens = 1024;
  encoder.output = Path("bert.nested");
  EXPECT_EQ(Compress(encoder).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(PipelineTest, AnArtifactIsNoSource) {
  CompressOptions options = Options("llama");
  options.levels = 2;
  ASSERT_TRUE(Compress(options).ok());
  options.source = options.output;
  options.output = Path("twice.nested");
  EXPECT_EQ(Compress(options).status().code(), absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace nestor
