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
#include "compress/report.h"
#include "kernels/cpu/cpu_backend.h"
#include "nestor/command.h"
#include "nestor/flags.h"

namespace nestor {
namespace {

struct EvaluateOptions {
  std::string model;
  std::optional<std::string> text;
  std::optional<std::string> pairs;
  std::optional<std::string> source;
  int64_t tokens = 0;
  bool prints_json = false;
};

absl::StatusOr<std::unique_ptr<Engine>> OpenModel(const std::string& directory) {
  NESTOR_ASSIGN_OR_RETURN(std::unique_ptr<NestedModel> model, NestedModel::Open(directory));
  return OpenEngine(
      std::move(model), [] { return MakeCpuBackend({}); }, kWindowTokens);
}

absl::StatusOr<EvaluationSet> ReadSet(const EvaluateOptions& options, const Engine& engine) {
  const ModelSpec& spec = engine.model().spec();
  if (options.pairs.has_value()) {
    if (!spec.is_encoder()) {
      return UsageError(absl::StrCat("--pairs: ", options.model, " is no encoder; give --text"));
    }
    return ReadLabelledPairs(*options.pairs, engine.tokenizer(), spec);
  }
  if (!options.text.has_value()) return UsageError("give --text, or --pairs for an encoder");
  NESTOR_ASSIGN_OR_RETURN(const std::string text, ReadFile(*options.text));
  NESTOR_ASSIGN_OR_RETURN(TokenSequences sequences,
                          SequencesOf(text, engine.tokenizer(), spec, options.tokens));
  const size_t needed = spec.is_encoder() ? 3 : 1;  // lines, so that there are two pairs; windows
  if (sequences.size() < needed) {
    return absl::InvalidArgumentError(absl::StrCat(
        *options.text, ": too short: ", CountTokens(sequences), " tokens in ", sequences.size(),
        spec.is_encoder() ? " lines" : " windows", ", at least ", needed, " are needed"));
  }
  if (spec.is_encoder()) return SplicedPairs(sequences);
  return EvaluationSet{.sequences = std::move(sequences), .pairs = {}, .labels = {}};
}

absl::Status Print(const EvaluateOptions& options, const EvaluationSet& set,
                   const std::vector<Level>& levels) {
  if (!options.prints_json) {
    absl::PrintF("%s", LevelTable(levels));
    return absl::OkStatus();
  }
  nlohmann::json json = {
      {"model", options.model}, {"tokens", MeasuredTokens(set)}, {"levels", LevelReport(levels)}};
  if (!set.pairs.empty()) json["pairs"] = set.pairs.size();
  absl::PrintF("%s\n", json.dump(2));
  return absl::OkStatus();
}

}  // namespace

absl::Status RunEvaluate(const std::vector<std::string>& arguments) {
  EvaluateOptions options;
  Flags flags("nestor evaluate MODEL --text FILE [flags]",
              "nestor evaluate models/smollm2-135m-instruct.nested --text held_out.txt "
              "--tokens 16384");
  flags.Add("text", &options.text,
            "text, UTF-8; of an encoder each line is paired with the next one");
  flags.Add("pairs", &options.pairs,
            "labelled sentence pairs in STS-B's tab-separated format, for an encoder");
  flags.Add("tokens", &options.tokens, "tokens of --text to read; 0 is all");
  flags.Add("source", &options.source,
            "the checkpoint that MODEL was made from: adds quality_vs_source");
  flags.Add("json", &options.prints_json, "print one JSON object");
  NESTOR_ASSIGN_OR_RETURN(const std::vector<std::string> positional, flags.Parse(arguments));
  if (positional.size() != 1) {
    return UsageError("expected one argument, an artifact or a Hugging Face directory");
  }
  if (options.tokens < 0) {
    return UsageError(absl::StrCat("--tokens: must not be negative; was ", options.tokens));
  }
  options.model = positional[0];

  NESTOR_ASSIGN_OR_RETURN(std::unique_ptr<Engine> engine, OpenModel(options.model));
  NESTOR_ASSIGN_OR_RETURN(const EvaluationSet set, ReadSet(options, *engine));
  std::optional<Measurement> source;
  if (options.source.has_value()) {
    NESTOR_ASSIGN_OR_RETURN(const std::unique_ptr<Engine> source_engine,
                            OpenModel(*options.source));
    const int full = static_cast<int>(source_engine->model().levels().size()) - 1;
    Progress progress("Evaluating the source", MeasuredTokens(set));
    NESTOR_ASSIGN_OR_RETURN(source, Measure(source_engine.get(), full, set, &progress));
  }
  NESTOR_ASSIGN_OR_RETURN(
      const std::vector<LevelMetrics> metrics,
      EvaluateLevels(engine.get(), set, source.has_value() ? &*source : nullptr));
  std::vector<Level> levels = engine->model().levels();
  for (size_t i = 0; i < levels.size(); ++i) levels[i].metrics = metrics[i];
  return Print(options, set, levels);
}

}  // namespace nestor
