#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "compress/allocate.h"
#include "compress/corpus.h"
#include "compress/forward.h"

namespace nestor {

enum class LadderChoice : uint8_t { kResidual, kPrefix, kBoth };

struct CompressOptions {
  std::string source;  // a Hugging Face directory
  std::string output;  // must not exist, unless `overwrites`
  bool overwrites = false;
  LadderChoice ladder = LadderChoice::kResidual;
  DenseStorage dense = DenseStorage::kPlanes;  // or kBf16
  int levels = 6;                              // of each ladder, beside the full one
  CorpusOptions corpus;                        // its evaluation_tokens are those below
  std::optional<int64_t> evaluation_tokens;    // unset: 4,096, of an encoder 32,768
  // Tokens that the model itself writes, added to the calibration text; unset, a language model
  // writes as many as the text gives. Encoders cannot.
  std::optional<int64_t> self_sample_tokens;
  // Most components of a residual; multiples of 8. The head has inputs with fewer dominant
  // directions than a block's layers (methods: Residual ladders), so it may have more.
  int64_t max_residual_rank = 64;
  int64_t max_head_residual_rank = 128;
  // Calibration tokens that a prefix ladder's factors are refitted on (RefitFactors); 0: not at
  // all. A residual ladder gains nothing from it (measured) and is left as it is.
  int64_t refit_tokens = 12288;
  int threads = 1;  // layers decomposed side by side
  BackendFactory make_backend;
  // Unset: along the hulls of measured sensitivity, but for an encoder's prefix ladder evenly,
  // which measures as well there and needs no measurement.
  AllocateFunction allocate;
};

struct CompressReport {
  std::vector<Level> levels;
  std::vector<std::string> notes;  // what a person should know, such as a level left out
  int64_t resumed_sequences = 0;   // of calibration, found done by an earlier run
  int64_t calibration_tokens = 0;
  int64_t evaluation_tokens = 0;
};

// Writes a nested artifact of a checkpoint (docs/artifact_format.md). The output appears whole, by
// one rename of `output`.partial at the end; a run that is killed leaves none and resumes from
// `output`.calibration, which success removes. Progress goes to stderr.
// ALREADY_EXISTS for an output that is there; INVALID_ARGUMENT for text that is too short, weights
// that are not finite, options that contradict the model; RESOURCE_EXHAUSTED names the file where
// the disk is full.
absl::StatusOr<CompressReport> Compress(const CompressOptions& options);

// Where a ladder's levels aim: its cost as share of the full level's, ascending, `count` of them.
// A residual ladder (`cheapest`: the share at rank 0 everywhere) is fine-grained in the first
// seventh of what is between there and full, where rank buys most, and coarse above.
std::vector<double> ResidualTargets(int count, double cheapest);
std::vector<double> PrefixTargets(int count, bool is_encoder);

// Along each ladder, leaves out levels that measured worse than a cheaper one by more than the
// standard error; `notes` says which.
std::vector<Level> WithoutInversions(const std::vector<Level>& levels,
                                     std::vector<std::string>* notes);

}  // namespace nestor
