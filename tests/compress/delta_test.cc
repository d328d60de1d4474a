#include "compress/delta.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <functional>
#include <limits>
#include <map>
#include <random>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/bfloat16.h"
#include "base/checksum.h"
#include "base/file.h"
#include "compress/pipeline.h"
#include "compress/quantise.h"
#include "compress/report.h"
#include "engine/engine.h"
#include "engine/tensor_file.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "nlohmann/json.hpp"
#include "tests/testing/temporary_directory.h"
#include "tests/testing/tiny_checkpoint.h"

namespace nestor {
namespace {

using Json = nlohmann::json;
using testing::AllOf;
using testing::HasSubstr;

constexpr int64_t kRank = 2;

std::string Words(int lines, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::string text;
  for (int i = 0; i < lines * 4; ++i) {
    for (uint64_t letters = 2 + random() % 6; letters > 0; --letters) {
      text += static_cast<char>('a' + random() % 26);
    }
    text += i % 4 < 3 ? ' ' : '\n';
  }
  return text;
}

struct StoredTensor {
  DType dtype;
  std::vector<int64_t> shape;
  std::string bytes;
};

template <typename Element>
StoredTensor Stored(DType dtype, std::vector<int64_t> shape, const std::vector<Element>& elements) {
  return {dtype, std::move(shape),
          std::string(reinterpret_cast<const char*>(elements.data()),
                      elements.size() * sizeof(Element))};
}

// What a delta file says, free to be damaged before it is written.
struct DeltaFile {
  Json metadata;
  std::map<std::string, FactorCodes> factors;    // NAME.a, NAME.bt
  std::map<std::string, StoredTensor> replaced;  // in place of those that factors are stored as

  absl::Status Write(const std::string& path) const {
    std::map<std::string, StoredTensor> tensors = replaced;
    for (const auto& [name, factor] : factors) {
      tensors.emplace(name,
                      Stored(DType::kI8, {factor.rank, PaddedToGroup(factor.size)}, factor.codes));
      tensors.emplace(name + "_scales",
                      Stored(DType::kBf16, {factor.rank, NumGroups(factor.size)}, factor.scales));
    }
    Json header = {{"__metadata__", metadata}};
    std::string data;
    for (const auto& [name, tensor] : tensors) {
      const size_t begin = data.size();
      data += tensor.bytes;
      header[name] = {{"dtype", NameOf(tensor.dtype)},
                      {"shape", tensor.shape},
                      {"data_offsets", {begin, data.size()}}};
    }
    const std::string text = header.dump();
    const uint64_t length = text.size();
    std::string file(reinterpret_cast<const char*>(&length), sizeof(length));
    return WriteFileAtomically(path, file + text + data);
  }
};

FactorCodes RandomFactor(int64_t rank, int64_t size, std::mt19937_64* random,
                         float deviation = 0.1f) {
  std::normal_distribution<float> normal(0, deviation);
  std::vector<float> values;
  for (int64_t i = 0; i < rank * size; ++i) values.push_back(normal(*random));
  return QuantiseFactor(values, rank, size);
}

class DeltaTest : public testing::Test {
 protected:
  void SetUp() override {
    ASSERT_TRUE(WriteFileAtomically(Path("text.txt"), Words(800, 1)).ok());
    ASSERT_TRUE(WriteFileAtomically(Path("held_out.txt"), Words(100, 2)).ok());
    ASSERT_TRUE(WriteTinyLlama(Path("source")).ok());
    ReadSource();
  }

  void ReadSource() {
    auto source = NestedModel::Open(Path("source"));
    ASSERT_TRUE(source.ok()) << source.status();
    layers_ = (*source)->layers();
    spec_ = (*source)->spec();
    auto sha256 = Sha256OfFiles((*source)->tensors().paths());
    ASSERT_TRUE(sha256.ok());
    sha256_ = *sha256;
  }

  std::string Path(const std::string& name) const { return directory_.path() + "/" + name; }

  CompressOptions Options(const std::string& output) const {
    CompressOptions options;
    options.source = Path("source");
    options.output = Path(output);
    options.ladder = LadderChoice::kPrefix;
    options.levels = 2;
    options.gar_levels = std::vector<int>();
    options.corpus.calibration_paths = {Path("text.txt")};
    options.corpus.evaluation_path = Path("held_out.txt");
    options.corpus.calibration_tokens = 2560;
    // So few that no level is left out for measuring worse than a cheaper one.
    options.evaluation_tokens = 64;
    options.self_sample_tokens = 0;
    options.make_backend = [] { return MakeCpuBackend({.num_threads = 1}); };
    return options;
  }

