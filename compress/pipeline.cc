#include "compress/pipeline.h"

#include <cblas.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <filesystem>
#include <functional>
#include <iterator>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/checksum.h"
#include "base/file.h"
#include "base/mutex.h"
#include "base/progress.h"
#include "base/status_macros.h"
#include "compress/activations.h"
#include "compress/calibrate.h"
#include "compress/delta.h"
#include "compress/divergence.h"
#include "compress/evaluate.h"
#include "compress/export.h"
#include "compress/gar.h"
#include "compress/layer.h"
#include "compress/layer_times.h"
#include "compress/probe.h"
#include "compress/rank_search.h"
#include "compress/refit.h"
#include "compress/self_sample.h"
#include "compress/sensitivity.h"

namespace nestor {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

// Where errors are weighed: near the ranks that a residual ladder spends most on.
constexpr int64_t kResidualProbeRank = 16;
constexpr int64_t kLanguageModelSensitivityTokens = 512;
constexpr int64_t kEncoderSensitivityTokens = 1024;
// Each group costs a pass over the probe's tokens, which is a small one in an encoder.
constexpr int64_t kLanguageModelDepths = 6;
constexpr int64_t kEncoderDepths = 12;
// An encoder gives a value for each pair of sentences, a language model one for each token.
constexpr int64_t kLanguageModelProbeTokens = 1024;
constexpr int64_t kEncoderProbeTokens = 4096;
// Of the measured loss to the predicted one; beyond, losses do not add up.
constexpr double kLargestAdditiveRatio = 1.5;
// A language model's tokens give a value each, an encoder's a value for each pair of sentences.
constexpr int64_t kLanguageModelEvaluationTokens = 4096;
constexpr int64_t kEncoderEvaluationTokens = 32768;
// A few hundred tokens of one window would be of one subject. An encoder's sentences stay whole.
constexpr int64_t kPieceTokens = 128;
constexpr int64_t kLanguageModelActivationTokens = 2048;
constexpr int64_t kEncoderActivationTokens = 8192;
constexpr int64_t kRefitTokens = 12288;
// What a gar pair may lose of its layer's output, in terms of what plain factors of its rank lose.
// Plain factors of the same cost lose several times as much (docs/ladders.md).
constexpr double kLargestGarError = 1.5;
// A model that does not bear int8 takes a dozen passes, which may be rough ones.
constexpr int64_t kRoughActivationShare = 4;

// A ladder to choose levels of.
struct LadderPlan {
  std::string name;
  RankSearch search = RankSearch::kSensitivity;
  RankObjective objective = RankObjective::kBytes;
  LayerOptions options;  // costs are set when levels are chosen
};

const char* UnitOf(RankObjective objective) {
  switch (objective) {
    case RankObjective::kBytes:
      return "weight bytes";
    case RankObjective::kFlops:
      return "FLOPs";
    case RankObjective::kTime:
      return "time";
  }
  return "cost";
}

AllocateFunction AllocatorOf(RankSearch search) {
  if (search == RankSearch::kEven) return AllocateEvenly;
  return search == RankSearch::kMeasured ? AllocateBySearch : AllocateAlongHulls;
}

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

// What a layer's output lacks at each rank, as share of its energy (docs/artifact_format.md).
Json SpectraOf(const LinearSpec& layer, const LayerParts& parts) {
  Json spectra = {{"name", layer.name}};
  for (const std::vector<LayerOption>* options : {&parts.residual_options, &parts.prefix_options}) {
    for (const LayerOption& option : *options) {
      Form form = option.choice.form;
      if (!HasRanks(form)) continue;
      if (form == Form::kGar) form = Form::kPrefix;  // the same function of the rank
      Json& spectrum = spectra[NameOf(form)];
      spectrum["ranks"].push_back(option.choice.rank);
      spectrum["left"].push_back(option.error);
    }
  }
  return spectra;
}

// Leaves in `search` those of `levels`, in their order.
void KeepSearched(const std::vector<Level>& levels, std::vector<SearchedLevel>* search) {
  if (search->empty()) return;
  std::vector<SearchedLevel> kept;
  for (const Level& level : levels) {
    kept.push_back(*std::find_if(search->begin(), search->end(), [&](const SearchedLevel& found) {
      return found.profile == level.profile;
    }));
  }
  *search = std::move(kept);
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
  absl::Status CheckGarLevels(int64_t count) const;
  absl::Status CheckSearch() const;
  absl::Status CheckProbeTokens(int64_t calibration_tokens) const;
  absl::Status OpenSource();
  // Takes what the delta's factors were calibrated on in place of the text.
  void CalibrateAsDelta();
  void PlanLadders();
  absl::Status Calibrate();
  absl::Status CompressLayers();
  absl::Status CompressOneLayer(size_t layer);
  // Layers side by side, on as many threads as the options say.
  absl::Status ForEachLayer(const std::string& label,
                            const std::function<absl::Status(size_t)>& function) const;
  absl::Status WeightErrors();
  absl::Status WeightBySensitivity(LadderPlan* ladder);
  absl::Status ProbeLayers();
  TokenSequences ProbeText() const;
  absl::Status CheckCosts(const LadderPlan& ladder) const;
  std::vector<int64_t> TargetsOf(const LadderPlan& ladder) const;
  // The choices of a level that may have gar pairs, or not, at their costs.
  LayerOptions OptionsOf(const LadderPlan& ladder, bool may_be_gar) const;
  // One for each target.
  std::vector<Profile> Allocate(const LadderPlan& ladder,
                                const std::vector<int64_t>& targets) const;
  // The delta's, where layers whose ranks do not pay run dense.
  std::vector<Profile> ProfilesOfDelta(const LadderPlan& ladder);
  // What nested.json says of it.
  Json CalibrationOrigin() const;
  absl::StatusOr<std::vector<Level>> ChooseLevels();
  absl::Status CompareLosses(const std::vector<Level>& levels);
  absl::Status RefitPrefix(const std::vector<Level>& levels);
  // What a level's layer runs in the end: gar pairs are prefixes of a chain that is being made.
  FormAndRank FinalChoice(size_t level, size_t layer, FormAndRank choice) const;
  std::set<int64_t> GarRanksOf(const std::vector<Level>& levels, size_t layer) const;
  using GarFitter = std::function<absl::StatusOr<GarFit>(int64_t rank)>;
  absl::Status FitGarPairs(size_t layer, const std::set<int64_t>& ranks, const GarFitter& fitter);
  absl::Status FitOtherGarPairs(const std::vector<Level>& levels);
  absl::Status RunGarPairs(std::vector<Level>* levels);
  void ReportGarPairs();
  absl::Status WriteParts(const std::vector<Level>& levels);
  // What the calibration rests on.
  std::string CalibrationKey() const;
  // About `tokens` of the calibration text without what is sampled here, which a run that resumes
  // may not have; from all over it, at most `longest` of a sequence.
  TokenSequences CalibrationText(int64_t tokens, int64_t longest) const;
  TokenSequences TextToMeasure(int64_t tokens) const;
  absl::StatusOr<std::unique_ptr<NestedModel>> OpenModel(std::vector<Level> levels) const;
  absl::StatusOr<std::unique_ptr<Engine>> OpenParts(std::vector<Level> levels) const;
  // An engine whose inputs stay floats, for outputs that are compared with each other. Whatever a
  // layer changes, later inputs round to int8 otherwise, which alone diverges as much as most
  // layers do (docs/ladders.md).
  absl::StatusOr<std::unique_ptr<Engine>> OpenToCompare(std::unique_ptr<NestedModel> model) const;
  absl::Status ChooseActivations(const std::vector<Level>& levels);
  absl::StatusOr<std::vector<Level>> MeasureLevels(std::vector<Level> levels);
  absl::Status WriteDescription(const std::vector<Level>* levels) const;

  bool has_residual() const { return options_.ladder != LadderChoice::kPrefix; }
  bool has_prefix() const { return options_.ladder != LadderChoice::kResidual; }
  bool may_be_gar(const LadderPlan& ladder, int64_t level) const {
    const std::optional<std::vector<int>>& chosen = options_.gar_levels;
    return ladder.name != "residual" &&
           (!chosen.has_value() || std::count(chosen->begin(), chosen->end(), level) > 0);
  }
  int64_t refit_tokens() const {
    return options_.refit_tokens.value_or(options_.delta.empty() ? kRefitTokens : 0);
  }
  // On some level.
  bool may_be_gar() const {
    return has_prefix() && (!options_.gar_levels.has_value() || !options_.gar_levels->empty());
  }
  // An artifact to train: pairs come when that is done.
  bool is_to_train() const { return !options_.makes_gar_pairs; }
  // A delta that is to train further gives its levels and calibration alone.
  bool applies_delta() const { return delta_.has_value() && !is_to_train(); }
  // Whether terms may be trained beside the prefix factors: plain ones that nothing but the
  // calibration decides.
  bool takes_terms() const {
    return has_prefix() && (!may_be_gar() || is_to_train()) && refit_tokens() == 0 &&
           !applies_delta();
  }
  // Whether the delta names its levels.
  bool is_of_delta(const LadderPlan& ladder) const {
    return delta_.has_value() && ladder.name == "prefix";
  }
  bool has_calibrated_delta() const { return delta_.has_value() && !delta_->calibration.empty(); }
  bool has_term(size_t layer) const {
    return delta_.has_value() && delta_->terms[layer].a.rank > 0;
  }
  bool is_measured() const { return options_.search.method == RankSearch::kMeasured; }
  // Of one layer, attention apart.
  int64_t CostOf(const LinearSpec& layer, FormAndRank choice, RankObjective objective) const;
  int64_t FullCost(RankObjective objective) const;
  int64_t AttentionCost(RankObjective objective) const;
  // Of the whole model at the cheapest choices, as share of the full level's.
  double CheapestShare(const LadderPlan& ladder) const;

  const CompressOptions& options_;
  const std::string output_;  // without a slash at its end
  const std::string partial_;
  const std::string calibration_directory_;

  std::unique_ptr<NestedModel> source_;
  std::string source_sha256_;
  std::optional<Delta> delta_;
  int64_t self_sample_tokens_ = 0;
  std::unique_ptr<Engine> source_engine_;
  Corpus corpus_;
  EvaluationSet evaluation_;
  LayerInputs inputs_;
  std::optional<Calibration> calibration_;
  Measurement source_measurement_;
  std::unique_ptr<TensorSpill> spill_;
  std::vector<LadderPlan> ladders_;
  size_t text_sequences_ = 0;  // of corpus_.calibration; sampled ones follow
  std::optional<LayerTimes> layer_times_;
  std::vector<Json> spectra_;  // by layer
  StoredRanks stored_ranks_;
  std::vector<bool> runs_gar_;  // by level, whether its layers may
  // By layer: ranks whose pairs are in the spill, and, for the others that levels wanted, what
  // runs instead: kPrefix or kDense.
  std::vector<std::set<int64_t>> gar_ranks_;
  std::vector<std::map<int64_t, Form>> gar_substitutes_;
  std::vector<uint8_t> is_gar_done_;     // whether that is settled
  std::vector<bool> float_activations_;  // by layer
  std::map<std::string, std::string> checksums_;
  CompressReport report_;
};

absl::Status Compression::CheckOptions() const {
  if (options_.levels < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("levels: must be positive; was ", options_.levels));
  }
  // A delta may bring its own.
  if (options_.corpus.calibration_paths.empty() && options_.delta.empty()) {
    return absl::InvalidArgumentError("calibration: no text is given");
  }
  for (const auto& [name, value] :
       {std::pair("calibration tokens", options_.corpus.calibration_tokens),
        std::pair("evaluation tokens", options_.evaluation_tokens.value_or(1)),
        std::pair("probes", options_.search.probes),
        std::pair("probe tokens", options_.search.probe_tokens.value_or(1)),
        std::pair("rows", options_.search.rows),
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
  if (options_.refit_tokens.value_or(0) < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("refit tokens: must not be negative; was ", *options_.refit_tokens));
  }
  if (!options_.delta.empty() && refit_tokens() > 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("refit tokens: ", refit_tokens(),
                     ", but a delta's terms were trained beside factors that are not refitted"));
  }
  if (options_.delta.empty()) {
    const std::vector<double>& costs = options_.search.costs;
    const int64_t below_full = std::ssize(costs) - std::count(costs.begin(), costs.end(), 1);
    NESTOR_RETURN_IF_ERROR(CheckGarLevels(costs.empty() ? options_.levels : below_full));
  }
  std::error_code error;
  if (fs::exists(output_, error) && !options_.overwrites) {
    return absl::AlreadyExistsError(absl::StrCat(output_, ": exists already"));
  }
  return CheckSearch();
}

