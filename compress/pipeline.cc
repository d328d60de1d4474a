#include "compress/pipeline.h"

#include <cblas.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/checksum.h"
#include "base/file.h"
#include "base/mutex.h"
#include "base/progress.h"
#include "base/status_macros.h"
#include "compress/calibrate.h"
#include "compress/evaluate.h"
#include "compress/export.h"
#include "compress/layer.h"
#include "compress/refit.h"
#include "compress/self_sample.h"
#include "compress/sensitivity.h"

namespace nestor {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

// Where errors are weighed: near the ranks that a residual ladder spends most on.
constexpr int64_t kResidualProbeRank = 16;
constexpr int64_t kProbeTokens = 1024;
// Each group costs a pass over the probe's tokens, which is a small one in an encoder.
constexpr int64_t kLanguageModelDepths = 6;
constexpr int64_t kEncoderDepths = 12;
// A language model's tokens give a value each, an encoder's a value for each pair of sentences.
constexpr int64_t kLanguageModelEvaluationTokens = 4096;
constexpr int64_t kEncoderEvaluationTokens = 32768;

// What every layer may be at, by ladder.
struct LadderOptions {
  LayerOptions residual;  // empty without that ladder
  LayerOptions prefix;
};

// OpenBLAS's own threads off while layers run side by side; a decomposition of a few hundred rows
// scales better over layers than inside.
class SingleThreadedBlas {
 public:
  SingleThreadedBlas() : threads_(openblas_get_num_threads()) { openblas_set_num_threads(1); }
  ~SingleThreadedBlas() { openblas_set_num_threads(threads_); }
  SingleThreadedBlas(const SingleThreadedBlas&) = delete;
  SingleThreadedBlas& operator=(const SingleThreadedBlas&) = delete;

 private:
  const int threads_;
};

int64_t LeastCost(const LayerOptions& options) {
  int64_t cost = 0;
  for (const std::vector<LayerOption>& layer : options) {
    cost += std::min_element(layer.begin(), layer.end(), [](const auto& a, const auto& b) {
              return a.cost < b.cost;
            })->cost;
  }
  return cost;
}

// One run; methods in the order in which they are called.
class Compression {
 public:
  explicit Compression(const CompressOptions& options)
      : options_(options),
        output_((fs::path(options.output) / "").parent_path().string()),
        partial_(output_ + ".partial"),
        calibration_directory_(output_ + ".calibration") {}

  absl::StatusOr<CompressReport> Run();

 private:
  absl::Status CheckOptions() const;
  absl::Status OpenSource();
  absl::Status Calibrate();
  absl::Status CompressLayers();
  absl::Status CompressOneLayer(size_t layer);
  absl::Status WeightBySensitivity();
  absl::Status WeightLadder(const std::string& ladder, int64_t probe_rank, LayerOptions* options);
  std::vector<Level> ChooseLevels() const;
  absl::Status RefitPrefix(const std::vector<Level>& levels);
  absl::Status WriteParts(const std::vector<Level>& levels);
  absl::StatusOr<std::unique_ptr<Engine>> OpenParts(std::vector<Level> levels) const;
  absl::StatusOr<std::vector<Level>> MeasureLevels(std::vector<Level> levels);
  absl::Status WriteDescription(const std::vector<Level>* levels) const;

  bool has_residual() const { return options_.ladder != LadderChoice::kPrefix; }
  bool has_prefix() const { return options_.ladder != LadderChoice::kResidual; }
  bool allocates_prefix_evenly() const {
    return options_.allocate == nullptr && source_->spec().is_encoder();
  }

  const CompressOptions& options_;
  const std::string output_;  // without a slash at its end
  const std::string partial_;
  const std::string calibration_directory_;