  // Random terms for every layer, and levels at ranks 8 and 16 but for the first layer, which is
  // dense on the upper one.
  DeltaFile ValidFile() const {
    std::mt19937_64 random(7);
    DeltaFile file;
    Json names = Json::array();
    Json levels = Json::array();
    for (const int64_t rank : {8, 16}) {
      std::vector<std::string> forms(layers_.size(), "prefix");
      std::vector<int64_t> ranks(layers_.size(), rank);
      if (rank == 16) {
        forms[0] = "dense";
        ranks[0] = 0;
      }
      levels.push_back({{"forms", forms}, {"ranks", ranks}});
    }
    for (const LinearSpec& layer : layers_) {
      names.push_back(layer.name);
      for (const auto& [part, size] : {std::pair(".a", layer.in), std::pair(".bt", layer.out)}) {
        file.factors[layer.name + part] = RandomFactor(kRank, size, &random);
      }
    }
    file.metadata = {{"format", "nestor-delta"},
                     {"version", "3"},
                     {"source_sha256", sha256_},
                     {"layers", names.dump()},
                     {"levels", levels.dump()}};
    return file;
  }

  // The same with what the artifact `output` was calibrated on.
  DeltaFile FileBeside(const std::string& output) const {
    DeltaFile file = ValidFile();
    const auto calibration = TensorFile::Open({Path(output) + "/calibration.safetensors"});
    EXPECT_TRUE(calibration.ok()) << calibration.status();
    if (!calibration.ok()) return file;
    for (const auto& [name, view] : (*calibration)->tensors()) {
      file.replaced["calibration." + name] = {
          view.dtype, view.shape,
          std::string(reinterpret_cast<const char*>(view.bytes.data()), view.bytes.size())};
    }
    return file;
  }

  // A file for gar pairs: every layer at these ranks on its levels, a Llama's key and value
  // layers, which have 24 outputs, at a third of them. Terms of deviation 0.3 are as large as the
  // weights.
  DeltaFile FileAtRanks(const std::vector<int64_t>& ranks, float deviation) const {
    std::mt19937_64 random(9);
    DeltaFile file = ValidFile();
    for (auto& [name, factor] : file.factors) {
      factor = RandomFactor(factor.rank, factor.size, &random, deviation);
    }
    Json levels = Json::array();
    for (const int64_t rank : ranks) {
      Json own = Json::array();
      for (const LinearSpec& layer : layers_) own.push_back(layer.out == 24 ? rank / 3 : rank);
      levels.push_back(
          {{"forms", std::vector<std::string>(layers_.size(), "prefix")}, {"ranks", own}});
    }
    file.metadata["levels"] = levels.dump();
    return file;
  }

  // Compresses with a delta. REQUIRES: that the level is not left out for measuring worse than the
  // one below.
  Level CompressedLevel(const DeltaFile& file, const CompressOptions& options, size_t level) const {
    EXPECT_TRUE(file.Write(options.delta).ok());
    const auto report = Compress(options);
    EXPECT_TRUE(report.ok()) << report.status();
    if (!report.ok()) return {};
    EXPECT_GT(report->levels.size(), level + 1);
    return report->levels[level];
  }

  // Logits of the cheapest level after every token of a text.
  std::vector<float> CheapestLogits(const std::string& artifact) const {
    auto model = NestedModel::Open(artifact);
    EXPECT_TRUE(model.ok()) << model.status();
    auto engine = OpenEngine(*std::move(model), Options("").make_backend, kWindowTokens);
    EXPECT_TRUE(engine.ok()) << engine.status();
    std::vector<int32_t> tokens;
    for (const char letter : Words(8, 5)) tokens.push_back(letter);
    const auto sequence = (*engine)->AddSequence(std::ssize(tokens));
    EXPECT_TRUE(sequence.ok()) << sequence.status();
    StepPlan plan;
    plan.entries.push_back({.sequence = *sequence,
                            .tokens = tokens,
                            .level = 0,
                            .output = StepEntry::Output::kAllLogits});
    const auto result = (*engine)->Step(plan);
    EXPECT_TRUE(result.ok()) << result.status();
    const auto& values = result->entries[0].values;
    return {values.begin(), values.end()};
  }

  // The message with which a file, damaged in one way, is refused.
  std::string Refusal(const std::function<void(DeltaFile*)>& damage) const {
    DeltaFile file = ValidFile();
    damage(&file);
    EXPECT_TRUE(file.Write(Path("damaged.safetensors")).ok());
    const auto delta = ReadDelta(Path("damaged.safetensors"), sha256_, layers_, spec_);
    EXPECT_EQ(delta.status().code(), absl::StatusCode::kInvalidArgument) << delta.status();
    return std::string(delta.status().message());
  }

  // Puts one entry in place of another in a list of a level.
  static void SetInLevel(DeltaFile* file, size_t level, const char* key, size_t i, Json value) {
    Json levels = Json::parse(file->metadata["levels"].get<std::string>());
    levels[level][key][i] = std::move(value);
    file->metadata["levels"] = levels.dump();
  }