absl::Status Compression::CheckGarLevels(int64_t count) const {
  if (!options_.gar_levels.has_value()) return absl::OkStatus();
  for (const int level : *options_.gar_levels) {
    if (!has_prefix()) {
      return absl::InvalidArgumentError(
          absl::StrCat("gar levels: ", level, ", but a residual ladder has no gar pairs"));
    }
    if (level < 0 || level >= count) {
      return absl::InvalidArgumentError(absl::StrCat("gar levels: expected 0 to ", count - 1,
                                                     ", from the ladder's cheapest; was ", level));
    }
  }
  return absl::OkStatus();
}

absl::Status Compression::CheckProbeTokens(int64_t calibration_tokens) const {
  const int64_t tokens = options_.search.probe_tokens.value_or(0);
  if (tokens <= calibration_tokens) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("probe tokens: ", tokens, " of only ",
                                                 calibration_tokens, " calibration tokens"));
}

absl::Status Compression::CheckSearch() const {
  const RankSearchOptions& search = options_.search;
  if (!options_.delta.empty() && (!has_prefix() || options_.ladder == LadderChoice::kMixed)) {
    return absl::InvalidArgumentError("delta: needs a prefix ladder");
  }
  if (!options_.delta.empty() && !has_residual() && (is_measured() || !search.costs.empty())) {
    return absl::InvalidArgumentError(
        "delta: names the levels of a prefix ladder itself; costs and a measured search may be "
        "given for a residual ladder beside it");
  }
  if (!has_prefix() && is_to_train()) {
    return absl::InvalidArgumentError(
        "gar levels: put off, but a residual ladder has no gar pairs");
  }
  if (!is_measured() && options_.ladder == LadderChoice::kMixed) {
    return absl::InvalidArgumentError("search: a mixed ladder needs a measured search");
  }
  if (!is_measured() && search.objective == RankObjective::kTime) {
    return absl::InvalidArgumentError("search: time as the objective needs a measured search");
  }
  if (options_.delta.empty()) {
    NESTOR_RETURN_IF_ERROR(CheckProbeTokens(options_.corpus.calibration_tokens));
  }
  std::vector<double> costs = search.costs;
  std::sort(costs.begin(), costs.end());
  for (size_t i = 0; i < costs.size(); ++i) {
    if (!(costs[i] > 0 && costs[i] <= 1)) {
      return absl::InvalidArgumentError(absl::StrCat("costs: must be in (0, 1]; was ", costs[i]));
    }
    if (i > 0 && costs[i] == costs[i - 1]) {
      return absl::InvalidArgumentError(absl::StrCat("costs: ", costs[i], " is there twice"));
    }
  }
  if (!costs.empty() && costs.front() == 1) {
    return absl::InvalidArgumentError("costs: the full level costs 1; expected one that is below");
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
  NESTOR_RETURN_IF_ERROR(CheckFinite(*source_));
  NESTOR_ASSIGN_OR_RETURN(source_sha256_, Sha256OfFiles(source_->tensors().paths()));
  if (!options_.delta.empty()) {
    NESTOR_ASSIGN_OR_RETURN(
        delta_, ReadDelta(options_.delta, source_sha256_, source_->layers(), source_->spec()));
    NESTOR_RETURN_IF_ERROR(CheckGarLevels(std::ssize(delta_->profiles)));
  }
  if (options_.corpus.calibration_paths.empty()) {
    if (!has_calibrated_delta()) {
      return absl::InvalidArgumentError(
          absl::StrCat("calibration: no text is given, and ", options_.delta, " brings none"));
    }
    if (options_.corpus.evaluation_path.empty()) {
      return absl::InvalidArgumentError(
          "evaluation: no text is given, nor one for calibration, whose last fifth would be it; "
          "expected one of them");
    }
  }
  if (has_calibrated_delta() && options_.self_sample_tokens.value_or(0) > 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("tokens to sample: ", *options_.self_sample_tokens,
                     ", but the delta brings all that its factors are calibrated on"));
  }
  self_sample_tokens_ = options_.self_sample_tokens.value_or(
      is_encoder || has_calibrated_delta() ? 0 : options_.corpus.calibration_tokens);
  inputs_ = LayerInputsOf(source_->layers());
  float_activations_.assign(source_->layers().size(), options_.activations == Activations::kFloat);
  NESTOR_ASSIGN_OR_RETURN(std::unique_ptr<NestedModel> model, NestedModel::Open(options_.source));
  const int64_t sequences = self_sample_tokens_ > 0 ? kSelfSampleBatch : 1;
  NESTOR_ASSIGN_OR_RETURN(source_engine_, OpenEngine(std::move(model), options_.make_backend,
                                                     sequences * kWindowTokens));
  CorpusOptions corpus = options_.corpus;
  corpus.evaluation_tokens = options_.evaluation_tokens.value_or(
      is_encoder ? kEncoderEvaluationTokens : kLanguageModelEvaluationTokens);
  NESTOR_ASSIGN_OR_RETURN(corpus_,
                          ReadCorpus(corpus, source_engine_->tokenizer(), source_->spec()));
  if (has_calibrated_delta()) CalibrateAsDelta();
  if (delta_.has_value()) {
    NESTOR_RETURN_IF_ERROR(CheckProbeTokens(has_calibrated_delta()
                                                ? CountTokens(corpus_.calibration)
                                                : options_.corpus.calibration_tokens));
  }
  text_sequences_ = corpus_.calibration.size();
  PlanLadders();
  for (const LadderPlan& ladder : ladders_) {
    // What takes how long is known later.
    if (ladder.objective != RankObjective::kTime) NESTOR_RETURN_IF_ERROR(CheckCosts(ladder));
  }
  if (is_encoder && !source_->spec().is_classifier()) {
    evaluation_ = SplicedPairs(corpus_.evaluation);
  } else {
    evaluation_.sequences = corpus_.evaluation;
  }
  return absl::OkStatus();
}