  std::unique_ptr<NestedModel> source_;
  std::string source_sha256_;
  int64_t self_sample_tokens_ = 0;
  std::unique_ptr<Engine> source_engine_;
  Corpus corpus_;
  EvaluationSet evaluation_;
  LayerInputs inputs_;
  std::optional<Calibration> calibration_;
  Measurement source_measurement_;
  std::unique_ptr<TensorSpill> spill_;
  LadderOptions ladder_options_;
  StoredRanks stored_ranks_;
  std::map<std::string, std::string> checksums_;
  CompressReport report_;
};

absl::Status Compression::CheckOptions() const {
  if (options_.levels < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("levels: must be positive; was ", options_.levels));
  }
  if (options_.corpus.calibration_paths.empty()) {
    return absl::InvalidArgumentError("calibration: no text is given");
  }
  for (const auto& [name, value] :
       {std::pair("calibration tokens", options_.corpus.calibration_tokens),
        std::pair("evaluation tokens", options_.evaluation_tokens.value_or(1)),
        std::pair("maximum residual rank", options_.max_residual_rank),
        std::pair("maximum residual rank of the head", options_.max_head_residual_rank)}) {
    if (value < 1) {
      return absl::InvalidArgumentError(absl::StrCat(name, ": must be positive; was ", value));
    }
  }
  if (options_.self_sample_tokens.value_or(0) < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("tokens to sample: must not be negative; was ", *options_.self_sample_tokens));
  }
  std::error_code error;
  if (fs::exists(output_, error) && !options_.overwrites) {
    return absl::AlreadyExistsError(absl::StrCat(output_, ": exists already"));
  }
  return absl::OkStatus();
}

absl::Status Compression::OpenSource() {
  NESTOR_ASSIGN_OR_RETURN(source_, NestedModel::Open(options_.source));
  if (source_->is_artifact()) {
    return absl::InvalidArgumentError(
        absl::StrCat(options_.source, ": is a nested artifact already, expected a checkpoint"));
  }
  const bool is_encoder = source_->spec().is_encoder();
  if (is_encoder && options_.self_sample_tokens.value_or(0) > 0) {
    return absl::InvalidArgumentError(
        absl::StrCat(options_.source, ": is an encoder, which cannot sample text"));
  }
  self_sample_tokens_ =
      options_.self_sample_tokens.value_or(is_encoder ? 0 : options_.corpus.calibration_tokens);
  NESTOR_RETURN_IF_ERROR(CheckFinite(*source_));
  NESTOR_ASSIGN_OR_RETURN(source_sha256_, Sha256OfFiles(source_->tensors().paths()));
  inputs_ = LayerInputsOf(source_->layers());
  NESTOR_ASSIGN_OR_RETURN(std::unique_ptr<NestedModel> model, NestedModel::Open(options_.source));
  const int64_t sequences = self_sample_tokens_ > 0 ? kSelfSampleBatch : 1;
  NESTOR_ASSIGN_OR_RETURN(source_engine_, OpenEngine(std::move(model), options_.make_backend,
                                                     sequences * kWindowTokens));
  CorpusOptions corpus = options_.corpus;
  corpus.evaluation_tokens = options_.evaluation_tokens.value_or(
      is_encoder ? kEncoderEvaluationTokens : kLanguageModelEvaluationTokens);
  NESTOR_ASSIGN_OR_RETURN(corpus_,
                          ReadCorpus(corpus, source_engine_->tokenizer(), source_->spec()));
  if (is_encoder) {
    evaluation_ = SplicedPairs(corpus_.evaluation);
  } else {
    evaluation_.sequences = corpus_.evaluation;
  }
  return absl::OkStatus();
}

absl::Status Compression::Calibrate() {
  const std::string key =
      absl::StrCat("source ", source_sha256_, ", text ", corpus_.calibration_sha256, ", tokens ",
                   options_.corpus.calibration_tokens, ", sampled ", self_sample_tokens_);
  const SelfSampleOptions sample{.tokens = self_sample_tokens_};
  const int64_t sequences =
      static_cast<int64_t>(corpus_.calibration.size()) + SampledSequences(*source_engine_, sample);
  report_.calibration_tokens =
      CountTokens(corpus_.calibration) + SampledTokens(*source_engine_, sample);
  absl::StatusOr<Calibration> calibration =
      OpenCalibration(calibration_directory_, key, sequences, inputs_);
  if (calibration.ok()) {
    report_.resumed_sequences = sequences;
  } else {
    if (sample.tokens > 0) {
      NESTOR_ASSIGN_OR_RETURN(const TokenSequences sampled,
                              SampleFromModel(source_engine_.get(), corpus_.calibration, sample));
      corpus_.calibration.insert(corpus_.calibration.end(), sampled.begin(), sampled.end());
    }
    calibration = nestor::Calibrate(source_engine_.get(), corpus_.calibration, key,
                                    calibration_directory_, &report_.resumed_sequences);
  }
  NESTOR_ASSIGN_OR_RETURN(calibration_, std::move(calibration));

  report_.evaluation_tokens = MeasuredTokens(evaluation_);
  Progress progress("Evaluating the source", MeasuredTokens(evaluation_));
  NESTOR_ASSIGN_OR_RETURN(source_measurement_,
                          Measure(source_engine_.get(), 0, evaluation_, &progress));
  source_engine_.reset();
  return absl::OkStatus();
}

