#include "compress/report.h"

#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace nestor {
namespace {

std::string Cell(const std::optional<double>& value, int digits) {
  return value.has_value() ? absl::StrFormat("%.*f", digits, *value) : "-";
}

}  // namespace

std::string LevelTable(const std::vector<Level>& levels) {
  std::string table = absl::StrFormat("%5s  %-9s %13s %14s %10s %8s %7s %8s %9s\n", "level", "form",
                                      "relative cost", "relative FLOPs", "perplexity", "spearman",
                                      "quality", "+-", "vs source");
  for (size_t i = 0; i < levels.size(); ++i) {
    const LevelMetrics& metrics = levels[i].metrics;
    absl::StrAppendFormat(&table, "%5d  %-9s %13.3f %14.3f %10s %8s %7.4f %8s %9s\n", i,
                          levels[i].ladder, levels[i].relative_cost, levels[i].relative_flops,
                          Cell(metrics.perplexity, 2), Cell(metrics.spearman, 4), metrics.quality,
                          Cell(metrics.standard_error, 4), Cell(metrics.quality_vs_source, 4));
  }
  return table;
}

nlohmann::json LevelReport(const std::vector<Level>& levels) {
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
        {"quality_vs_source", level.metrics.quality_vs_source},
        {"standard_error", level.metrics.standard_error}};
    for (const auto& [key, value] : measured) {
      if (value.has_value()) entry[key] = *value;
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