void Compression::CalibrateAsDelta() {
  corpus_.calibration = delta_->calibration;
  std::vector<int32_t> all;  // each sequence after its length
  for (const std::vector<int32_t>& sequence : corpus_.calibration) {
    all.push_back(static_cast<int32_t>(sequence.size()));
    all.insert(all.end(), sequence.begin(), sequence.end());
  }
  corpus_.calibration_sha256 = Sha256(std::as_bytes(std::span(all)));
  std::string note = absl::StrCat("calibrated on the ", CountTokens(corpus_.calibration),
                                  " tokens that the delta brings");
  if (!options_.corpus.calibration_paths.empty()) {
    note += ", instead of the text for calibration";
  }
  if (options_.corpus.evaluation_path.empty()) {
    note += ", whose last fifth, on which levels are measured, may be among them";
  }
  report_.notes.push_back(std::move(note));
}

void Compression::PlanLadders() {
  const auto add = [&](const std::string& name, RankSearch search, RankObjective objective) {
    ladders_.push_back({.name = name,
                        .search = options_.search.method.value_or(search),
                        .objective = options_.search.objective.value_or(objective),
                        .options = LayerOptions(source_->layers().size())});
  };
  if (options_.ladder == LadderChoice::kMixed) {
    add("mixed", RankSearch::kMeasured, RankObjective::kBytes);
    return;
  }
  if (has_residual()) add("residual", RankSearch::kSensitivity, RankObjective::kBytes);
  if (has_prefix()) {
    add("prefix", source_->spec().is_encoder() ? RankSearch::kEven : RankSearch::kSensitivity,
        RankObjective::kFlops);
  }
}

