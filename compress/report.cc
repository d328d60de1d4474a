#include "compress/report.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "engine/interpolate.h"

namespace nestor {
namespace {

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

}  // namespace

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
    absl::StrAppendFormat(
        &table, "%5d  %-9s %8.3f %8.3f %8.3f %12.4f %12.4g %12.4g %6s\n", i, level.ladder,
        level.relative_cost, level.relative_flops, search.relative_time, 1e3 * search.seconds,
        search.predicted_loss, search.measured_loss,
        search.predicted_loss > 0
            ? absl::StrFormat("%.2f", search.measured_loss / search.predicted_loss)
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
                    {"predicted_loss", search.predicted_loss},
                    {"measured_loss", search.measured_loss}});
  }
  return list;
}

}  // namespace nestor
