#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "compress/options.h"
#include "engine/nested_model.h"

namespace nestor {

// What a measured search knows of a level, before prefix factors are refitted. Losses are
// DivergenceOf the full level on the probes' text.
struct SearchedLevel {
  Profile profile;
  // Both absent at a level that was not searched for: one that a delta names, or at an extra cost.
  std::optional<double> predicted_loss;  // the sum of its layers'
  std::optional<double> measured_loss;
  double seconds = 0;  // of its linear layers, in a step of RankSearchOptions::rows
  double relative_time = 1;
};

struct CompressReport {
  std::vector<Level> levels;
  std::vector<SearchedLevel> search;  // parallel to `levels`; empty unless kMeasured
  int64_t probes = 0;
  int64_t resumed_probes = 0;      // of them, found measured by an earlier run
  std::vector<std::string> notes;  // what a person should know, such as a level left out
  int64_t resumed_sequences = 0;   // of calibration, found done by an earlier run
  int64_t calibration_tokens = 0;
  int64_t evaluation_tokens = 0;
  int64_t gar_pairs = 0;  // stored, and their bytes
  int64_t gar_bytes = 0;
};

// Writes a nested artifact of a checkpoint (docs/artifact_format.md). The output appears whole, by
// one rename of `output`.partial at the end; a run that is killed leaves none and resumes from
// `output`.calibration, which success removes. Progress goes to stderr.
// ALREADY_EXISTS for an output that is there; INVALID_ARGUMENT for text that is too short, weights
// that are not finite, options that contradict the model; RESOURCE_EXHAUSTED names the file where
// the disk is full.
absl::StatusOr<CompressReport> Compress(const CompressOptions& options);

// Along each ladder, leaves out levels that measured worse than a cheaper one by more than the
// standard error; `notes` says which.
std::vector<Level> WithoutInversions(const std::vector<Level>& levels,
                                     std::vector<std::string>* notes);

}  // namespace nestor
