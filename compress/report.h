#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "compress/pipeline.h"
#include "engine/nested_model.h"
#include "nlohmann/json.hpp"

namespace nestor {

// Measured levels as a table with a header, for people.
std::string LevelTable(const std::vector<Level>& levels);

// The same as the list `levels` of --json: level, form, relative_cost, relative_flops, quality, and
// those of perplexity, spearman, accuracy, agreement, quality_vs_source, standard_error and
// seconds_per_token that were measured. An
// interpolated level has `interpolated`, true, and `estimated_quality`, the estimate from the
// measured levels around it.
nlohmann::json LevelReport(const std::vector<Level>& levels);

// The levels of a sweep, stored and interpolated ones apart, the latter beside their estimates, and
// a line that says how far measurements lie from those.
std::string SweepTable(const std::vector<Level>& levels);

// What a report is about, beside its model: levels as they were measured, on what, and by what.
struct MeasuredModel {
  std::string title;
  std::vector<Level> levels;
  std::optional<Level> coarse;  // the coarse plane alone, where no level is that
  int64_t tokens = 0;
  int64_t pairs = 0;
  bool has_labels = false;  // of pairs or texts
};

// What scripts/report.py draws (its keys are listed in docs/artifact_format.md): the levels with
// their ranks, the model in fixed types beside them, the bytes that `model` keeps, and the spectra
// of its directory, where it has them.
nlohmann::json FigureReport(const NestedModel& model, const MeasuredModel& measured);

// Of a measured search, for every level: the three costs as shares of the full level's (time is
// that of its linear layers in a step of `rows` rows), and the loss that was predicted beside the
// one that was measured. REQUIRES: report.search is not empty.
std::string SearchTable(const CompressReport& report, int64_t rows);
// The same as the list `search` of --json, empty without a measured search: level, relative_cost,
// relative_flops, relative_time, seconds, predicted_loss, measured_loss (both null at a
// level that a delta names and at an extra cost).
nlohmann::json SearchReport(const CompressReport& report);

}  // namespace nestor