absl::Status Compression::Calibrate() {
  const std::string key = CalibrationKey();
  const SelfSampleOptions sample{.tokens = self_sample_tokens_};
  const int64_t sequences =
      static_cast<int64_t>(corpus_.calibration.size()) + SampledSequences(*source_engine_, sample);
  report_.calibration_tokens =
      CountTokens(corpus_.calibration) + SampledTokens(*source_engine_, sample);
  absl::StatusOr<Calibration> calibration =
      OpenCalibration(calibration_directory_, key, sequences, inputs_);
  // Tokens that are sampled are needed to calibrate, or to be written for training.
  if (sample.tokens > 0 && (!calibration.ok() || takes_terms())) {
    NESTOR_ASSIGN_OR_RETURN(const TokenSequences sampled,
                            SampleFromModel(source_engine_.get(), corpus_.calibration, sample));
    corpus_.calibration.insert(corpus_.calibration.end(), sampled.begin(), sampled.end());
  }
  if (calibration.ok()) {
    report_.resumed_sequences = sequences;
  } else {
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
                                                        : options_.max_residual_rank,
                               .may_be_gar = may_be_gar()};
  NESTOR_ASSIGN_OR_RETURN(LayerParts parts, CompressLayer(spec, weights, moment, settings));
  NESTOR_RETURN_IF_ERROR(AddLayer(spec, parts, spill_.get()));
  spectra_[layer] = SpectraOf(spec, parts);
  for (LadderPlan& ladder : ladders_) {
    std::vector<LayerOption>& options = ladder.options[layer];
    options = ladder.name == "prefix" ? parts.prefix_options : parts.residual_options;
    if (ladder.name != "mixed") continue;
    std::copy_if(parts.prefix_options.begin(), parts.prefix_options.end(),
                 std::back_inserter(options),
                 [](const LayerOption& option) { return option.choice.form == Form::kPrefix; });
  }
  return absl::OkStatus();
}

absl::Status Compression::CompressLayers() {
  std::error_code error;
  fs::remove_all(partial_, error);
  fs::create_directories(partial_, error);
  if (error) return FileError(partial_, error.value());
  NESTOR_ASSIGN_OR_RETURN(spill_, TensorSpill::Create(partial_ + "/parts.spill"));
  const size_t num_layers = source_->layers().size();
  gar_ranks_.resize(num_layers);
  gar_substitutes_.resize(num_layers);
  is_gar_done_.resize(num_layers);
  spectra_.resize(num_layers);
  NESTOR_RETURN_IF_ERROR(
      ForEachLayer("Decomposing", [this](size_t layer) { return CompressOneLayer(layer); }));
  NESTOR_RETURN_IF_ERROR(
      WriteFileAtomically(partial_ + "/spectra.json", Json{{"layers", spectra_}}.dump()));
  return AddOtherTensors(*source_, spill_.get());
}

