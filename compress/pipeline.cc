#include "compress/pipeline.h"

#include <algorithm>
#include <filesystem>
#include <iterator>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/checksum.h"
#include "base/file.h"
#include "base/progress.h"
#include "base/status_macros.h"
#include "compress/activations.h"
#include "compress/calibrate.h"
#include "compress/delta.h"
#include "compress/divergence.h"
#include "compress/evaluate.h"
#include "compress/export.h"
#include "compress/for_each_layer.h"
#include "compress/gar.h"
#include "compress/gar_pairs.h"
#include "compress/layer.h"
#include "compress/layer_times.h"
#include "compress/level_chooser.h"
#include "compress/probe.h"
#include "compress/rank_search.h"
#include "compress/refit.h"
#include "compress/self_sample.h"
#include "compress/sensitivity.h"
#include "engine/interpolate.h"

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
// A model that does not bear int8 takes a dozen passes, which may be rough ones.
constexpr int64_t kRoughActivationShare = 4;

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
  absl::Status OpenSource();
  // Takes what the delta's factors were calibrated on in place of the text.
  void CalibrateAsDelta();
  absl::Status Calibrate();
  absl::Status CompressLayers();
  absl::Status CompressOneLayer(size_t layer);
  absl::Status WeightErrors();
  absl::Status WeightBySensitivity(LadderPlan* ladder);
  absl::Status ProbeLayers();
  TokenSequences ProbeText() const;
  // What nested.json says of it.
  Json CalibrationOrigin() const;
  absl::StatusOr<std::vector<Level>> ChooseLevels();
  // What the layers of `profile` take, as an absolute and a relative time. REQUIRES: a measured
  // search.
  void SetTime(const Profile& profile, SearchedLevel* level) const;
  absl::Status CompareLosses(const std::vector<Level>& levels);
  absl::Status RefitPrefix(const std::vector<Level>& levels);
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
  absl::Status AddExtraLevels(std::vector<Level>* levels);
  absl::Status ChooseActivations(const std::vector<Level>& levels);
  absl::StatusOr<std::vector<Level>> MeasureLevels(std::vector<Level> levels);
  absl::Status WriteDescription(const std::vector<Level>* levels) const;

  // A delta that is to train further gives its levels and calibration alone.
  bool applies_delta() const { return delta_.has_value() && !options_.is_to_train(); }
  // Whether terms may be trained beside the prefix factors: plain ones that nothing but the
  // calibration decides.
  bool takes_terms() const {
    return options_.has_prefix() && (!options_.may_be_gar() || options_.is_to_train()) &&
           options_.tokens_to_refit_on() == 0 && !applies_delta();
  }
  bool has_calibrated_delta() const { return delta_.has_value() && !delta_->calibration.empty(); }
  bool has_term(size_t layer) const {
    return delta_.has_value() && delta_->terms[layer].a.rank > 0;
  }

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
  std::unique_ptr<GarPairs> gar_pairs_;
  std::unique_ptr<LevelChooser> chooser_;
  std::vector<LadderPlan> ladders_;
  size_t text_sequences_ = 0;  // of corpus_.calibration; sampled ones follow
  std::vector<Json> spectra_;  // by layer
  StoredRanks stored_ranks_;
  std::vector<bool> float_activations_;  // by layer
  std::map<std::string, std::string> checksums_;
  CompressReport report_;
};

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
    NESTOR_RETURN_IF_ERROR(CheckGarLevels(options_, std::ssize(delta_->profiles)));
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
    NESTOR_RETURN_IF_ERROR(CheckProbeTokens(options_, has_calibrated_delta()
                                                          ? CountTokens(corpus_.calibration)
                                                          : options_.corpus.calibration_tokens));
  }
  text_sequences_ = corpus_.calibration.size();
  chooser_ = std::make_unique<LevelChooser>(options_, *source_);
  ladders_ = chooser_->Ladders(delta_.has_value() ? &*delta_ : nullptr);
  for (const LadderPlan& ladder : ladders_) {
    // What takes how long is known later.
    if (ladder.objective == RankObjective::kTime) continue;
    NESTOR_RETURN_IF_ERROR(chooser_->CheckCosts(ladder));
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
                               .has_residual_ladder = options_.has_residual(),
                               .has_prefix_ladder = options_.has_prefix(),
                               .max_residual_rank = spec.role == LinearRole::kHead
                                                        ? options_.max_head_residual_rank
                                                        : options_.max_residual_rank,
                               .may_be_gar = options_.may_be_gar()};
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
  gar_pairs_ = std::make_unique<GarPairs>(source_->layers(), options_.dense);
  spectra_.resize(source_->layers().size());
  NESTOR_RETURN_IF_ERROR(ForEachLayer(source_->layers(), options_.threads, "Decomposing",
                                      [this](size_t layer) { return CompressOneLayer(layer); }));
  NESTOR_RETURN_IF_ERROR(
      WriteFileAtomically(partial_ + "/spectra.json", Json{{"layers", spectra_}}.dump()));
  return AddOtherTensors(*source_, spill_.get());
}