absl::Status Compression::CompressOneLayer(size_t layer) {
  const LinearSpec& spec = source_->layers()[layer];
  NESTOR_ASSIGN_OR_RETURN(const std::vector<double> moment,
                          calibration_->Moment(inputs_.input_of_layer[layer]));
  NESTOR_ASSIGN_OR_RETURN(const std::vector<float> weights, source_->SourceWeight(layer));
  const LayerSettings settings{.dense = options_.dense,
                               .has_residual_ladder = has_residual(),
                               .has_prefix_ladder = has_prefix(),
                               .max_residual_rank = spec.role == LinearRole::kHead
                                                        ? options_.max_head_residual_rank
                                                        : options_.max_residual_rank};
  NESTOR_ASSIGN_OR_RETURN(LayerParts parts, CompressLayer(spec, weights, moment, settings));
  NESTOR_RETURN_IF_ERROR(AddLayer(spec, parts, spill_.get()));
  if (has_residual()) ladder_options_.residual[layer] = std::move(parts.residual_options);
  if (has_prefix()) ladder_options_.prefix[layer] = std::move(parts.prefix_options);
  return absl::OkStatus();
}

absl::Status Compression::CompressLayers() {
  std::error_code error;
  fs::remove_all(partial_, error);
  fs::create_directories(partial_, error);
  if (error) return FileError(partial_, error.value());
  NESTOR_ASSIGN_OR_RETURN(spill_, TensorSpill::Create(partial_ + "/parts.spill"));
  const std::vector<LinearSpec>& layers = source_->layers();
  if (has_residual()) ladder_options_.residual.resize(layers.size());
  if (has_prefix()) ladder_options_.prefix.resize(layers.size());
  // The largest first, so that no thread is left alone with the head at the end.
  std::vector<size_t> order(layers.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    return layers[a].out * layers[a].in > layers[b].out * layers[b].in;
  });

  const SingleThreadedBlas blas;
  Mutex mutex;  // guards `status` and `progress`
  absl::Status status;
  int64_t weights = 0;
  for (const LinearSpec& layer : layers) weights += layer.out * layer.in;
  Progress progress("Decomposing", weights);
  std::atomic<size_t> next{0};
  const auto work = [&] {
    for (size_t i = next++; i < order.size(); i = next++) {
      const absl::Status done = CompressOneLayer(order[i]);
      const MutexLock lock(&mutex);
      status.Update(done);
      if (!status.ok()) next = order.size();
      progress.Advance(layers[order[i]].out * layers[order[i]].in);
    }
  };
  {
    std::vector<std::jthread> threads;
    for (int i = 1; i < options_.threads; ++i) threads.emplace_back(work);
    work();
  }
  NESTOR_RETURN_IF_ERROR(status);
  return AddOtherTensors(*source_, spill_.get());
}

absl::Status Compression::WeightBySensitivity() {
  if (has_residual()) {
    NESTOR_RETURN_IF_ERROR(WeightLadder("residual", kResidualProbeRank, &ladder_options_.residual));
  }
  if (has_prefix() && !allocates_prefix_evenly())
    return WeightLadder("prefix", 0, &ladder_options_.prefix);
  return absl::OkStatus();
}

