#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "base/status_macros.h"
#include "compress/pipeline.h"
#include "compress/report.h"
#include "engine/interpolate.h"
#include "kernels/cpu/cpu_backend.h"
#include "nestor/command.h"
#include "nestor/draw_report.h"
#include "nestor/flags.h"

namespace nestor {
namespace {

absl::StatusOr<LadderChoice> ParseLadder(const std::string& name) {
  if (name == "residual") return LadderChoice::kResidual;
  if (name == "prefix") return LadderChoice::kPrefix;
  if (name == "both") return LadderChoice::kBoth;
  if (name == "mixed") return LadderChoice::kMixed;
  return UsageError(
      absl::StrCat("--ladder: expected residual, prefix, both or mixed; was \"", name, "\""));
}

absl::StatusOr<std::optional<RankSearch>> ParseSearch(const std::string& name) {
  if (name.empty()) return std::nullopt;
  if (name == "even") return RankSearch::kEven;
  if (name == "energy") return RankSearch::kEnergy;
  if (name == "sensitivity") return RankSearch::kSensitivity;
  if (name == "measured") return RankSearch::kMeasured;
  return UsageError(
      absl::StrCat("--search: expected even, energy, sensitivity or measured; was \"", name, "\""));
}

absl::StatusOr<std::optional<RankObjective>> ParseObjective(const std::string& name) {
  if (name.empty()) return std::nullopt;
  if (name == "bytes") return RankObjective::kBytes;
  if (name == "flops") return RankObjective::kFlops;
  if (name == "time") return RankObjective::kTime;
  return UsageError(absl::StrCat("--objective: expected bytes, flops or time; was \"", name, "\""));
}

absl::StatusOr<std::vector<double>> ParseCosts(const std::string& list) {
  std::vector<double> costs;
  for (const absl::string_view item : absl::StrSplit(list, ',', absl::SkipEmpty())) {
    double cost = 0;
    if (!absl::SimpleAtod(item, &cost)) {
      return UsageError(absl::StrCat("--costs: expected numbers and commas; was \"", list, "\""));
    }
    costs.push_back(cost);
  }
  return costs;
}

absl::StatusOr<std::optional<std::vector<int>>> ParseGarLevels(const std::string& list) {
  if (list == "all") return std::nullopt;
  std::vector<int> levels;
  if (list == "none") return levels;
  for (const absl::string_view item : absl::StrSplit(list, ',')) {
    int level = 0;
    if (!absl::SimpleAtoi(item, &level)) {
      return UsageError(absl::StrCat(
          "--gar-levels: expected all, none, later, or numbers and commas; was \"", list, "\""));
    }
    levels.push_back(level);
  }
  return levels;
}

absl::StatusOr<DenseStorage> ParseDtype(const std::string& name) {
  if (name == "int8") return DenseStorage::kPlanes;
  if (name == "bf16") return DenseStorage::kBf16;
  return UsageError(absl::StrCat("--dtype: expected int8 or bf16; was \"", name, "\""));
}

absl::StatusOr<Activations> ParseActivations(const std::string& name) {
  if (name == "auto") return Activations::kAuto;
  if (name == "int8") return Activations::kInt8;
  if (name == "float") return Activations::kFloat;
  return UsageError(
      absl::StrCat("--activations: expected auto, int8 or float; was \"", name, "\""));
}

absl::Status Draw(const CompressOptions& options, const CompressReport& report) {
  NESTOR_ASSIGN_OR_RETURN(const std::unique_ptr<NestedModel> model,
                          NestedModel::Open(options.output));
  const std::filesystem::path output = (std::filesystem::path(options.output) / "").parent_path();
  const MeasuredModel measured{.title = output.filename().string(),
                               .levels = report.levels,
                               .coarse = std::nullopt,
                               .tokens = report.evaluation_tokens};
  return WriteReport(FigureReport(*model, measured), output.string() + ".report");
}

}  // namespace

absl::Status RunCompress(const std::vector<std::string>& arguments) {
  CompressOptions options;
  options.corpus.calibration_tokens = 12288;
  std::string ladder = "residual";
  std::string dtype = "int8";
  std::string search, objective, costs;
  std::string activations = "auto";
  std::string gar_levels;
  std::vector<std::string> extra_costs;
  int64_t levels = options.levels;
  bool prints_json = false;
  bool draws_report = true;
  Flags flags("nestor compress HF_DIR OUT --calibration FILE [flags]",
              "nestor compress models/smollm2-135m-instruct models/smollm2-135m-instruct.nested "
              "--calibration prose.txt --levels 6");
  flags.Add(
      "calibration", &options.corpus.calibration_paths,
      "text to calibrate with, UTF-8; may be given several times; a --delta may bring its own, "
      "which then takes its place, and with --evaluation none is needed");
  flags.Add("evaluation", &options.corpus.evaluation_path,
            "text to measure the levels on; without it the last fifth of the calibration text, "
            "which then does not calibrate");
  flags.Add("ladder", &ladder,
            "residual (cheaper bytes), prefix (cheaper FLOPs), both, or mixed (every layer in the "
            "form that serves it best; with --search measured)");
  flags.Add("dtype", &dtype, "of the full level: int8 or bf16");
  flags.Add("activations", &activations,
            "of layers' inputs: int8, float, or auto: int8 but for layers whose measured loss is "
            "too large");
  flags.Add("levels", &levels, "levels of each ladder, beside the full one");
  flags.Add("calibration-tokens", &options.corpus.calibration_tokens,
            "tokens of text to calibrate with");
  flags.Add("evaluation-tokens", &options.evaluation_tokens,
            "tokens of text to measure each level on; 4096, of an encoder 32768, unless given");
  flags.Add(
      "self-sample", &options.self_sample_tokens,
      "tokens that the model writes itself, added to the calibration text; of a language model "
      "as many as --calibration-tokens unless given, and none beside what a --delta brings");
  flags.Add("max-residual-rank", &options.max_residual_rank, "most components of a residual");
  flags.Add("max-head-residual-rank", &options.max_head_residual_rank, "the same for the head");
  flags.Add(
      "refit-tokens", &options.refit_tokens,
      "calibration tokens that a prefix ladder's factors are refitted on, for the inputs that its "
      "levels really give each layer; 0: not at all; 12288, with --delta 0, unless given");
  flags.Add(
      "search", &search,
      "how ranks are chosen: even (one for all layers), energy (of what is left out), "
      "sensitivity (energy, weighed by what groups of layers measure) or measured (what each "
      "layer loses, by dynamic programming); sensitivity, of an encoder's prefix ladder even, "
      "unless given");
  flags.Add("objective", &objective,
            "the cost that levels are chosen by: bytes, flops or time (of linear layers, measured "
            "here); FLOPs of a prefix ladder, bytes of others unless given");
  flags.Add("costs", &costs,
            "shares of the full level's cost to have levels at, such as 0.9,0.8,0.6; instead of "
            "--levels; a --delta names those of its ladder");
  flags.Add(
      "extra-cost", &extra_costs,
      "a level between two others, its ranks interpolated, measured and stored like any other: "
      "at a share of the full level's FLOPs on a prefix ladder, of its bytes on any other, "
      "whatever --objective says, such as 0.65, or with two ladders prefix:0.65; may be given "
      "several times");
  flags.Add("gar-levels", &gar_levels,
            "levels of a prefix ladder, 0 being its cheapest, whose layers are stored once more in "
            "their cheapest gauge, for a quarter less FLOPs at most: all, none, or such as 1,2; "
            "unless given none, with --delta all; later: an artifact to train, with the ranks of "
            "all, but as plain factors, whose cost its levels state; with --delta its levels and "
            "calibration, without what it trained");
  flags.Add("rows", &options.search.rows, "rows of the step whose time a measured search measures");
  flags.Add("probes", &options.search.probes,
            "ranks that a measured search probes of each layer and form; 1 is quickest");
  flags.Add(
      "probe-tokens", &options.search.probe_tokens,
      "calibration tokens of a probe of a measured search; 1024, of an encoder 4096, unless given");
  flags.Add("delta", &options.delta,
            "trained terms or factors of this checkpoint's prefix ladder, its levels and what to "
            "calibrate on; a file that nestor-consolidate wrote");
  flags.Add("force", &options.overwrites, "replace OUT where it exists");
  flags.Add(
      "report", &draws_report,
      "write OUT.report/, with report.html and its pictures where a Python with matplotlib is "
      "found");
  flags.Add("json", &prints_json, "print the levels as one JSON object");
  NESTOR_ASSIGN_OR_RETURN(const std::vector<std::string> positional, flags.Parse(arguments));
  if (positional.size() != 2) return UsageError("expected two arguments, HF_DIR and OUT");
  if (options.corpus.calibration_paths.empty() && options.delta.empty()) {
    return UsageError("--calibration is missing");
  }
  options.source = positional[0];
  options.output = positional[1];
  NESTOR_ASSIGN_OR_RETURN(options.ladder, ParseLadder(ladder));
  NESTOR_ASSIGN_OR_RETURN(options.dense, ParseDtype(dtype));
  NESTOR_ASSIGN_OR_RETURN(options.activations, ParseActivations(activations));
  NESTOR_ASSIGN_OR_RETURN(options.levels, ToInt32("levels", levels));
  NESTOR_ASSIGN_OR_RETURN(options.search.method, ParseSearch(search));
  NESTOR_ASSIGN_OR_RETURN(options.search.objective, ParseObjective(objective));
  NESTOR_ASSIGN_OR_RETURN(options.search.costs, ParseCosts(costs));
  absl::StatusOr<std::vector<WantedLevel>> extra = ParseWantedLevels(extra_costs);
  if (!extra.ok()) return UsageError(absl::StrCat("--extra-cost: ", extra.status().message()));
  options.extra_costs = *std::move(extra);
  // A trained level is frozen, and its costs were counted so.
  if (gar_levels.empty()) gar_levels = options.delta.empty() ? "none" : "all";
  options.makes_gar_pairs = gar_levels != "later";
  NESTOR_ASSIGN_OR_RETURN(options.gar_levels,
                          ParseGarLevels(options.makes_gar_pairs ? gar_levels : "all"));
  options.threads = AvailableCpus();
  options.make_backend = [] { return MakeCpuBackend({}); };

  NESTOR_ASSIGN_OR_RETURN(const CompressReport report, Compress(options));
  if (draws_report) NESTOR_RETURN_IF_ERROR(Draw(options, report));
  if (prints_json) {
    const nlohmann::json json = {{"artifact", options.output},
                                 {"levels", LevelReport(report.levels)},
                                 {"search", SearchReport(report)},
                                 {"gar_pairs", report.gar_pairs},
                                 {"gar_bytes", report.gar_bytes},
                                 {"notes", report.notes},
                                 {"calibration_tokens", report.calibration_tokens},
                                 {"evaluation_tokens", report.evaluation_tokens}};
    absl::PrintF("%s\n", json.dump(2));
    return absl::OkStatus();
  }
  absl::PrintF("%s\n", LevelTable(report.levels));
  if (!report.search.empty()) absl::PrintF("%s\n", SearchTable(report, options.search.rows));
  for (const std::string& note : report.notes) absl::PrintF("%s\n", note);
  absl::PrintF("%s: calibrated on %d tokens, measured on %d held-out tokens\n", options.output,
               report.calibration_tokens, report.evaluation_tokens);
  return absl::OkStatus();
}

}  // namespace nestor