absl::Status Compression::WeightErrors() {
  if (options_.is_measured()) return ProbeLayers();
  for (LadderPlan& ladder : ladders_) {
    if (ladder.delta != nullptr) continue;
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
    if (ladder.delta == nullptr) {
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
  NESTOR_ASSIGN_OR_RETURN(LayerTimes times,
                          LayerTimes::Measure(*model, options_.make_backend, options_.search.rows));
  chooser_->SetTimes(std::move(times));

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
    if (ladder.delta == nullptr) ErrorsFromProbes(probes, &ladder.options);
  }
  return absl::OkStatus();
}

Json Compression::CalibrationOrigin() const {
  return {{"text_sha256", corpus_.calibration_sha256},
          {"tokens", report_.calibration_tokens},
          {"self_sampled_tokens", self_sample_tokens_},
          {"refit_tokens", options_.has_prefix() ? options_.tokens_to_refit_on() : 0}};
}

absl::StatusOr<std::vector<Level>> Compression::ChooseLevels() {
  std::vector<Level> levels;
  std::vector<bool> may_be_gar;  // by level
  const auto add = [&](const std::string& ladder, const ChosenLevel& chosen) {
    Level& level = levels.emplace_back();
    level.ladder = ladder;
    level.profile = chosen.profile;
    may_be_gar.push_back(chosen.may_be_gar);
    if (options_.is_measured()) report_.search.push_back({.profile = chosen.profile});
  };
  for (const LadderPlan& ladder : ladders_) {
    NESTOR_ASSIGN_OR_RETURN(const std::vector<ChosenLevel> chosen,
                            chooser_->Choose(ladder, &report_.notes));
    for (const ChosenLevel& each : chosen) {
      add(ladder.name, each);
      if (!options_.is_measured() || ladder.delta != nullptr) continue;
      report_.search.back().predicted_loss = ErrorOfProfile(ladder.options, each.profile);
    }
  }
  add("full", {.profile = Profile(source_->layers().size())});
  if (options_.is_measured()) {
    report_.search.back().predicted_loss = 0;
    report_.search.back().measured_loss = 0;
  }
  gar_pairs_->SetMayBeGar(std::move(may_be_gar));
  return levels;
}

void Compression::SetTime(const Profile& profile, SearchedLevel* level) const {
  const auto time_of = [&](const Profile& any) {
    return static_cast<double>(chooser_->times().OfProfile(source_->layers(), any));
  };
  level->seconds = 1e-9 * time_of(profile);
  level->relative_time = time_of(profile) / time_of(Profile(profile.size()));
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
  NESTOR_ASSIGN_OR_RETURN(const Outputs whole, OutputsAt(engine.get(), sequences, full, &progress));
  for (int i = 0; i <= full; ++i) {
    SearchedLevel& searched = report_.search[static_cast<size_t>(i)];
    Profile profile = searched.profile;
    for (size_t layer = 0; layer < profile.size(); ++layer) {
      profile[layer] = gar_pairs_->WantedChoice(static_cast<size_t>(i), layer, profile[layer]);
    }
    SetTime(profile, &searched);
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
      checksums_,
      spill_->WriteTensors(partial_ + "/nested.safetensors",
                           KeptRows(source_->layers(), stored_ranks_, gar_pairs_->fitted_ranks())));
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
      {"planes", is_int8                   ? Json({4, 4})
                 : options_.has_residual() ? Json::array({4})
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
        is_refitted ? PrefixRanks(layers[i].out, layers[i].in, options_.may_be_gar()).back() : 0);
  }
  NESTOR_ASSIGN_OR_RETURN(std::unique_ptr<NestedModel> model, OpenModel(levels));
  NESTOR_RETURN_IF_ERROR(RefitFactors(
      std::move(model), *source_, CalibrationText(options_.tokens_to_refit_on(), kWindowTokens),
      options, options_.make_backend, [&](const RefittedLayer& refitted) {
        const size_t layer = refitted.layer;
        NESTOR_RETURN_IF_ERROR(ReplacePrefix(layers[layer], refitted.factors, spill_.get()));
        // What is to train has no pairs yet.
        const std::set<int64_t> ranks =
            options_.is_to_train() ? std::set<int64_t>{} : gar_pairs_->WantedRanks(levels, layer);
        const auto fit = [&](int64_t rank) {
          return FitGar(refitted.decomposition, refitted.weights, layers[layer].out,
                        layers[layer].in, refitted.moment, rank);
        };
        return gar_pairs_->Fit(layer, ranks, fit, spill_.get());
      }));
  return WriteParts(levels);
}