absl::Status Compression::ForEachLayer(const std::string& label,
                                       const std::function<absl::Status(size_t)>& function) const {
  const std::vector<LinearSpec>& layers = source_->layers();
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
  Progress progress(label, weights);
  std::atomic<size_t> next{0};
  const auto work = [&] {
    for (size_t i = next++; i < order.size(); i = next++) {
      const absl::Status done = function(order[i]);
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
  return status;
}

absl::Status Compression::WeightErrors() {
  if (is_measured()) return ProbeLayers();
  for (LadderPlan& ladder : ladders_) {
    if (is_of_delta(ladder)) continue;
    if (ladder.search == RankSearch::kSensitivity && options_.allocate == nullptr) {
      NESTOR_RETURN_IF_ERROR(WeightBySensitivity(&ladder));
    }
  }
  return absl::OkStatus();
}

absl::Status Compression::WeightBySensitivity(LadderPlan* ladder) {
  const std::vector<size_t> groups = SensitivityGroups(
      source_->layers(), source_->spec().is_encoder() ? kEncoderDepths : kLanguageModelDepths);
  const std::vector<LayerOption> probes =
      ProbeOptions(ladder->options, ladder->name == "residual" ? kResidualProbeRank : 0);
  const std::vector<Level> chain = ProbeChain(probes, groups, ladder->name);
  NESTOR_RETURN_IF_ERROR(WriteParts(chain));
  NESTOR_ASSIGN_OR_RETURN(std::unique_ptr<NestedModel> model, OpenModel(chain));
  NESTOR_ASSIGN_OR_RETURN(const std::unique_ptr<Engine> engine, OpenToCompare(std::move(model)));
  const int64_t tokens =
      source_->spec().is_encoder() ? kEncoderSensitivityTokens : kLanguageModelSensitivityTokens;
  NESTOR_ASSIGN_OR_RETURN(const std::vector<double> measured,
                          MeasureGroups(engine.get(), TextToMeasure(tokens)));
  nestor::WeightErrors(measured, groups, probes, &ladder->options);
  return absl::OkStatus();
}

std::string Compression::CalibrationKey() const {
  // "all rows": of the head's input, too; moments of some of its rows are another calibration.
  const int64_t tokens = has_calibrated_delta() ? CountTokens(delta_->calibration)
                                                : options_.corpus.calibration_tokens;
  return absl::StrCat("source ", source_sha256_, ", text ", corpus_.calibration_sha256, ", tokens ",
                      tokens, ", sampled ", self_sample_tokens_, ", all rows");
}

TokenSequences Compression::CalibrationText(int64_t tokens, int64_t longest) const {
  const auto text_end = corpus_.calibration.begin() + static_cast<ptrdiff_t>(text_sequences_);
  return SpreadOver({corpus_.calibration.begin(), text_end}, tokens, longest);
}

TokenSequences Compression::TextToMeasure(int64_t tokens) const {
  return CalibrationText(tokens, source_->spec().is_encoder() ? kWindowTokens : kPieceTokens);
}

TokenSequences Compression::ProbeText() const {
  return TextToMeasure(options_.search.probe_tokens.value_or(
      source_->spec().is_encoder() ? kEncoderProbeTokens : kLanguageModelProbeTokens));
}

absl::Status Compression::ProbeLayers() {
  const size_t num_layers = source_->layers().size();
  std::vector<Probe> probes;
  Profile largest_residual(num_layers);
  Profile largest_prefix(num_layers);
  Profile middle(num_layers);
  for (const LadderPlan& ladder : ladders_) {
    if (!is_of_delta(ladder)) {
      const std::vector<Probe> chosen = ChooseProbes(ladder.options, options_.search.probes);
      probes.insert(probes.end(), chosen.begin(), chosen.end());
    }
    for (size_t layer = 0; layer < num_layers; ++layer) {
      for (const LayerOption& option : ladder.options[layer]) {
        if (option.choice.form == Form::kMiddle) {
          middle[layer] = option.choice;
          continue;
        }
        FormAndRank& largest =
            option.choice.form == Form::kPrefix ? largest_prefix[layer] : largest_residual[layer];
        if (option.choice.rank >= largest.rank) largest = option.choice;
      }
    }
  }
  // Every rank that may be chosen, for the layers to be timed at.
  NESTOR_RETURN_IF_ERROR(WriteParts({Level{.ladder = "residual", .profile = largest_residual},
                                     Level{.ladder = "prefix", .profile = largest_prefix},
                                     Level{.ladder = "residual", .profile = middle}}));
  NESTOR_ASSIGN_OR_RETURN(std::unique_ptr<NestedModel> model, NestedModel::Open(partial_));
  NESTOR_ASSIGN_OR_RETURN(layer_times_,
                          LayerTimes::Measure(*model, options_.make_backend, options_.search.rows));

  const TokenSequences sequences = ProbeText();
  const std::string key = absl::StrCat(CalibrationKey(), ", dense ",
                                       options_.dense == DenseStorage::kPlanes ? "int8" : "bf16",
                                       ", planes 2, inputs float, pieces of ", kPieceTokens,
                                       ", probe tokens ", CountTokens(sequences));
  NESTOR_ASSIGN_OR_RETURN(ProbeLog log,
                          ProbeLog::Open(calibration_directory_ + "/probes.jsonl", key));
  NESTOR_RETURN_IF_ERROR(model->SetProbes(ProbeLevels(probes, num_layers)));
  NESTOR_ASSIGN_OR_RETURN(const std::unique_ptr<Engine> engine, OpenToCompare(std::move(model)));
  report_.probes = std::ssize(probes);
  NESTOR_ASSIGN_OR_RETURN(report_.resumed_probes,
                          MeasureProbes(engine.get(), sequences, &probes, &log));
  for (LadderPlan& ladder : ladders_) {
    if (!is_of_delta(ladder)) ErrorsFromProbes(probes, &ladder.options);
  }
  return absl::OkStatus();
}

int64_t Compression::CostOf(const LinearSpec& layer, FormAndRank choice,
                            RankObjective objective) const {
  if (objective == RankObjective::kTime) return layer_times_->Of(layer, choice);
  const LinearCost cost =
      CostOfLinear(layer.out, layer.in, layer.has_bias, options_.dense, choice.form, choice.rank);
  return objective == RankObjective::kBytes ? cost.weight_bytes : cost.flops;
}

int64_t Compression::AttentionCost(RankObjective objective) const {
  if (objective != RankObjective::kFlops) return 0;
  const Profile full(source_->layers().size());
  int64_t flops = CostOfProfile(source_->spec(), source_->layers(), full, options_.dense).flops;
  for (const LinearSpec& layer : source_->layers()) flops -= CostOf(layer, {}, objective);
  return flops;
}

int64_t Compression::FullCost(RankObjective objective) const {
  int64_t cost = AttentionCost(objective);
  for (const LinearSpec& layer : source_->layers()) cost += CostOf(layer, {}, objective);
  return cost;
}

double Compression::CheapestShare(const LadderPlan& ladder) const {
  int64_t cost = AttentionCost(ladder.objective);
  for (const LinearSpec& layer : source_->layers()) {
    std::vector<FormAndRank> choices = {{}};
    const std::vector<int64_t> ranks = PrefixRanks(layer.out, layer.in, may_be_gar());
    if (ladder.name != "prefix") choices.push_back({Form::kResidual, 0});
    if (ladder.name != "residual" && !ranks.empty()) {
      choices.push_back(CheapestPrefix(layer.out, layer.in, ranks.front(), may_be_gar()));
    }
    int64_t least = std::numeric_limits<int64_t>::max();
    for (const FormAndRank& choice : choices) {
      least = std::min(least, CostOf(layer, choice, ladder.objective));
    }
    cost += least;
  }
  return static_cast<double>(cost) / static_cast<double>(FullCost(ladder.objective));
}

absl::Status Compression::CheckCosts(const LadderPlan& ladder) const {
  const std::vector<double>& costs = options_.search.costs;
  if (costs.empty() || is_of_delta(ladder)) return absl::OkStatus();
  const double least = *std::min_element(costs.begin(), costs.end());
  const double cheapest = CheapestShare(ladder);
  if (least >= cheapest) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrFormat(
      "costs: %g is less than the cheapest %s level has: %.4f of the full level's %s", least,
      ladder.name, cheapest, UnitOf(ladder.objective)));
}

LayerOptions Compression::OptionsOf(const LadderPlan& ladder, bool may_be_gar) const {
  LayerOptions result(ladder.options.size());
  for (size_t layer = 0; layer < ladder.options.size(); ++layer) {
    const LinearSpec& spec = source_->layers()[layer];
    std::vector<LayerOption> options = ladder.options[layer];
    for (LayerOption& option : options) {
      const auto& [form, rank] = option.choice;
      const FormAndRank stored = form == Form::kPrefix
                                     ? CheapestPrefix(spec.out, spec.in, rank, may_be_gar)
                                     : option.choice;
      option.cost = CostOf(spec, stored, ladder.objective);
    }
    // Plain factors below the least rank of a gar pair may cost more than that pair, and above
    // break-even more than the dense layer.
    const auto is_beaten_by = [&](const LayerOption& option, const LayerOption& other) {
      // One rank for all layers knows no middle plane that could take the place of ranks.
      const bool is_after_ranks = ladder.search != RankSearch::kEven &&
                                  option.choice.form == Form::kResidual &&
                                  other.choice.form == Form::kMiddle;
      const bool is_larger = other.choice.form == option.choice.form
                                 ? other.choice.rank > option.choice.rank
                                 : other.choice.form == Form::kDense || is_after_ranks;
      return is_larger && other.cost <= option.cost;
    };
    std::copy_if(options.begin(), options.end(), std::back_inserter(result[layer]),
                 [&](const LayerOption& option) {
                   return std::none_of(
                       options.begin(), options.end(),
                       [&](const LayerOption& other) { return is_beaten_by(option, other); });
                 });
  }
  return result;
}

std::vector<Profile> Compression::Allocate(const LadderPlan& ladder,
                                           const std::vector<int64_t>& targets) const {
  const AllocateFunction allocate =
      options_.allocate == nullptr ? AllocatorOf(ladder.search) : options_.allocate;
  std::vector<LayerOptions> options;  // by level
  std::vector<Profile> profiles;
  std::map<bool, std::vector<Profile>> chains;
  for (int64_t i = 0; i < std::ssize(targets); ++i) {
    const bool is_gar = may_be_gar(ladder, i);
    options.push_back(OptionsOf(ladder, is_gar));
    if (!chains.contains(is_gar)) chains[is_gar] = allocate(options.back(), targets);
    profiles.push_back(chains[is_gar][static_cast<size_t>(i)]);
  }
  if (chains.size() < 2) return profiles;
  // Levels of two chains: what is not nested in the level above shrinks to what is, which costs
  // less.
  for (size_t i = profiles.size() - 1; i-- > 0;) {
    for (size_t layer = 0; layer < profiles[i].size(); ++layer) {
      const FormAndRank above = profiles[i + 1][layer];
      if (IsNested(profiles[i][layer], above)) continue;
      const LayerOption* largest = nullptr;
      for (const LayerOption& option : options[i][layer]) {
        const bool is_better = largest == nullptr || option.choice.rank > largest->choice.rank;
        if (IsNested(option.choice, above) && is_better) largest = &option;
      }
      NESTOR_CHECK(largest != nullptr);
      profiles[i][layer] = largest->choice;
    }
  }
  return profiles;
}

std::vector<int64_t> Compression::TargetsOf(const LadderPlan& ladder) const {
  std::vector<double> shares = options_.search.costs;
  std::sort(shares.begin(), shares.end());
  std::erase(shares, 1.0);  // the full level
  if (shares.empty()) {
    const double cheapest = CheapestShare(ladder);
    if (ladder.name == "residual" && ladder.objective == RankObjective::kBytes) {
      shares = ResidualTargets(options_.levels, cheapest);
    } else if (ladder.name == "prefix" && ladder.objective == RankObjective::kFlops) {
      shares = PrefixTargets(options_.levels, source_->spec().is_encoder());
    } else {
      shares = EvenTargets(options_.levels, cheapest);
    }
  }
  std::vector<int64_t> targets;
  for (const double share : shares) {
    targets.push_back(
        static_cast<int64_t>(share * static_cast<double>(FullCost(ladder.objective))) -
        AttentionCost(ladder.objective));
  }
  return targets;
}

Json Compression::CalibrationOrigin() const {
  return {{"text_sha256", corpus_.calibration_sha256},
          {"tokens", report_.calibration_tokens},
          {"self_sampled_tokens", self_sample_tokens_},
          {"refit_tokens", has_prefix() ? refit_tokens() : 0}};
}

std::vector<Profile> Compression::ProfilesOfDelta(const LadderPlan& ladder) {
  std::vector<Profile> profiles = delta_->profiles;
  int64_t num_dense = 0;
  for (size_t layer = 0; layer < source_->layers().size(); ++layer) {
    const LinearSpec& spec = source_->layers()[layer];
    const std::vector<int64_t> plain = PrefixRanks(spec.out, spec.in, /*may_be_gar=*/false);
    const int64_t largest = plain.empty() ? 0 : plain.back();
    bool is_dense = false;  // from the level on that is, since levels are nested
    for (size_t i = 0; i < profiles.size(); ++i) {
      FormAndRank& choice = profiles[i][layer];
      if (choice.form != Form::kPrefix) continue;
      const bool is_gar = may_be_gar(ladder, static_cast<int64_t>(i));
      const Form form = CheapestPrefix(spec.out, spec.in, choice.rank, is_gar).form;
      is_dense = is_dense || (form == Form::kPrefix && choice.rank > largest);
      if (!is_dense) continue;
      choice = {};
      ++num_dense;
    }
  }
  if (num_dense > 0) {
    report_.notes.push_back(
        absl::StrFormat("at %d places of the delta's levels layers run dense: plain factors of "
                        "their ranks cost more, and their levels have no gar pairs",
                        num_dense));
  }
  return profiles;
}

absl::StatusOr<std::vector<Level>> Compression::ChooseLevels() {
  const Profile full(source_->layers().size());
  std::vector<Level> levels;
  for (const LadderPlan& ladder : ladders_) {
    NESTOR_RETURN_IF_ERROR(CheckCosts(ladder));
    const std::vector<int64_t> targets = TargetsOf(ladder);
    const std::vector<Profile> profiles =
        is_of_delta(ladder) ? ProfilesOfDelta(ladder) : Allocate(ladder, targets);
    Profile last;
    for (size_t i = 0; i < profiles.size(); ++i) {
      // A small model may have nothing between two targets.
      if (profiles[i] == last || profiles[i] == full) {
        if (options_.search.costs.empty() || is_of_delta(ladder)) continue;
        return absl::InvalidArgumentError(absl::StrFormat(
            "costs: the %s ladder has no level of its own within %.4f of the full level's %s",
            ladder.name,
            static_cast<double>(targets[i] + AttentionCost(ladder.objective)) /
                static_cast<double>(FullCost(ladder.objective)),
            UnitOf(ladder.objective)));
      }
      last = profiles[i];
      Level level;
      level.ladder = ladder.name;
      level.profile = profiles[i];
      levels.push_back(std::move(level));
      runs_gar_.push_back(may_be_gar(ladder, static_cast<int64_t>(i)));
      if (!is_measured()) continue;
      report_.search.push_back({.profile = profiles[i]});
      if (is_of_delta(ladder)) continue;
      report_.search.back().predicted_loss = ErrorOfProfile(ladder.options, profiles[i]);
    }
  }
  Level top;
  top.ladder = "full";
  top.profile = full;
  levels.push_back(std::move(top));
  runs_gar_.push_back(false);
  if (is_measured()) {
    report_.search.push_back({.profile = full, .predicted_loss = 0, .measured_loss = 0});
  }
  return levels;
}

absl::Status Compression::CompareLosses(const std::vector<Level>& levels) {
  NESTOR_ASSIGN_OR_RETURN(std::unique_ptr<NestedModel> model, OpenModel(levels));
  NESTOR_ASSIGN_OR_RETURN(const std::unique_ptr<Engine> engine, OpenToCompare(std::move(model)));
  const TokenSequences sequences = ProbeText();
  const auto compared =
      std::count_if(report_.search.begin(), report_.search.end(),
                    [](const SearchedLevel& each) { return each.predicted_loss.has_value(); });
  Progress progress("Comparing losses", compared * CountTokens(sequences));
  const int full = static_cast<int>(levels.size()) - 1;
  const double full_time =
      static_cast<double>(layer_times_->OfProfile(source_->layers(), levels.back().profile));
  NESTOR_ASSIGN_OR_RETURN(const Outputs whole, OutputsAt(engine.get(), sequences, full, &progress));
  for (int i = 0; i <= full; ++i) {
    SearchedLevel& searched = report_.search[static_cast<size_t>(i)];
    Profile profile = searched.profile;
    for (size_t layer = 0; layer < profile.size(); ++layer) {
      profile[layer] = FinalChoice(static_cast<size_t>(i), layer, profile[layer]);
    }
    const auto time = static_cast<double>(layer_times_->OfProfile(source_->layers(), profile));
    searched.seconds = 1e-9 * time;
    searched.relative_time = time / full_time;
    if (i == full || !searched.predicted_loss.has_value()) continue;
    NESTOR_ASSIGN_OR_RETURN(const Outputs outputs,
                            OutputsAt(engine.get(), sequences, i, &progress));
    searched.measured_loss = DivergenceOf(source_->spec(), whole, outputs);
    const double ratio = *searched.measured_loss / *searched.predicted_loss;
    if (ratio <= kLargestAdditiveRatio && ratio >= 1 / kLargestAdditiveRatio) continue;
    report_.notes.push_back(absl::StrFormat(
        "losses do not add up at the %s level of relative cost %.3f: its layers' sum is %.4g, "
        "measured together they are %.4g",
        levels[static_cast<size_t>(i)].ladder,
        engine->model().levels()[static_cast<size_t>(i)].relative_cost, *searched.predicted_loss,
        *searched.measured_loss));
  }
  return absl::OkStatus();
}

absl::Status Compression::WriteParts(const std::vector<Level>& levels) {
  stored_ranks_ = StoredRanksOf(levels, source_->layers().size());
  NESTOR_ASSIGN_OR_RETURN(
      checksums_, spill_->WriteTensors(partial_ + "/nested.safetensors",
                                       KeptRows(source_->layers(), stored_ranks_, gar_ranks_)));
  NESTOR_RETURN_IF_ERROR(CopyModelFiles(options_.source, partial_));
  if (takes_terms()) {
    NESTOR_RETURN_IF_ERROR(
        WriteCalibrationTokens(corpus_.calibration, partial_ + "/calibration.safetensors"));
  }
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
    if (stored_ranks_.has_middle[i]) layers.back()["middle_plane"] = true;
    if (!stored_ranks_.gar[i].empty()) layers.back()["gar_ranks"] = stored_ranks_.gar[i];
    if (float_activations_[i]) layers.back()["activations"] = "float";
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
      {"calibration", CalibrationOrigin()},
      {"evaluation",
       {{"text_sha256", corpus_.evaluation_sha256},
        {"tokens", report_.evaluation_tokens},
        {"standard", source_->spec().is_classifier()
                         ? "labels of lines as the full level gives them"
                     : source_->spec().is_encoder() ? "lines and splices with the next"
                                                    : "windows of 512 tokens"}}},
      {"checksums", checksums_}};
  if (levels != nullptr) description["levels"] = LevelsToJson(*levels);
  return WriteFileAtomically(partial_ + "/nested.json", description.dump(1));
}

