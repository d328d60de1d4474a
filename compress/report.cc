#include "compress/report.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/file.h"
#include "engine/interpolate.h"

namespace nestor {
namespace {

nlohmann::json OrNull(const std::optional<double>& value) {
  return value.has_value() ? nlohmann::json(*value) : nlohmann::json();
}

std::string Cell(const std::optional<double>& value, int digits) {
  return value.has_value() ? absl::StrFormat("%.*f", digits, *value) : "-";
}

// What a task measures a level by; a table shows those that some level has.
struct MetricColumn {
  const char* title;
  std::optional<double> LevelMetrics::*value;
  int digits;
};
constexpr MetricColumn kMetricColumns[] = {{"perplexity", &LevelMetrics::perplexity, 2},
                                           {"spearman", &LevelMetrics::spearman, 4},
                                           {"accuracy", &LevelMetrics::accuracy, 4},
                                           {"agreement", &LevelMetrics::agreement, 4}};

std::vector<MetricColumn> MeasuredColumns(const std::vector<Level>& levels) {
  std::vector<MetricColumn> columns;
  for (const MetricColumn& column : kMetricColumns) {
    if (std::any_of(levels.begin(), levels.end(), [&](const Level& level) {
          return (level.metrics.*column.value).has_value();
        })) {
      columns.push_back(column);
    }
  }
  return columns;
}

std::string LevelHeader(const std::vector<MetricColumn>& columns) {
  std::string header =
      absl::StrFormat("%5s  %-9s %13s %14s", "level", "form", "relative cost", "relative FLOPs");
  for (const MetricColumn& column : columns) absl::StrAppendFormat(&header, " %10s", column.title);
  return absl::StrFormat("%s %7s %8s %9s", header, "quality", "+-", "vs source");
}

std::string LevelRow(const std::vector<MetricColumn>& columns, const Level& level, size_t number) {
  const LevelMetrics& metrics = level.metrics;
  std::string row = absl::StrFormat("%5d  %-9s %13.3f %14.3f", number, level.ladder,
                                    level.relative_cost, level.relative_flops);
  for (const MetricColumn& column : columns) {
    absl::StrAppendFormat(&row, " %10s", Cell(metrics.*column.value, column.digits));
  }
  return absl::StrFormat("%s %7.4f %8s %9s", row, metrics.quality, Cell(metrics.standard_error, 4),
                         Cell(metrics.quality_vs_source, 4));
}

// Where the bytes of an artifact's tensor are counted; of a checkpoint's all are weights.
const char* PartOf(const NestedModel& model, const std::string& tensor) {
  if (!model.is_artifact()) return "weights";
  constexpr std::pair<const char*, const char*> kParts[] = {{".coarse", "coarse planes"},
                                                            {".fine", "fine planes"},
                                                            {".middle", "middle planes"},
                                                            {".scales", "scales of planes"},
                                                            {".dense", "bf16 weights"}};
  for (const auto& [suffix, part] : kParts) {
    if (absl::EndsWith(tensor, suffix)) return part;
  }
  if (absl::StrContains(tensor, ".residual.")) return "residual factors";
  if (absl::StrContains(tensor, ".prefix.")) return "prefix factors";
  return "embeddings, norms, biases";
}

// What `quality` and `quality_vs_source` are, for the axis of a figure.
std::string QualityText(const ModelSpec& spec, bool has_labels, const std::string& reference) {
  if (!spec.is_encoder()) return absl::StrCat("perplexity of ", reference, " / of the level");
  if (spec.is_classifier()) {
    return has_labels ? absl::StrCat("accuracy, as ratio to that of ", reference)
                      : absl::StrCat("share of labels that agree with ", reference);
  }
  return has_labels ? absl::StrCat("Spearman to labels, as ratio to that of ", reference)
                    : absl::StrCat("Spearman to the similarities of ", reference);
}

// The whole model in one fixed type, with what is known of it.
nlohmann::json Mark(const char* name, const LinearCost& cost, const LinearCost& full) {
  return {{"name", name},
          {"weight_bytes", cost.weight_bytes},
          {"relative_cost",
           static_cast<double>(cost.weight_bytes) / static_cast<double>(full.weight_bytes)},
          {"relative_flops", static_cast<double>(cost.flops) / static_cast<double>(full.flops)}};
}

void AddMetrics(const LevelMetrics& metrics, nlohmann::json* mark) {
  (*mark)["quality"] = metrics.quality;
  if (metrics.quality_vs_source.has_value()) {
    (*mark)["quality_vs_source"] = *metrics.quality_vs_source;
  }
  if (metrics.seconds_per_token.has_value()) {
    (*mark)["seconds_per_token"] = *metrics.seconds_per_token;
  }
}

nlohmann::json MarksOf(const NestedModel& model, const MeasuredModel& measured) {
  const Level& full = measured.levels.back();
  const Profile dense(model.layers().size());
  const Profile coarse(model.layers().size(), {Form::kResidual, 0});
  const auto cost_of = [&](const Profile& profile, DenseStorage storage) {
    return CostOfProfile(model.spec(), model.layers(), profile, storage);
  };
  nlohmann::json bf16 = Mark("bf16", cost_of(dense, DenseStorage::kBf16), full.cost);
  nlohmann::json int8 = Mark("int8", cost_of(dense, DenseStorage::kPlanes), full.cost);
  nlohmann::json four_bits = Mark("4-bit", cost_of(coarse, DenseStorage::kPlanes), full.cost);
  if (full.metrics.quality_vs_source.has_value()) bf16["quality_vs_source"] = 1;
  if (model.dtype() == "int8") AddMetrics(full.metrics, &int8);
  if (model.dtype() == "bf16") AddMetrics(full.metrics, &bf16);
  for (const Level& level : measured.levels) {
    if (level.profile == coarse) AddMetrics(level.metrics, &four_bits);
  }
  if (measured.coarse.has_value()) AddMetrics(measured.coarse->metrics, &four_bits);
  return {std::move(bf16), std::move(int8), std::move(four_bits)};
}

}  // namespace

nlohmann::json FigureReport(const NestedModel& model, const MeasuredModel& measured) {
  constexpr const char* kRoles[] = {"query", "key", "value", "attention out",
                                    "gate",  "up",  "down",  "head"};
  const ModelSpec& spec = model.spec();
  nlohmann::json layers = nlohmann::json::array();
  for (const LinearSpec& layer : model.layers()) {
    layers.push_back({{"name", layer.name},
                      {"role", kRoles[static_cast<size_t>(layer.role)]},
                      {"block", layer.block},
                      {"out", layer.out},
                      {"in", layer.in}});
  }
  nlohmann::json levels = LevelReport(measured.levels);
  const nlohmann::json profiles = LevelsToJson(measured.levels);
  for (size_t i = 0; i < levels.size(); ++i) {
    for (const char* key : {"weight_bytes", "flops", "forms", "ranks"}) {
      levels[i][key] = profiles[i][key];
    }
  }
  nlohmann::json resident = nlohmann::json::object();
  for (const auto& [name, view] : model.tensors().tensors()) {
    nlohmann::json& bytes = resident[PartOf(model, name)];
    bytes = bytes.is_null() ? view.bytes.size() : bytes.get<size_t>() + view.bytes.size();
  }
  nlohmann::json report = {
      {"title", measured.title},
      {"architecture", spec.architecture},
      {"dtype", model.dtype()},
      {"tokens", measured.tokens},
      {"quality_text",
       {{"quality", QualityText(spec, measured.has_labels, "the full level")},
        {"quality_vs_source", QualityText(spec, measured.has_labels, "the source")}}},
      {"levels", std::move(levels)},
      {"marks", MarksOf(model, measured)},
      {"layers", std::move(layers)},
      {"resident_bytes", std::move(resident)}};
  if (measured.pairs > 0) report["pairs"] = measured.pairs;
  // Made by compression; an older artifact has none.
  const absl::StatusOr<std::string> text = ReadFile(model.directory() + "/spectra.json");
  if (text.ok()) {
    const auto spectra = nlohmann::json::parse(*text, nullptr, /*allow_exceptions=*/false);
    if (spectra.is_object()) report["spectra"] = spectra.value("layers", nlohmann::json::array());
  }
  return report;
}

std::string LevelTable(const std::vector<Level>& levels) {
  const std::vector<MetricColumn> columns = MeasuredColumns(levels);
  std::string table = LevelHeader(columns) + "\n";
  for (size_t i = 0; i < levels.size(); ++i) {
    absl::StrAppend(&table, LevelRow(columns, levels[i], i), "\n");
  }
  return table;
}

std::string SweepTable(const std::vector<Level>& levels) {
  const std::vector<double> estimates = EstimateQualities(levels);
  const std::vector<MetricColumn> columns = MeasuredColumns(levels);
  std::string stored = absl::StrCat("Stored levels\n", LevelHeader(columns), "\n");
  std::string between =
      absl::StrFormat("Interpolated levels\n%s %9s\n", LevelHeader(columns), "estimate");
  int count = 0;
  double sum = 0;
  double lowest = 0;
  double highest = 0;
  for (size_t i = 0; i < levels.size(); ++i) {
    if (!levels[i].is_interpolated) {
      absl::StrAppend(&stored, LevelRow(columns, levels[i], i), "\n");
      continue;
    }
    absl::StrAppendFormat(&between, "%s %9.4f\n", LevelRow(columns, levels[i], i), estimates[i]);
    const double difference = levels[i].metrics.quality - estimates[i];
    lowest = count == 0 ? difference : std::min(lowest, difference);
    highest = count == 0 ? difference : std::max(highest, difference);
    sum += difference;
    ++count;
  }
  if (count == 0) return absl::StrCat(stored, "No level lies between them.\n");
  return absl::StrFormat("%s\n%sMeasured less estimated: %+.4f on average, %+.4f to %+.4f\n",
                         stored, between, sum / count, lowest, highest);
}

nlohmann::json LevelReport(const std::vector<Level>& levels) {
  const std::vector<double> estimates = EstimateQualities(levels);
  nlohmann::json report = nlohmann::json::array();
  for (size_t i = 0; i < levels.size(); ++i) {
    const Level& level = levels[i];
    nlohmann::json entry = {{"level", i},
                            {"form", level.ladder},
                            {"relative_cost", level.relative_cost},
                            {"relative_flops", level.relative_flops},
                            {"quality", level.metrics.quality}};
    const std::pair<const char*, std::optional<double>> measured[] = {
        {"perplexity", level.metrics.perplexity},
        {"spearman", level.metrics.spearman},
        {"accuracy", level.metrics.accuracy},
        {"agreement", level.metrics.agreement},
        {"seconds_per_token", level.metrics.seconds_per_token},
        {"quality_vs_source", level.metrics.quality_vs_source},
        {"standard_error", level.metrics.standard_error}};
    for (const auto& [key, value] : measured) {
      if (value.has_value()) entry[key] = *value;
    }
    if (level.is_interpolated) {
      entry["interpolated"] = true;
      entry["estimated_quality"] = estimates[i];
    }
    report.push_back(std::move(entry));
  }
  return report;
}

std::string SearchTable(const CompressReport& report, int64_t rows) {
  std::string table = absl::StrFormat("%5s  %-9s %8s %8s %8s %12s %12s %12s %6s\n", "level", "form",
                                      "bytes", "FLOPs", "time", absl::StrCat("ms, ", rows, " rows"),
                                      "predicted", "measured", "ratio");
  for (size_t i = 0; i < report.levels.size(); ++i) {
    const Level& level = report.levels[i];
    const SearchedLevel& search = report.search[i];
    const auto loss = [](const std::optional<double>& value) {
      return value.has_value() ? absl::StrFormat("%.4g", *value) : "-";
    };
    absl::StrAppendFormat(
        &table, "%5d  %-9s %8.3f %8.3f %8.3f %12.4f %12s %12s %6s\n", i, level.ladder,
        level.relative_cost, level.relative_flops, search.relative_time, 1e3 * search.seconds,
        loss(search.predicted_loss), loss(search.measured_loss),
        search.predicted_loss.value_or(0) > 0
            ? absl::StrFormat("%.2f", *search.measured_loss / *search.predicted_loss)
            : "-");
  }
  return table;
}

nlohmann::json SearchReport(const CompressReport& report) {
  nlohmann::json list = nlohmann::json::array();
  for (size_t i = 0; i < report.search.size(); ++i) {
    const SearchedLevel& search = report.search[i];
    list.push_back({{"level", i},
                    {"relative_cost", report.levels[i].relative_cost},
                    {"relative_flops", report.levels[i].relative_flops},
                    {"relative_time", search.relative_time},
                    {"seconds", search.seconds},
                    {"predicted_loss", OrNull(search.predicted_loss)},
                    {"measured_loss", OrNull(search.measured_loss)}});
  }
  return list;
}

}  // namespace nestor