absl::Status Compression::WeightLadder(const std::string& ladder, int64_t probe_rank,
                                       LayerOptions* options) {
  const std::vector<size_t> groups = SensitivityGroups(
      source_->layers(), source_->spec().is_encoder() ? kEncoderDepths : kLanguageModelDepths);
  const std::vector<LayerOption> probes = ProbeOptions(*options, probe_rank);
  const std::vector<Level> chain = ProbeChain(probes, groups, ladder);
  NESTOR_RETURN_IF_ERROR(WriteParts(chain));
  NESTOR_ASSIGN_OR_RETURN(const std::unique_ptr<Engine> engine, OpenParts(chain));
  TokenSequences sequences;
  for (const std::vector<int32_t>& sequence : corpus_.calibration) {
    if (CountTokens(sequences) >= kProbeTokens) break;
    sequences.push_back(sequence);
  }
  NESTOR_ASSIGN_OR_RETURN(const std::vector<double> measured,
                          MeasureGroups(engine.get(), sequences));
  WeightErrors(measured, groups, probes, options);
  return absl::OkStatus();
}

std::vector<Level> Compression::ChooseLevels() const {
  const std::vector<LinearSpec>& layers = source_->layers();
  const Profile full(layers.size());
  const LinearCost full_cost = CostOfProfile(source_->spec(), layers, full, options_.dense);
  std::vector<Level> levels;
  const auto add = [&](const std::string& ladder, const LayerOptions& options,
                       const AllocateFunction& allocate, const std::vector<int64_t>& targets) {
    const Profile* last = nullptr;
    for (const Profile& profile : allocate(options, targets)) {
      // A small model may have nothing between two targets.
      if ((last != nullptr && *last == profile) || profile == full) continue;
      Level level;
      level.ladder = ladder;
      level.profile = profile;
      levels.push_back(std::move(level));
      last = &levels.back().profile;
    }
  };
  const AllocateFunction along_hulls =
      options_.allocate == nullptr ? AllocateAlongHulls : options_.allocate;
  levels.reserve(2 * static_cast<size_t>(options_.levels) + 1);
  if (has_residual()) {
    const double bytes = static_cast<double>(full_cost.weight_bytes);
    const double cheapest = static_cast<double>(LeastCost(ladder_options_.residual)) / bytes;
    std::vector<int64_t> targets;
    for (const double share : ResidualTargets(options_.levels, cheapest)) {
      targets.push_back(static_cast<int64_t>(share * bytes));
    }
    add("residual", ladder_options_.residual, along_hulls, targets);
  }
  if (has_prefix()) {
    int64_t dense_flops = 0;
    for (const LinearSpec& layer : layers) dense_flops += 2 * layer.out * layer.in;
    const int64_t attention = full_cost.flops - dense_flops;  // no level changes it
    std::vector<int64_t> targets;
    for (const double share : PrefixTargets(options_.levels, source_->spec().is_encoder())) {
      targets.push_back(static_cast<int64_t>(share * static_cast<double>(full_cost.flops)) -
                        attention);
    }
    add("prefix", ladder_options_.prefix,
        allocates_prefix_evenly() ? AllocateFunction(AllocateEvenly) : along_hulls, targets);
  }
  Level top;
  top.ladder = "full";
  top.profile = full;
  levels.push_back(std::move(top));
  return levels;
}

absl::Status Compression::WriteParts(const std::vector<Level>& levels) {
  stored_ranks_ = StoredRanksOf(levels, source_->layers().size());
  NESTOR_ASSIGN_OR_RETURN(checksums_,
                          spill_->WriteTensors(partial_ + "/nested.safetensors",
                                               KeptRows(source_->layers(), stored_ranks_)));
  NESTOR_RETURN_IF_ERROR(CopyModelFiles(options_.source, partial_));
  return WriteDescription(nullptr);
}