  TemporaryDirectory directory_;
  std::vector<LinearSpec> layers_;
  std::string sha256_;
  ModelSpec spec_;
};

// Whether the first stored rows are those of `factor`, bit for bit.
bool Hold(const int8_t* codes, const uint16_t* scales, const FactorCodes& factor) {
  return std::equal(factor.codes.begin(), factor.codes.end(), codes) &&
         std::equal(factor.scales.begin(), factor.scales.end(), scales);
}

TEST_F(DeltaTest, WhatItWasCalibratedOnTakesThePlaceOfTheText) {
  CompressOptions options = Options("trainable");
  options.refit_tokens = 0;
  const auto trainable = Compress(options);
  ASSERT_TRUE(trainable.ok()) << trainable.status();
  DeltaFile file = FileBeside("trainable");
  // Another text than that of the artifact that was trained.
  ASSERT_TRUE(WriteFileAtomically(Path("other.txt"), Words(800, 3)).ok());
  options.corpus.calibration_paths = {Path("other.txt")};
  options.delta = Path("terms.safetensors");
  options.self_sample_tokens = std::nullopt;
  const auto plain = NestedModel::Open(Path("trainable"));
  ASSERT_TRUE(plain.ok()) << plain.status();
  size_t layer = 1;
  while (layer < layers_.size() && (*plain)->StoredRank(layer, Form::kPrefix) < 4) ++layer;
  ASSERT_LT(layer, layers_.size());
  // Of that layer, as codes.
  const auto components_from = [&](int64_t first, const std::string& output) {
    const auto model = NestedModel::Open(Path(output));
    EXPECT_TRUE(model.ok()) << model.status();
    std::vector<float> scratch;
    const auto weights = (*model)->Weights(layer, &scratch);
    EXPECT_TRUE(weights.ok()) << weights.status();
    const int64_t padded = PaddedToGroup(layers_[layer].in);
    return std::vector<int8_t>(weights->prefix.a + first * padded,
                               weights->prefix.a + (first + 4) * padded);
  };
  const auto components = [&](const std::string& output) {
    options.output = Path(output);
    EXPECT_TRUE(file.Write(options.delta).ok());
    const auto report = Compress(options);
    EXPECT_TRUE(report.ok()) << report.status();
    if (!report.ok()) return std::vector<int8_t>();
    const std::string note = "calibrated on the 2560 tokens that the delta brings";
    EXPECT_EQ(std::count_if(report->notes.begin(), report->notes.end(),
                            [&](const std::string& each) { return each.find(note) == 0; }),
              file.replaced.empty() ? 0 : 1);
    return components_from(kRank, output);
  };
  const std::vector<int8_t> trained_beside = components_from(0, "trainable");
  // What a delta makes, or a refit, is not what a calibration gives.
  const auto states_calibration = [&](const std::string& output) {
    return std::filesystem::exists(Path(output) + "/calibration.safetensors");
  };
  CompressOptions refitted = Options("refitted");
  ASSERT_TRUE(Compress(refitted).ok());
  EXPECT_FALSE(states_calibration("refitted"));
  CompressOptions paired = Options("paired");
  paired.refit_tokens = 0;
  paired.gar_levels = std::nullopt;
  ASSERT_TRUE(Compress(paired).ok());
  EXPECT_FALSE(states_calibration("paired"));
  EXPECT_EQ(components("same"), trained_beside);
  EXPECT_FALSE(states_calibration("same"));
  options.self_sample_tokens = 64;
  options.output = Path("sampled");
  EXPECT_THAT(std::string(Compress(options).status().message()),
              HasSubstr("tokens to sample: 64, but the delta brings"));
  options.self_sample_tokens = std::nullopt;
  // So it takes no text but that to measure on.
  options.corpus.calibration_paths.clear();
  EXPECT_EQ(components("alone"), trained_beside);
  options.output = Path("unmeasured");
  options.corpus.evaluation_path.clear();
  EXPECT_THAT(std::string(Compress(options).status().message()),
              HasSubstr("evaluation: no text is given"));
  options.corpus.evaluation_path = Path("held_out.txt");
  file.replaced.clear();
  ASSERT_TRUE(file.Write(options.delta).ok());
  EXPECT_THAT(std::string(Compress(options).status().message()), HasSubstr("brings none"));
  options.corpus.calibration_paths = {Path("other.txt")};
  options.self_sample_tokens = 0;
  EXPECT_NE(components("unstated"), trained_beside);
}

TEST_F(DeltaTest, OneToTrainOnGivesItsLevelsAndCalibrationAlone) {
  CompressOptions options = Options("trainable");
  options.refit_tokens = 0;
  ASSERT_TRUE(Compress(options).ok());
  options.delta = Path("terms.safetensors");
  ASSERT_TRUE(FileBeside("trainable").Write(options.delta).ok());
  ASSERT_TRUE(WriteFileAtomically(Path("other.txt"), Words(800, 3)).ok());
  options.corpus.calibration_paths = {Path("other.txt")};
  options.self_sample_tokens = std::nullopt;
  options.output = Path("again");
  options.gar_levels = std::nullopt;
  options.makes_gar_pairs = false;
  const auto report = Compress(options);
  ASSERT_TRUE(report.ok()) << report.status();
  const auto calibration_of = [&](const std::string& artifact) {
    return ReadFile(Path(artifact) + "/calibration.safetensors").value_or("");
  };
  EXPECT_EQ(calibration_of("again"), calibration_of("trainable"));
  EXPECT_EQ(report->gar_pairs, 0);
  ASSERT_EQ(report->levels.size(), 3u);
  EXPECT_EQ(report->levels[0].profile, Profile(layers_.size(), {Form::kPrefix, 8}));
  EXPECT_EQ(report->levels[1].profile[0], FormAndRank());
  EXPECT_EQ(report->levels[1].profile[1], (FormAndRank{Form::kPrefix, 16}));
  // Of each layer what is stored in both: factors of that calibration, and no term before them.
  const auto first = NestedModel::Open(Path("trainable"));
  const auto again = NestedModel::Open(Path("again"));
  ASSERT_TRUE(first.ok() && again.ok()) << again.status();
  size_t compared = 0;
  for (size_t layer = 0; layer < layers_.size(); ++layer) {
    const int64_t rank = std::min((*first)->StoredRank(layer, Form::kPrefix),
                                  (*again)->StoredRank(layer, Form::kPrefix));
    std::vector<float> scratch[2];
    const auto a = (*first)->Weights(layer, &scratch[0]);
    const auto b = (*again)->Weights(layer, &scratch[1]);
    ASSERT_TRUE(a.ok() && b.ok());
    const int64_t codes = rank * PaddedToGroup(layers_[layer].in);
    EXPECT_TRUE(std::equal(a->prefix.a, a->prefix.a + codes, b->prefix.a)) << layer;
    compared += static_cast<size_t>(codes);
  }
  EXPECT_GT(compared, 0u);
}

TEST_F(DeltaTest, ACalibrationThatDoesNotFitIsRefused) {
  const auto refusal = [&](const std::vector<int32_t>& tokens,
                           const std::vector<int32_t>& lengths) {
    return Refusal([&](DeltaFile* file) {
      file->replaced["calibration.tokens"] = Stored(DType::kI32, {std::ssize(tokens)}, tokens);
      file->replaced["calibration.lengths"] = Stored(DType::kI32, {std::ssize(lengths)}, lengths);
    });
  };
  EXPECT_THAT(refusal({1, 2, -1}, {3}), HasSubstr("calibration.tokens[2]: -1, expected a token"));
  const auto vocabulary = static_cast<int32_t>(spec_.vocabulary);
  EXPECT_THAT(refusal({vocabulary}, {1}),
              HasSubstr(absl::StrCat("calibration.tokens[0]: ", vocabulary)));
  EXPECT_THAT(refusal({1, 2, 3}, {2, 2}), HasSubstr("calibration.lengths[1]: 2, expected 1 to"));
  const int64_t longest = std::min(kWindowTokens, spec_.context_length);
  EXPECT_THAT(refusal(std::vector<int32_t>(static_cast<size_t>(longest) + 1, 7),
                      {static_cast<int32_t>(longest) + 1}),
              HasSubstr(absl::StrCat("expected 1 to ", longest, " of the ", longest + 1)));
  EXPECT_THAT(refusal({1, 2, 3}, {0, 3}), HasSubstr("calibration.lengths[0]: 0"));
  EXPECT_THAT(refusal({1, 2, 3}, {2}),
              HasSubstr("calibration.tokens: 1 more than calibration.lengths add up to"));
  DeltaFile file = ValidFile();
  file.replaced["calibration.tokens"] = Stored(DType::kI32, {1}, std::vector<int32_t>{1});
  ASSERT_TRUE(file.Write(Path("half.safetensors")).ok());
  const auto half = ReadDelta(Path("half.safetensors"), sha256_, layers_, spec_);
  EXPECT_EQ(half.status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(half.status().message()), HasSubstr("calibration.lengths is missing"));
}

TEST_F(DeltaTest, TermsOf4BitsAreThoseCodes) {
  std::mt19937_64 random(11);
  DeltaFile file = ValidFile();
  const std::string name = layers_[1].name + ".bt";
  FactorCodes& factor = file.factors[name];
  std::vector<uint8_t> packed;
  for (size_t i = 0; i < factor.codes.size(); i += 2) {
    factor.codes[i] = static_cast<int8_t>(static_cast<int>(random() % 15) - 7);
    factor.codes[i + 1] = static_cast<int8_t>(static_cast<int>(random() % 15) - 7);
    packed.push_back(static_cast<uint8_t>((factor.codes[i] + 8) | (factor.codes[i + 1] + 8) << 4));
  }
  file.replaced[name] = Stored(DType::kU8, {kRank, PaddedToGroup(factor.size) / 2}, packed);
  ASSERT_TRUE(file.Write(Path("terms.safetensors")).ok());
  const auto delta = ReadDelta(Path("terms.safetensors"), sha256_, layers_, spec_);
  ASSERT_TRUE(delta.ok()) << delta.status();
  EXPECT_EQ(delta->terms[1].bt.codes, factor.codes);
  EXPECT_EQ(delta->terms[1].bt.scales, factor.scales);
}

TEST_F(DeltaTest, TermsComeFirstAtItsLevelsAndTheWeightsComponentsFollow) {
  const DeltaFile file = ValidFile();
  ASSERT_TRUE(file.Write(Path("terms.safetensors")).ok());
  // The same levels, so that factors are refitted alike, and terms that are zero.
  DeltaFile zeros = file;
  for (auto& [name, factor] : zeros.factors) {
    std::fill(factor.codes.begin(), factor.codes.end(), 0);
    std::fill(factor.scales.begin(), factor.scales.end(), 0);
  }
  ASSERT_TRUE(zeros.Write(Path("zeros.safetensors")).ok());
  std::unique_ptr<NestedModel> models[2];
  for (const auto& [i, name] : {std::pair(0, "terms"), std::pair(1, "zeros")}) {
    CompressOptions options = Options(name);
    options.delta = Path(std::string(name) + ".safetensors");
    const auto report = Compress(options);
    ASSERT_TRUE(report.ok()) << report.status();
    auto model = NestedModel::Open(options.output);
    ASSERT_TRUE(model.ok()) << model.status();
    models[i] = *std::move(model);
  }
  EXPECT_EQ(models[0]->levels()[0].profile[0], (FormAndRank{Form::kPrefix, 8}));
  for (size_t i = 0; i < layers_.size(); ++i) {
    const LinearSpec& layer = layers_[i];
    std::vector<float> scratch[2];
    auto with = models[0]->Weights(i, &scratch[0]);
    auto without = models[1]->Weights(i, &scratch[1]);
    ASSERT_TRUE(with.ok() && without.ok());
    const FactorView& factors = with->prefix;
    // With random terms the other level may measure worse and be left out, with its ranks.
    ASSERT_GE(factors.max_rank, 8);
    EXPECT_TRUE(Hold(factors.a, factors.a_scales, file.factors.at(layer.name + ".a")))
        << layer.name;
    EXPECT_TRUE(Hold(factors.bt, factors.bt_scales, file.factors.at(layer.name + ".bt")))
        << layer.name;
    const int64_t rest = std::min(factors.max_rank, without->prefix.max_rank) - kRank;
    EXPECT_EQ(std::memcmp(factors.a + kRank * PaddedToGroup(layer.in),
                          without->prefix.a + kRank * PaddedToGroup(layer.in),
                          static_cast<size_t>(rest * PaddedToGroup(layer.in))),
              0)
        << layer.name;
    EXPECT_EQ(std::memcmp(factors.bt_scales + kRank * NumGroups(layer.out),
                          without->prefix.bt_scales + kRank * NumGroups(layer.out),
                          static_cast<size_t>(rest * NumGroups(layer.out)) * sizeof(uint16_t)),
              0)
        << layer.name;
  }
}

TEST_F(DeltaTest, ALevelMayRunAPartOfItsTerm) {
  DeltaFile file = FileAtRanks({4, 9}, 0.1f);
  std::mt19937_64 random(3);
  for (const LinearSpec& layer : layers_) {
    for (const auto& [part, size] : {std::pair(".a", layer.in), std::pair(".bt", layer.out)})
      file.factors[layer.name + part] = RandomFactor(9, size, &random);
  }
  CompressOptions options = Options("nested");
  options.delta = Path("terms.safetensors");
  const Level level = CompressedLevel(file, options, 0);
  auto model = NestedModel::Open(options.output);
  ASSERT_TRUE(model.ok()) << model.status();
  for (size_t i = 0; i < layers_.size(); ++i) {
    const LinearSpec& layer = layers_[i];
    EXPECT_EQ(level.profile[i], (FormAndRank{Form::kPrefix, layer.out == 24 ? 1 : 4}));
    std::vector<float> scratch;
    const auto weights = (*model)->Weights(i, &scratch);
    ASSERT_TRUE(weights.ok()) << weights.status();
    // The cheapest level has nothing of the layer's own.
    EXPECT_EQ(std::memcmp(weights->prefix.a, file.factors.at(layer.name + ".a").codes.data(),
                          static_cast<size_t>(level.profile[i].rank * PaddedToGroup(layer.in))),
              0)
        << layer.name;
  }
}

TEST_F(DeltaTest, ItsLevelsAreRead) {
  ASSERT_TRUE(ValidFile().Write(Path("terms.safetensors")).ok());
  const auto delta = ReadDelta(Path("terms.safetensors"), sha256_, layers_, spec_);
  ASSERT_TRUE(delta.ok()) << delta.status();
  ASSERT_EQ(delta->profiles.size(), 2u);
  EXPECT_EQ(delta->profiles[0], Profile(layers_.size(), {Form::kPrefix, 8}));
  EXPECT_EQ(delta->profiles[1][0], (FormAndRank{Form::kDense, 0}));
  EXPECT_EQ(delta->profiles[1][1], (FormAndRank{Form::kPrefix, 16}));
  ASSERT_EQ(delta->terms.size(), layers_.size());
  EXPECT_EQ(delta->terms[0].a.rank, kRank);
  EXPECT_EQ(delta->terms[0].bt.size, layers_[0].out);
}

TEST_F(DeltaTest, ComponentsAfterTheTermsAreThoseOfAPlainLadder) {
  CompressOptions plain_options = Options("plain");
  plain_options.refit_tokens = 0;  // as with a delta
  const auto plain = Compress(plain_options);
  ASSERT_TRUE(plain.ok()) << plain.status();
  // The plain ladder's own levels, with terms where a layer runs enough components.
  DeltaFile file = ValidFile();
  Json levels = Json::array();
  for (const Level& level : plain->levels) {
    if (level.ladder != "prefix") continue;
    Json forms = Json::array(), ranks = Json::array();
    for (const FormAndRank& choice : level.profile) {
      forms.push_back(NameOf(choice.form));
      ranks.push_back(choice.rank);
    }
    levels.push_back({{"forms", forms}, {"ranks", ranks}});
  }
  ASSERT_FALSE(levels.empty());
  file.metadata["levels"] = levels.dump();
  ASSERT_TRUE(file.Write(Path("terms.safetensors")).ok());
  CompressOptions options = Options("with");
  options.delta = Path("terms.safetensors");
  const auto report = Compress(options);
  ASSERT_TRUE(report.ok()) << report.status();
  auto without = NestedModel::Open(Path("plain"));
  auto with = NestedModel::Open(Path("with"));
  ASSERT_TRUE(without.ok() && with.ok()) << without.status() << with.status();
  int compared = 0;
  for (size_t i = 0; i < layers_.size(); ++i) {
    std::vector<float> scratch[2];
    auto a = (*without)->Weights(i, &scratch[0]);
    auto b = (*with)->Weights(i, &scratch[1]);
    ASSERT_TRUE(a.ok() && b.ok());
    const int64_t rest = std::min(a->prefix.max_rank, b->prefix.max_rank) - kRank;
    if (rest <= 0) continue;
    const size_t size = static_cast<size_t>(rest * PaddedToGroup(layers_[i].in));
    EXPECT_EQ(std::memcmp(b->prefix.a + kRank * PaddedToGroup(layers_[i].in), a->prefix.a, size), 0)
        << layers_[i].name;
    ++compared;
  }
  EXPECT_GT(compared, 5);
}

// ||a - b|| / ||b||.
double Apart(const std::vector<float>& a, const std::vector<float>& b) {
  double difference = 0, energy = 0;
  EXPECT_EQ(a.size(), b.size());
  for (size_t i = 0; i < std::min(a.size(), b.size()); ++i) {
    difference += std::pow(static_cast<double>(a[i]) - b[i], 2);
    energy += std::pow(static_cast<double>(b[i]), 2);
  }
  return std::sqrt(difference / energy);
}

TEST_F(DeltaTest, AGarLevelComputesWhatPlainFactorsDoAndCostsLess) {
  // A third of the rank and less than break-even, so that both forms pay.
  const DeltaFile file = FileAtRanks({24, 32}, 0.3f);
  DeltaFile zeros = file;
  for (auto& [name, factor] : zeros.factors) {
    std::fill(factor.scales.begin(), factor.scales.end(), 0);
  }
  Level gar, plain;
  for (const auto& [name, level] : {std::pair("gar", &gar), std::pair("plain", &plain)}) {
    CompressOptions options = Options(name);
    options.activations = Activations::kFloat;
    options.delta = Path(std::string(name) + ".safetensors");
    if (level == &gar) options.gar_levels = std::nullopt;
    *level = CompressedLevel(file, options, 0);
  }
  CompressOptions options = Options("zeros");
  options.activations = Activations::kFloat;
  options.delta = Path("zeros.safetensors");
  CompressedLevel(zeros, options, 0);
  const std::vector<float> expected = CheapestLogits(Path("plain"));
  EXPECT_LT(Apart(CheapestLogits(Path("gar")), expected), 0.05);
  EXPECT_GT(Apart(CheapestLogits(Path("zeros")), expected), 0.5);

  ASSERT_EQ(gar.profile.size(), layers_.size());
  int64_t saved = 0;
  const auto model = NestedModel::Open(Path("gar"));
  ASSERT_TRUE(model.ok()) << model.status();
  for (size_t i = 0; i < layers_.size(); ++i) {
    const int64_t rank = layers_[i].out == 24 ? 8 : 24;
    EXPECT_EQ(gar.profile[i], (FormAndRank{Form::kGar, rank})) << layers_[i].name;
    EXPECT_EQ(plain.profile[i], (FormAndRank{Form::kPrefix, rank})) << layers_[i].name;
    saved += 2 * rank * rank;  // r (m + n - r) instead of r (m + n), in FLOPs
    EXPECT_EQ((*model)->StoredRank(i, Form::kPrefix), 0) << layers_[i].name;
  }
  EXPECT_EQ(gar.cost.flops, plain.cost.flops - saved);
  EXPECT_LT(gar.relative_flops, plain.relative_flops);
}

TEST_F(DeltaTest, RanksAboveBreakEvenRunAsGarPairsOrDense) {
  // An encoder of random weights measures better the more it runs, so that no level is left out.
  ASSERT_TRUE(WriteTinyBert(Path("source")).ok());
  ReadSource();
  // Plain factors of the square layers pay up to 32, those of the others up to 40.
  const DeltaFile file = FileAtRanks({36, 48}, 0.03f);
  CompressOptions options = Options("gar");
  options.evaluation_tokens = 1024;
  options.delta = Path("terms.safetensors");
  options.gar_levels = std::nullopt;
  const Level gar = CompressedLevel(file, options, 1);
  options.output = Path("plain");
  options.gar_levels = std::vector<int>();
  const Level plain = CompressedLevel(file, options, 0);
  // What is dense at the lower level is so at the upper, which may have pairs.
  options.output = Path("upper");
  options.gar_levels = {{1}};
  const Level upper = CompressedLevel(file, options, 1);
  ASSERT_EQ(gar.profile.size(), layers_.size());
  ASSERT_EQ(plain.profile.size(), layers_.size());
  ASSERT_EQ(upper.profile.size(), layers_.size());
  int num_dense = 0;
  for (size_t i = 0; i < layers_.size(); ++i) {
    const bool is_square = layers_[i].out == layers_[i].in;
    EXPECT_EQ(gar.profile[i], (FormAndRank{Form::kGar, 48}));
    EXPECT_EQ(plain.profile[i], is_square ? FormAndRank{} : (FormAndRank{Form::kPrefix, 36}));
    EXPECT_EQ(upper.profile[i], is_square ? FormAndRank{} : gar.profile[i]);
    num_dense += is_square ? 1 : 0;
  }
  EXPECT_EQ(num_dense, 8);
  EXPECT_LT(gar.relative_flops, upper.relative_flops);
  EXPECT_LT(plain.relative_flops, 1);
}

TEST_F(DeltaTest, ATermOfMoreComponentsThanPlainFactorsHaveIsLeftOut) {
  DeltaFile file = FileAtRanks({16, 24}, 0.1f);
  std::mt19937_64 random(4);
  for (const auto& [part, size] :
       {std::pair(".a", layers_[0].in), std::pair(".bt", layers_[0].out)}) {
    file.factors[layers_[0].name + part] = RandomFactor(40, size, &random);
  }
  SetInLevel(&file, 0, "ranks", 0, 40);
  SetInLevel(&file, 1, "ranks", 0, 40);
  CompressOptions options = Options("out");
  options.delta = Path("terms.safetensors");
  EXPECT_EQ(CompressedLevel(file, options, 0).profile.at(0), FormAndRank{});
}

TEST_F(DeltaTest, AnotherCheckpointIsRefused) {
  const auto refusal = Refusal([](DeltaFile* file) { file->metadata["source_sha256"] = "abc"; });
  EXPECT_THAT(refusal, AllOf(HasSubstr("damaged.safetensors"), HasSubstr("source_sha256: abc"),
                             HasSubstr(sha256_)));
}

TEST_F(DeltaTest, WhatIsNoDeltaIsRefused) {
  EXPECT_THAT(Refusal([](DeltaFile* file) { file->metadata = Json::object(); }),
              HasSubstr("metadata format: absent, expected nestor-delta"));
  EXPECT_THAT(Refusal([](DeltaFile* file) { file->metadata["version"] = "1"; }),
              HasSubstr("metadata version: 1, expected 3"));
  EXPECT_THAT(Refusal([](DeltaFile* file) { file->metadata["levels"] = "[[["; }),
              HasSubstr("metadata levels: expected a list"));
}

TEST_F(DeltaTest, TensorsThatDoNotFitAreRefused) {
  const std::string name = layers_[1].name;
  const int64_t in = layers_[1].in;
  std::mt19937_64 random(3);
  // A factor for inputs that are a group too few.
  EXPECT_THAT(Refusal([&](DeltaFile* file) {
                file->factors[name + ".a"] = RandomFactor(kRank, in - kGroupSize, &random);
              }),
              HasSubstr(name + ".a: shape"));
  EXPECT_THAT(Refusal([&](DeltaFile* file) {
                file->factors[name + ".bt"] = RandomFactor(kRank + 1, layers_[1].out, &random);
              }),
              HasSubstr(name + ".bt: shape"));
  EXPECT_THAT(Refusal([&](DeltaFile* file) {
                file->replaced[name + ".a"] =
                    Stored(DType::kBool, {kRank, PaddedToGroup(in)},
                           std::vector<uint8_t>(static_cast<size_t>(kRank * PaddedToGroup(in))));
              }),
              HasSubstr(name + ".a: type BOOL, expected I8"));
  EXPECT_THAT(Refusal([&](DeltaFile* file) {
                file->replaced[name + ".a"] =
                    Stored(DType::kU8, {kRank, PaddedToGroup(in)},
                           std::vector<uint8_t>(static_cast<size_t>(kRank * PaddedToGroup(in))));
              }),
              HasSubstr(name + ".a: shape"));
  EXPECT_THAT(Refusal([&](DeltaFile* file) {
                file->replaced[name + ".a_scales"] =
                    Stored(DType::kI8, {kRank, NumGroups(in)},
                           std::vector<int8_t>(static_cast<size_t>(kRank * NumGroups(in))));
              }),
              HasSubstr(name + ".a_scales: type I8, expected BF16"));
  EXPECT_THAT(Refusal([&](DeltaFile* file) {
                file->factors[name + ".bt"].scales.back() =
                    Bfloat16FromFloat(std::numeric_limits<float>::quiet_NaN());
              }),
              AllOf(HasSubstr(name + ".bt_scales"), HasSubstr("not finite")));
  EXPECT_THAT(
      Refusal([&](DeltaFile* file) { file->factors[name + ".a"] = RandomFactor(60, in, &random); }),
      HasSubstr(name + ".a: 60 components, expected 1 to"));
  EXPECT_THAT(Refusal([&](DeltaFile* file) {
                file->replaced["other.a"] = Stored(DType::kI8, {1}, std::vector<int8_t>(1));
              }),
              HasSubstr("other.a: belongs to no layer"));
}

TEST_F(DeltaTest, LayersOfAnotherModelAreRefused) {
  EXPECT_THAT(Refusal([](DeltaFile* file) { file->metadata["layers"] = "[\"x\"]"; }),
              HasSubstr("layers: 1 of them, the model has"));
}

TEST_F(DeltaTest, LevelsThatDoNotFitAreRefused) {
  EXPECT_THAT(Refusal([](DeltaFile* file) { SetInLevel(file, 0, "ranks", 2, 0); }),
              AllOf(HasSubstr("levels[0].ranks[2]: 0"), HasSubstr("a count from 1")));
  EXPECT_THAT(Refusal([](DeltaFile* file) { SetInLevel(file, 1, "ranks", 2, 4000); }),
              HasSubstr("levels[1].ranks[2]: 4000"));
  // Of 24 outputs nine tenths in steps of 4.
  EXPECT_THAT(Refusal([](DeltaFile* file) { SetInLevel(file, 1, "ranks", 2, 21); }),
              AllOf(HasSubstr("levels[1].ranks[2]: 21"), HasSubstr("a count from 1 to 20")));
  EXPECT_THAT(Refusal([](DeltaFile* file) { SetInLevel(file, 1, "forms", 2, "residual"); }),
              HasSubstr("levels[1].forms[2]: \"residual\", expected dense or prefix"));
  EXPECT_THAT(Refusal([](DeltaFile* file) { SetInLevel(file, 1, "ranks", 2, 4); }),
              AllOf(HasSubstr("levels[1]"), HasSubstr("less than one level below")));
}

TEST_F(DeltaTest, AResidualLadderBesideItMayBeSearchedFor) {
  CompressOptions options = Options("both");
  options.ladder = LadderChoice::kBoth;
  options.refit_tokens = 0;
  options.delta = Path("terms.safetensors");
  ASSERT_TRUE(ValidFile().Write(options.delta).ok());
  options.search.method = RankSearch::kMeasured;
  options.search.probes = 1;
  options.search.probe_tokens = 64;
  options.search.costs = {0.75};
  const auto report = Compress(options);
  ASSERT_TRUE(report.ok()) << report.status();
  // Of the delta's two levels one may have been left out: its terms are random.
  ASSERT_GE(report->levels.size(), 3u);
  ASSERT_EQ(report->search.size(), report->levels.size());
  EXPECT_EQ(report->levels[0].ladder, "residual");
  EXPECT_NEAR(report->levels[0].relative_cost, 0.75, 0.03);
  EXPECT_GT(report->search[0].predicted_loss.value_or(0), 0);
  EXPECT_GT(report->search[0].measured_loss.value_or(0), 0);
  EXPECT_EQ(report->levels[1].ladder, "prefix");
  EXPECT_FALSE(report->search[1].predicted_loss.has_value());
  EXPECT_FALSE(report->search[1].measured_loss.has_value());
  EXPECT_GT(report->search[1].seconds, 0);
  EXPECT_TRUE(SearchReport(*report)[1]["measured_loss"].is_null());
}

TEST_F(DeltaTest, OptionsThatContradictItAreRefused) {
  CompressOptions options = Options("out");
  options.delta = Path("any.safetensors");
  options.ladder = LadderChoice::kResidual;
  EXPECT_THAT(std::string(Compress(options).status().message()), HasSubstr("a prefix ladder"));
  options.ladder = LadderChoice::kPrefix;
  ASSERT_TRUE(ValidFile().Write(options.delta).ok());
  options.gar_levels = {{1, 2}};
  EXPECT_THAT(std::string(Compress(options).status().message()),
              HasSubstr("gar levels: expected 0 to 1, from the ladder's cheapest; was 2"));
  options.search.costs = {0.8};
  EXPECT_THAT(std::string(Compress(options).status().message()),
              HasSubstr("names the levels of a prefix ladder itself"));
  options.search.costs.clear();
  options.refit_tokens = 512;
  EXPECT_THAT(std::string(Compress(options).status().message()),
              HasSubstr("refit tokens: 512, but"));
}

}  // namespace
}  // namespace nestor