absl::Status Compression::FitOtherGarPairs(const std::vector<Level>& levels) {
  return ForEachLayer(
      source_->layers(), options_.threads, "Fitting gar pairs", [&](size_t layer) -> absl::Status {
        const std::set<int64_t> ranks = gar_pairs_->WantedRanks(levels, layer);
        if (gar_pairs_->is_settled(layer) || ranks.empty()) return absl::OkStatus();
        const LinearSpec& spec = source_->layers()[layer];
        NESTOR_ASSIGN_OR_RETURN(const std::vector<double> moment,
                                calibration_->Moment(inputs_.input_of_layer[layer]));
        NESTOR_ASSIGN_OR_RETURN(const std::vector<float> weights, source_->SourceWeight(layer));
        if (has_term(layer)) {
          NESTOR_ASSIGN_OR_RETURN(const FactorPair factors, ReadPrefix(spec, *spill_));
          const auto fit = [&](int64_t rank) {
            return FitGarToFactors(factors, weights, spec.out, spec.in, moment, rank);
          };
          return gar_pairs_->Fit(layer, ranks, fit, spill_.get());
        }
        NESTOR_ASSIGN_OR_RETURN(const Decomposition decomposition,
                                Decompose(weights, spec.out, spec.in, moment, *ranks.rbegin()));
        const auto fit = [&](int64_t rank) {
          return FitGar(decomposition, weights, spec.out, spec.in, moment, rank);
        };
        return gar_pairs_->Fit(layer, ranks, fit, spill_.get());
      });
}

absl::Status Compression::RunGarPairs(std::vector<Level>* levels) {
  NESTOR_RETURN_IF_ERROR(FitOtherGarPairs(*levels));
  gar_pairs_->Apply(levels);
  for (size_t i = 0; i < report_.search.size(); ++i) {
    report_.search[i].profile = (*levels)[i].profile;
  }
  return WriteParts(*levels);
}

void Compression::ReportGarPairs() {
  for (size_t layer = 0; layer < source_->layers().size(); ++layer) {
    const LinearSpec& spec = source_->layers()[layer];
    for (const int64_t rank : stored_ranks_.gar[layer]) {
      ++report_.gar_pairs;
      report_.gar_bytes +=
          CostOfLinear(spec.out, spec.in, /*has_bias=*/false, options_.dense, Form::kGar, rank)
              .weight_bytes;
    }
  }
  if (report_.gar_pairs > 0) {
    report_.notes.push_back(absl::StrFormat("%d gar pairs take %.2f MB", report_.gar_pairs,
                                            1e-6 * static_cast<double>(report_.gar_bytes)));
  }
  const int64_t num_substitutes = gar_pairs_->num_substitutes();
  if (num_substitutes == 0) return;
  report_.notes.push_back(absl::StrFormat(
      "%d gar pairs would have lost more than %.2f of what plain factors do: those stay plain, or "
      "dense above break-even, and their levels cost more",
      num_substitutes, GarPairs::kLargestError));
}