absl::StatusOr<std::unique_ptr<NestedModel>> Compression::OpenModel(
    std::vector<Level> levels) const {
  NESTOR_ASSIGN_OR_RETURN(std::unique_ptr<NestedModel> model, NestedModel::Open(partial_));
  NESTOR_RETURN_IF_ERROR(model->SetLevels(std::move(levels)));
  return model;
}

absl::StatusOr<std::unique_ptr<Engine>> Compression::OpenParts(std::vector<Level> levels) const {
  NESTOR_ASSIGN_OR_RETURN(std::unique_ptr<NestedModel> model, OpenModel(std::move(levels)));
  return OpenEngine(std::move(model), options_.make_backend, kWindowTokens);
}

absl::StatusOr<std::unique_ptr<Engine>> Compression::OpenToCompare(
    std::unique_ptr<NestedModel> model) const {
  model->SetFloatActivations(std::vector<bool>(source_->layers().size(), true));
  return OpenEngine(std::move(model), options_.make_backend, kWindowTokens);
}

absl::Status Compression::RefitPrefix(const std::vector<Level>& levels) {
  RefitOptions options;
  std::vector<int> prefix_levels;
  for (size_t i = 0; i < levels.size(); ++i) {
    if (levels[i].ladder == "prefix" || levels[i].ladder == "mixed") {
      prefix_levels.push_back(static_cast<int>(i));
    }
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
    options.ranks.push_back(
        is_refitted ? PrefixRanks(layers[i].out, layers[i].in, may_be_gar()).back() : 0);
  }
  NESTOR_ASSIGN_OR_RETURN(std::unique_ptr<NestedModel> model, OpenModel(levels));
  NESTOR_RETURN_IF_ERROR(RefitFactors(
      std::move(model), *source_, CalibrationText(refit_tokens(), kWindowTokens), options,
      options_.make_backend, [&](const RefittedLayer& refitted) {
        const size_t layer = refitted.layer;
        NESTOR_RETURN_IF_ERROR(ReplacePrefix(layers[layer], refitted.factors, spill_.get()));
        return FitGarPairs(layer, GarRanksOf(levels, layer), [&](int64_t rank) {
          return FitGar(refitted.decomposition, refitted.weights, layers[layer].out,
                        layers[layer].in, refitted.moment, rank);
        });
      }));
  return WriteParts(levels);
}