absl::Status Compression::WriteDescription(const std::vector<Level>* levels) const {
  const bool is_int8 = options_.dense == DenseStorage::kPlanes;
  Json layers = Json::array();
  for (size_t i = 0; i < source_->layers().size(); ++i) {
    const LinearSpec& layer = source_->layers()[i];
    layers.push_back({{"name", layer.name},
                      {"out", layer.out},
                      {"in", layer.in},
                      {"residual_rank", stored_ranks_.residual[i]},
                      {"prefix_rank", stored_ranks_.prefix[i]}});
  }
  Json description = {
      {"format", "nestor-nested"},
      {"version", 1},
      {"source",
       {{"name", fs::path(options_.source).lexically_normal().filename().string()},
        {"sha256", source_sha256_}}},
      {"dtype", is_int8 ? "int8" : "bf16"},
      {"group_size", kGroupSize},
      {"planes", is_int8          ? Json({4, 4})
                 : has_residual() ? Json::array({4})
                                  : Json::array()},
      {"layers", layers},
      {"calibration",
       {{"text_sha256", corpus_.calibration_sha256},
        {"tokens", report_.calibration_tokens},
        {"self_sampled_tokens", self_sample_tokens_}}},
      {"evaluation",
       {{"text_sha256", corpus_.evaluation_sha256},
        {"tokens", report_.evaluation_tokens},
        {"standard", source_->spec().is_encoder() ? "lines and splices with the next"
                                                  : "windows of 512 tokens"}}},
      {"checksums", checksums_}};
  if (levels != nullptr) description["levels"] = LevelsToJson(*levels);
  return WriteFileAtomically(partial_ + "/nested.json", description.dump(1));
}

absl::StatusOr<std::unique_ptr<Engine>> Compression::OpenParts(std::vector<Level> levels) const {
  NESTOR_ASSIGN_OR_RETURN(std::unique_ptr<NestedModel> model, NestedModel::Open(partial_));
  NESTOR_RETURN_IF_ERROR(model->SetLevels(std::move(levels)));
  return OpenEngine(std::move(model), options_.make_backend, kWindowTokens);
}

absl::Status Compression::RefitPrefix(const std::vector<Level>& levels) {
  RefitOptions options;
  std::vector<int> prefix_levels;
  for (size_t i = 0; i < levels.size(); ++i) {
    if (levels[i].ladder == "prefix") prefix_levels.push_back(static_cast<int>(i));
  }
  if (prefix_levels.empty()) return absl::OkStatus();
  // Every other level: what suits two neighbours suits the one between them.
  for (size_t i = prefix_levels.size() > 1 ? 1 : 0; i < prefix_levels.size(); i += 2) {
    options.levels.push_back(prefix_levels[i]);
  }
  const std::vector<LinearSpec>& layers = source_->layers();
  for (size_t i = 0; i < layers.size(); ++i) {
    // A head's output is compared nowhere in the walk.
    const bool is_refitted = layers[i].role != LinearRole::kHead && stored_ranks_.prefix[i] > 0;
    options.ranks.push_back(is_refitted ? PrefixRanks(layers[i].out, layers[i].in).back() : 0);
  }
  TokenSequences sequences;
  for (const std::vector<int32_t>& sequence : corpus_.calibration) {
    if (CountTokens(sequences) >= options_.refit_tokens) break;
    sequences.push_back(sequence);
  }
  NESTOR_ASSIGN_OR_RETURN(std::unique_ptr<NestedModel> model, NestedModel::Open(partial_));
  NESTOR_RETURN_IF_ERROR(model->SetLevels(levels));
  NESTOR_RETURN_IF_ERROR(RefitFactors(std::move(model), *source_, sequences, options,
                                      options_.make_backend,
                                      [&](size_t layer, const FactorPair& factors) {
                                        return ReplacePrefix(layers[layer], factors, spill_.get());
                                      }));
  return WriteParts(levels);
}

absl::StatusOr<std::vector<Level>> Compression::MeasureLevels(std::vector<Level> levels) {
  NESTOR_ASSIGN_OR_RETURN(const std::unique_ptr<Engine> engine, OpenParts(std::move(levels)));
  NESTOR_ASSIGN_OR_RETURN(const std::vector<LevelMetrics> metrics,
                          EvaluateLevels(engine.get(), evaluation_, &source_measurement_));
  std::vector<Level> measured = engine->model().levels();
  for (size_t i = 0; i < measured.size(); ++i) measured[i].metrics = metrics[i];
  return measured;
}