absl::Status Compression::AddExtraLevels(std::vector<Level>* levels) {
  if (options_.extra_costs.empty()) return absl::OkStatus();
  NESTOR_ASSIGN_OR_RETURN(const std::unique_ptr<NestedModel> model, OpenModel(*levels));
  std::vector<WantedLevel> wanted = options_.extra_costs;
  // Each is made between those before it, as nestord makes them.
  std::sort(wanted.begin(), wanted.end(),
            [](const WantedLevel& a, const WantedLevel& b) { return a.cost < b.cost; });
  for (const WantedLevel& each : wanted) {
    absl::StatusOr<std::vector<Level>> extended = WithInterpolatedLevels(*model, {each});
    if (extended.ok()) {
      NESTOR_RETURN_IF_ERROR(model->SetLevels(*std::move(extended)));
    } else {
      report_.notes.push_back(
          absl::StrCat("left out the extra cost ", extended.status().message()));
    }
  }
  *levels = model->levels();
  for (size_t i = 0; i < levels->size(); ++i) {
    Level& level = (*levels)[i];
    if (!level.is_interpolated) continue;
    level.is_interpolated = false;  // it will be measured
    if (!options_.is_measured()) continue;
    const auto added = report_.search.insert(report_.search.begin() + static_cast<ptrdiff_t>(i),
                                             SearchedLevel{.profile = level.profile});
    SetTime(level.profile, &*added);
  }
  return absl::OkStatus();
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
  NESTOR_RETURN_IF_ERROR(CheckOptions(options_));
  std::error_code error;
  if (fs::exists(output_, error) && !options_.overwrites) {
    return absl::AlreadyExistsError(absl::StrCat(output_, ": exists already"));
  }
  NESTOR_RETURN_IF_ERROR(OpenSource());
  NESTOR_RETURN_IF_ERROR(Calibrate());
  const absl::Status written = [&]() -> absl::Status {
    NESTOR_RETURN_IF_ERROR(CompressLayers());
    NESTOR_RETURN_IF_ERROR(WeightErrors());
    NESTOR_ASSIGN_OR_RETURN(std::vector<Level> levels, ChooseLevels());
    NESTOR_RETURN_IF_ERROR(WriteParts(levels));
    if (options_.is_measured()) NESTOR_RETURN_IF_ERROR(CompareLosses(levels));
    if (options_.tokens_to_refit_on() > 0) NESTOR_RETURN_IF_ERROR(RefitPrefix(levels));
    if (applies_delta()) {
      NESTOR_RETURN_IF_ERROR(ApplyDelta(*delta_, source_->layers(), spill_.get()));
      if (!options_.may_be_gar()) NESTOR_RETURN_IF_ERROR(WriteParts(levels));
    } else if (delta_.has_value()) {
      report_.notes.push_back(
          "an artifact to train: the delta's levels without what it trained, which consolidate "
          "--start puts there");
    }
    const bool makes_pairs = options_.may_be_gar() && !options_.is_to_train();
    if (makes_pairs) NESTOR_RETURN_IF_ERROR(RunGarPairs(&levels));
    NESTOR_RETURN_IF_ERROR(AddExtraLevels(&levels));
    NESTOR_RETURN_IF_ERROR(ChooseActivations(levels));
    NESTOR_ASSIGN_OR_RETURN(const std::vector<Level> measured, MeasureLevels(levels));
    // What trains is not judged by what it is before.
    report_.levels =
        options_.is_to_train() ? measured : WithoutInversions(measured, &report_.notes);
    KeepSearched(report_.levels, &report_.search);
    if (report_.levels.size() < measured.size()) {
      NESTOR_RETURN_IF_ERROR(WriteParts(report_.levels));
    }
    spill_.reset();
    if (makes_pairs) ReportGarPairs();
    NESTOR_RETURN_IF_ERROR(WriteDescription(&report_.levels));
    return CommitDirectory(partial_, output_, options_.overwrites);
  }();
  if (!written.ok()) {
    spill_.reset();
    fs::remove_all(partial_, error);
    return written;
  }
  fs::remove_all(calibration_directory_, error);
  return report_;
}

}  // namespace

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