FormAndRank Compression::FinalChoice(size_t level, size_t layer, FormAndRank choice) const {
  if (choice.form != Form::kPrefix || !runs_gar_[level]) return choice;
  const LinearSpec& spec = source_->layers()[layer];
  return CheapestPrefix(spec.out, spec.in, choice.rank, /*may_be_gar=*/true);
}

std::set<int64_t> Compression::GarRanksOf(const std::vector<Level>& levels, size_t layer) const {
  std::set<int64_t> ranks;
  if (is_to_train()) return ranks;
  for (size_t i = 0; i < levels.size(); ++i) {
    const auto [form, rank] = FinalChoice(i, layer, levels[i].profile[layer]);
    if (form == Form::kGar) ranks.insert(rank);
  }
  return ranks;
}

absl::Status Compression::FitGarPairs(size_t layer, const std::set<int64_t>& ranks,
                                      const GarFitter& fitter) {
  const LinearSpec& spec = source_->layers()[layer];
  is_gar_done_[layer] = 1;
  for (const int64_t rank : ranks) {
    NESTOR_ASSIGN_OR_RETURN(const GarFit fit, fitter(rank));
    if (fit.error <= kLargestGarError * fit.plain_error) {
      gar_ranks_[layer].insert(rank);
      NESTOR_RETURN_IF_ERROR(AddGar(spec, fit.pair, spill_.get()));
      continue;
    }
    const auto flops = [&](FormAndRank choice) {
      return CostOf(spec, choice, RankObjective::kFlops);
    };
    const bool pays = flops({Form::kPrefix, rank}) < flops({});
    gar_substitutes_[layer][rank] = pays ? Form::kPrefix : Form::kDense;
    // So are larger ones, which must be nested.
    if (!pays) break;
  }
  return absl::OkStatus();
}