absl::StatusOr<CompressReport> Compression::Run() {
  NESTOR_RETURN_IF_ERROR(CheckOptions());
  NESTOR_RETURN_IF_ERROR(OpenSource());
  NESTOR_RETURN_IF_ERROR(Calibrate());
  const absl::Status written = [&]() -> absl::Status {
    NESTOR_RETURN_IF_ERROR(CompressLayers());
    NESTOR_RETURN_IF_ERROR(WeightBySensitivity());
    const std::vector<Level> levels = ChooseLevels();
    NESTOR_RETURN_IF_ERROR(WriteParts(levels));
    if (options_.refit_tokens > 0) NESTOR_RETURN_IF_ERROR(RefitPrefix(levels));
    spill_.reset();
    NESTOR_ASSIGN_OR_RETURN(const std::vector<Level> measured, MeasureLevels(levels));
    report_.levels = WithoutInversions(measured, &report_.notes);
    NESTOR_RETURN_IF_ERROR(WriteDescription(&report_.levels));
    return CommitDirectory(partial_, output_, options_.overwrites);
  }();
  std::error_code error;
  if (!written.ok()) {
    spill_.reset();
    fs::remove_all(partial_, error);
    return written;
  }
  fs::remove_all(calibration_directory_, error);
  return report_;
}

}  // namespace

std::vector<double> ResidualTargets(int count, double cheapest) {
  // Shares of the way from the cheapest level to the full one. With int8 planes and rank 0 at
  // 0.53 they reach from 0.553 to 0.6, and from 0.68 to 0.8.
  constexpr double kFineBegin = 0.05, kFineEnd = 0.147, kCoarseBegin = 0.32, kCoarseEnd = 0.58;
  if (count == 1) return {cheapest + kFineEnd * (1 - cheapest)};
  const int fine = std::max(1, static_cast<int>(std::ceil(0.6 * (count - 1))));
  const int coarse = count - 1 - fine;
  std::vector<double> targets = {cheapest};
  const auto add = [&](int steps, double begin, double end) {
    for (int i = 1; i <= steps; ++i) {
      const double share = steps == 1 ? end : begin + (end - begin) * (i - 1) / (steps - 1);
      targets.push_back(cheapest + share * (1 - cheapest));
    }
  };
  add(fine, kFineBegin, kFineEnd);
  add(coarse, kCoarseBegin, kCoarseEnd);
  return targets;
}

std::vector<double> PrefixTargets(int count, bool is_encoder) {
  // Encoders stand low ranks without training, language models do not (methods: Prefix ladders).
  const double begin = is_encoder ? 0.3 : 0.6;
  const double end = is_encoder ? 0.85 : 0.9;
  constexpr double kEncoderAnchor = 0.4;
  if (count == 1) return {is_encoder ? kEncoderAnchor : 0.8};
  std::vector<double> targets;
  for (int i = 0; i < count; ++i) targets.push_back(begin + (end - begin) * i / (count - 1));
  if (is_encoder && count > 2) {
    for (int i = 1; i < count; ++i) {
      targets[static_cast<size_t>(i)] =
          kEncoderAnchor + (end - kEncoderAnchor) * (i - 1) / (count - 2);
    }
  }
  return targets;
}

std::vector<Level> WithoutInversions(const std::vector<Level>& levels,
                                     std::vector<std::string>* notes) {
  std::vector<Level> kept;
  std::map<std::string, LevelMetrics> best;  // so far, by ladder
  for (size_t i = 0; i < levels.size(); ++i) {
    const Level& level = levels[i];
    const auto found = best.find(level.ladder);
    if (found != best.end()) {
      const double tolerance = std::max(level.metrics.standard_error.value_or(0),
                                        found->second.standard_error.value_or(0));
      if (level.metrics.quality < found->second.quality - tolerance) {
        notes->push_back(absl::StrFormat(
            "left out a %s level of relative cost %.3f: its quality %.4f is below the %.4f of a "
            "cheaper one",
            level.ladder, level.relative_cost, level.metrics.quality, found->second.quality));
        continue;
      }
    }
    if (found == best.end() || level.metrics.quality > found->second.quality) {
      best[level.ladder] = level.metrics;
    }
    kept.push_back(level);
  }
  return kept;
}

absl::StatusOr<CompressReport> Compress(const CompressOptions& options) {
  return Compression(options).Run();
}

}  // namespace nestor
