#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/file.h"
#include "base/progress.h"
#include "base/status_macros.h"
#include "compress/evaluate.h"
#include "compress/forward.h"
#include "compress/labelled_texts.h"
#include "compress/report.h"
#include "engine/interpolate.h"
#include "kernels/cpu/cpu_backend.h"
#include "nestor/command.h"
#include "nestor/draw_report.h"
#include "nestor/flags.h"

namespace nestor {
namespace {

constexpr int64_t kMaxSweep = 1000;

struct EvaluateOptions {
  std::string model;
  std::optional<std::string> text;
  std::optional<std::string> pairs;
  std::optional<std::string> labels;
  std::optional<std::string> source;
  std::optional<std::string> report;
  int64_t tokens = 0;
  int64_t sweep = 0;  // costs of each ladder; 0: its own levels only
  bool prints_json = false;
};

absl::StatusOr<std::unique_ptr<Engine>> OpenEngineOn(std::unique_ptr<NestedModel> model) {
  return OpenEngine(
      std::move(model), [] { return MakeCpuBackend({}); }, kWindowTokens);
}

// Puts a level before the others that is the coarse plane alone, unless there is one; a report
// shows it beside them. False where there is no coarse plane, or a level is that already.
absl::StatusOr<bool> AddCoarseLevel(NestedModel* model) {
  const Profile coarse(model->layers().size(), {Form::kResidual, 0});
  const nlohmann::json& description = model->description();
  if (!description.is_object() || description.value("planes", nlohmann::json()).empty()) {
    return false;
  }
  std::vector<Level> levels = model->levels();
  for (const Level& level : levels) {
    if (level.profile == coarse) return false;
  }
  levels.insert(levels.begin(), Level{.ladder = "residual", .profile = coarse});
  NESTOR_RETURN_IF_ERROR(model->SetLevels(std::move(levels)));
  return true;
}

absl::StatusOr<EvaluationSet> ReadSet(const EvaluateOptions& options, const Engine& engine) {
  const ModelSpec& spec = engine.model().spec();
  if (options.pairs.has_value()) {
    if (!spec.is_encoder() || spec.is_classifier()) {
      return UsageError(absl::StrCat(
          "--pairs: ", options.model, " is ",
          spec.is_encoder() ? "a classifier; give --labels or --text" : "no encoder; give --text"));
    }
    return ReadLabelledPairs(*options.pairs, engine.tokenizer(), spec);
  }
  if (options.labels.has_value()) {
    if (!spec.is_classifier()) {
      return UsageError(absl::StrCat("--labels: ", options.model, " is no classifier"));
    }
    return ReadLabelledTexts(*options.labels, engine.tokenizer(), spec);
  }
  if (!options.text.has_value()) {
    return UsageError("give --text, --pairs for an encoder, or --labels for a classifier");
  }
  NESTOR_ASSIGN_OR_RETURN(const std::string text, ReadFile(*options.text));
  NESTOR_ASSIGN_OR_RETURN(TokenSequences sequences,
                          SequencesOf(text, engine.tokenizer(), spec, options.tokens));
  const bool makes_pairs = spec.is_encoder() && !spec.is_classifier();
  const size_t needed = makes_pairs ? 3 : 1;  // lines, so that there are two pairs; windows
  if (sequences.size() < needed) {
    return absl::InvalidArgumentError(absl::StrCat(
        *options.text, ": too short: ", CountTokens(sequences), " tokens in ", sequences.size(),
        spec.is_encoder() ? " lines" : " windows", ", at least ", needed, " are needed"));
  }
  if (makes_pairs) return SplicedPairs(sequences);
  return EvaluationSet{.sequences = std::move(sequences), .pairs = {}, .labels = {}};
}

absl::Status Print(const EvaluateOptions& options, const EvaluationSet& set,
                   const std::vector<Level>& levels) {
  if (!options.prints_json) {
    absl::PrintF("%s", options.sweep > 0 ? SweepTable(levels) : LevelTable(levels));
    return absl::OkStatus();
  }
  nlohmann::json json = {
      {"model", options.model}, {"tokens", MeasuredTokens(set)}, {"levels", LevelReport(levels)}};
  if (!set.pairs.empty()) json["pairs"] = set.pairs.size();
  if (!set.classes.empty()) json["texts"] = set.classes.size();
  absl::PrintF("%s\n", json.dump(2));
  return absl::OkStatus();
}

}  // namespace

absl::Status RunEvaluate(const std::vector<std::string>& arguments) {
  EvaluateOptions options;
  Flags flags("nestor evaluate MODEL --text FILE [flags]",
              "nestor evaluate models/smollm2-135m-instruct.nested --text held_out.txt "
              "--tokens 16384");
  flags.Add(
      "text", &options.text,
      "text, UTF-8; of an encoder each line is paired with the next one; of a classifier each "
      "line's label is compared with the full level's");
  flags.Add("pairs", &options.pairs,
            "labelled sentence pairs in STS-B's tab-separated format, for an encoder");
  flags.Add("labels", &options.labels,
            "texts with labels, for a classifier: text,label or text,text2,label in a .csv, with "
            "tabs in a .tsv; measures accuracy");
  flags.Add("tokens", &options.tokens, "tokens of --text to read; 0 is all");
  flags.Add("source", &options.source,
            "the checkpoint that MODEL was made from: adds quality_vs_source");
  flags.Add(
      "sweep", &options.sweep,
      "measures levels at so many costs of each ladder, in equal steps from its cheapest level "
      "to the full one, interpolated between the stored ones");
  flags.Add(
      "report", &options.report,
      "a directory to write report.json to, and report.html with pictures where a Python with "
      "matplotlib is found; measures the coarse plane alone as well");
  flags.Add("json", &options.prints_json, "print one JSON object");
  NESTOR_ASSIGN_OR_RETURN(const std::vector<std::string> positional, flags.Parse(arguments));
  if (positional.size() != 1) {
    return UsageError("expected one argument, an artifact or a Hugging Face directory");
  }
  if (options.tokens < 0) {
    return UsageError(absl::StrCat("--tokens: must not be negative; was ", options.tokens));
  }
  if (options.sweep < 0 || options.sweep > kMaxSweep) {
    return UsageError(absl::StrCat("--sweep: expected 0 to ", kMaxSweep, "; was ", options.sweep));
  }
  options.model = positional[0];

  NESTOR_ASSIGN_OR_RETURN(std::unique_ptr<NestedModel> model, NestedModel::Open(options.model));
  if (options.sweep > 0) {
    NESTOR_ASSIGN_OR_RETURN(std::vector<Level> swept,
                            WithSweptLevels(*model, static_cast<int>(options.sweep)));
    NESTOR_RETURN_IF_ERROR(model->SetLevels(std::move(swept)));
  }
  bool has_coarse_level = false;
  if (options.report.has_value()) {
    NESTOR_ASSIGN_OR_RETURN(has_coarse_level, AddCoarseLevel(model.get()));
  }
  NESTOR_ASSIGN_OR_RETURN(std::unique_ptr<Engine> engine, OpenEngineOn(std::move(model)));
  NESTOR_ASSIGN_OR_RETURN(const EvaluationSet set, ReadSet(options, *engine));
  std::optional<Measurement> source;
  if (options.source.has_value()) {
    NESTOR_ASSIGN_OR_RETURN(std::unique_ptr<NestedModel> checkpoint,
                            NestedModel::Open(*options.source));
    NESTOR_ASSIGN_OR_RETURN(const std::unique_ptr<Engine> source_engine,
                            OpenEngineOn(std::move(checkpoint)));
    const int full = static_cast<int>(source_engine->model().levels().size()) - 1;
    Progress progress("Evaluating the source", MeasuredTokens(set));
    NESTOR_ASSIGN_OR_RETURN(source, Measure(source_engine.get(), full, set, &progress));
  }
  NESTOR_ASSIGN_OR_RETURN(
      const std::vector<LevelMetrics> metrics,
      EvaluateLevels(engine.get(), set, source.has_value() ? &*source : nullptr));
  MeasuredModel measured{
      .title = (std::filesystem::path(options.model) / "").parent_path().filename().string(),
      .levels = engine->model().levels(),
      .coarse = std::nullopt,
      .tokens = MeasuredTokens(set),
      .pairs = std::ssize(set.pairs),
      .has_labels = !set.labels.empty() || !set.classes.empty()};
  for (size_t i = 0; i < metrics.size(); ++i) measured.levels[i].metrics = metrics[i];
  if (has_coarse_level) {
    measured.coarse = measured.levels.front();
    measured.levels.erase(measured.levels.begin());
  }
  if (options.report.has_value()) {
    NESTOR_RETURN_IF_ERROR(WriteReport(FigureReport(engine->model(), measured), *options.report));
  }
  return Print(options, set, measured.levels);
}

}  // namespace nestor