absl::Status Compression::FitOtherGarPairs(const std::vector<Level>& levels) {
  return ForEachLayer("Fitting gar pairs", [&](size_t layer) -> absl::Status {
    const std::set<int64_t> ranks = GarRanksOf(levels, layer);
    if (is_gar_done_[layer] != 0 || ranks.empty()) return absl::OkStatus();
    const LinearSpec& spec = source_->layers()[layer];
    NESTOR_ASSIGN_OR_RETURN(const std::vector<double> moment,
                            calibration_->Moment(inputs_.input_of_layer[layer]));
    NESTOR_ASSIGN_OR_RETURN(const std::vector<float> weights, source_->SourceWeight(layer));
    if (has_term(layer)) {
      NESTOR_ASSIGN_OR_RETURN(const FactorPair factors, ReadPrefix(spec, *spill_));
      return FitGarPairs(layer, ranks, [&](int64_t rank) {
        return FitGarToFactors(factors, weights, spec.out, spec.in, moment, rank);
      });
    }
    NESTOR_ASSIGN_OR_RETURN(const Decomposition decomposition,
                            Decompose(weights, spec.out, spec.in, moment, *ranks.rbegin()));
    return FitGarPairs(layer, ranks, [&](int64_t rank) {
      return FitGar(decomposition, weights, spec.out, spec.in, moment, rank);
    });
  });
}

absl::Status Compression::RunGarPairs(std::vector<Level>* levels) {
  NESTOR_RETURN_IF_ERROR(FitOtherGarPairs(*levels));
  for (size_t layer = 0; layer < source_->layers().size(); ++layer) {
    bool is_dense = false;  // from the level on that could run neither form of its rank
    for (size_t i = 0; i < levels->size(); ++i) {
      Level& level = (*levels)[i];
      const FormAndRank choice = FinalChoice(i, layer, level.profile[layer]);
      if (level.profile[layer].form != Form::kPrefix) continue;
      const auto substitute = gar_substitutes_[layer].find(choice.rank);
      if (choice.form != Form::kGar || gar_ranks_[layer].contains(choice.rank)) {
        level.profile[layer] = choice;
      } else if (substitute != gar_substitutes_[layer].end()) {
        is_dense = is_dense || substitute->second == Form::kDense;
      }
      if (is_dense) level.profile[layer] = {};
      if (!report_.search.empty()) report_.search[i].profile = level.profile;
    }
  }
  return WriteParts(*levels);
}

void Compression::ReportGarPairs() {
  int64_t num_substitutes = 0;
  for (size_t layer = 0; layer < source_->layers().size(); ++layer) {
    const LinearSpec& spec = source_->layers()[layer];
    for (const int64_t rank : stored_ranks_.gar[layer]) {
      ++report_.gar_pairs;
      report_.gar_bytes +=
          CostOfLinear(spec.out, spec.in, /*has_bias=*/false, options_.dense, Form::kGar, rank)
              .weight_bytes;
    }
    num_substitutes += std::ssize(gar_substitutes_[layer]);
  }
  if (report_.gar_pairs > 0) {
    report_.notes.push_back(absl::StrFormat("%d gar pairs take %.2f MB", report_.gar_pairs,
                                            1e-6 * static_cast<double>(report_.gar_bytes)));
  }
  if (num_substitutes == 0) return;
  report_.notes.push_back(absl::StrFormat(
      "%d gar pairs would have lost more than %.2f of what plain factors do: those stay plain, or "
      "dense above break-even, and their levels cost more",
      num_substitutes, kLargestGarError));
}

absl::Status Compression::ChooseActivations(const std::vector<Level>& levels) {
  if (options_.activations != Activations::kAuto) return absl::OkStatus();
  const auto open_model = [&] { return OpenModel(levels); };
  const bool is_encoder = source_->spec().is_encoder();
  const int64_t tokens = is_encoder ? kEncoderActivationTokens : kLanguageModelActivationTokens;
  ActivationProbe probe(open_model, options_.make_backend, TextToMeasure(tokens), is_encoder);
  ActivationProbe rough_probe(open_model, options_.make_backend,
                              TextToMeasure(tokens / kRoughActivationShare), is_encoder);
  const std::vector<LinearSpec>& layers = source_->layers();
  NESTOR_ASSIGN_OR_RETURN(
      const ActivationChoice choice,
      nestor::ChooseActivations(
          layers, [&](const std::vector<bool>& is_float) { return probe.Loss(is_float); },
          [&](const std::vector<bool>& is_float) { return rough_probe.Loss(is_float); }));
  if (choice.loss == choice.int8_loss) {
    report_.notes.push_back(
        absl::StrFormat("int8 activations cost %.2f %%", 100 * choice.int8_loss));
    return absl::OkStatus();
  }
  report_.notes.push_back(absl::StrFormat(
      "int8 activations would cost %.2f %%: with floats for %s they cost %.2f %%",
      100 * choice.int8_loss, FloatLayers(layers, choice.is_float), 100 * choice.loss));
  float_activations_ = choice.is_float;
  return WriteDescription(nullptr);
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
    NESTOR_RETURN_IF_ERROR(WeightErrors());
    NESTOR_ASSIGN_OR_RETURN(std::vector<Level> levels, ChooseLevels());
    NESTOR_RETURN_IF_ERROR(WriteParts(levels));
    if (is_measured()) NESTOR_RETURN_IF_ERROR(CompareLosses(levels));
    if (refit_tokens() > 0) NESTOR_RETURN_IF_ERROR(RefitPrefix(levels));
    if (applies_delta()) {
      NESTOR_RETURN_IF_ERROR(ApplyDelta(*delta_, source_->layers(), spill_.get()));
      if (!may_be_gar()) NESTOR_RETURN_IF_ERROR(WriteParts(levels));
    } else if (delta_.has_value()) {
      report_.notes.push_back(
          "an artifact to train: the delta's levels without what it trained, which consolidate "
          "--start puts there");
    }
    const bool makes_pairs = may_be_gar() && !is_to_train();
    if (makes_pairs) NESTOR_RETURN_IF_ERROR(RunGarPairs(&levels));
    NESTOR_RETURN_IF_ERROR(ChooseActivations(levels));
    NESTOR_ASSIGN_OR_RETURN(const std::vector<Level> measured, MeasureLevels(levels));
    // What trains is not judged by what it is before.
    report_.levels = is_to_train() ? measured : WithoutInversions(measured, &report_.notes);
    KeepSearched(report_.levels, &report_.search);
    if (report_.levels.size() < measured.size()) {
      NESTOR_RETURN_IF_ERROR(WriteParts(report_.levels));
    }
    spill_.reset();
    if (makes_pairs) ReportGarPairs();
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

std::vector<double> EvenTargets(int count, double cheapest) {
  std::vector<double> targets;
  for (int i = 0; i < count; ++i) targets.push_back(cheapest + (1 - cheapest) * i / count);
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
