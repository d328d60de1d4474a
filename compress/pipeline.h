#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "compress/activations.h"
#include "compress/allocate.h"
#include "compress/corpus.h"
#include "compress/forward.h"

namespace nestor {

// kBoth: one of each. kMixed: one ladder whose layers take what serves each best, a residual, a
// prefix or dense.
enum class LadderChoice : uint8_t { kResidual, kPrefix, kBoth, kMixed };

// How the ranks of a ladder's levels are chosen:
//   kEven         one rank for all layers
//   kEnergy       along the hulls of the layers' lost output energies
//   kSensitivity  the same, energies weighed by the measured sensitivity of groups of layers
//   kMeasured     dynamic programming over measured losses of each layer (probe.h, rank_search.h)
enum class RankSearch : uint8_t { kEven, kEnergy, kSensitivity, kMeasured };

// What a level's cost is counted in. kTime is that of linear layers, measured on this device.
enum class RankObjective : uint8_t { kBytes, kFlops, kTime };

struct RankSearchOptions {
  // Unset: kSensitivity, but for an encoder's prefix ladder kEven, which measures as well there and
  // needs no measurement. A mixed ladder and a time objective need kMeasured.
  std::optional<RankSearch> method;
  std::optional<RankObjective> objective;  // unset: FLOPs of a prefix ladder, bytes of others
  // Shares of the full level's cost that levels are to have, instead of `levels` default ones.
  std::vector<double> costs;
  int64_t rows = 1;    // of the step that is timed
  int64_t probes = 3;  // ranks probed of each layer and form; 1 is the cheap mode
  // Calibration tokens that a probe runs; unset: 1,024, of an encoder 4,096, or all there are.
  std::optional<int64_t> probe_tokens;
};

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
  // writes as many as the text gives, and none with a delta that brings what to calibrate on.
  // Encoders cannot.
  std::optional<int64_t> self_sample_tokens;
  // Most components of a residual; multiples of 4. The head has inputs with fewer dominant
  // directions than a block's layers (methods: Residual ladders), so it may have more.
  int64_t max_residual_rank = 64;
  int64_t max_head_residual_rank = 128;
  // Calibration tokens that a prefix ladder's factors are refitted on (RefitFactors); 0: not at
  // all. 12288 unless set; 0 with a delta, whose terms were trained beside the factors as they are.
  // A residual ladder gains nothing from it (measured) and is left as it is.
  std::optional<int64_t> refit_tokens;
  // Levels of the prefix ladder (or the mixed one), a delta's too, from its cheapest, 0, on, that
  // may run gar pairs where a layer's prefix is cheaper so; unset: all.
  std::optional<std::vector<int>> gar_levels;
  // Whether those pairs are made. An artifact without is one to train: its ranks are chosen at the
  // cost of pairs, and run as plain factors, which may cost more than the dense layer. Of a delta
  // it has the levels and the calibration, not what was trained, from which training may go on.
  bool makes_gar_pairs = true;
  RankSearchOptions search;
  // A file of consolidate/, empty for none: it names the prefix ladder's levels and improves them
  // (delta.h). Where it brings what its factors were calibrated on, that takes the place of
  // `corpus`'s text and of sampled tokens, for all ladders.
  std::string delta;
  // Layers whose inputs stay floats: chosen by measurement, none, or all.
  Activations activations = Activations::kAuto;
  int threads = 1;  // layers decomposed side by side
  BackendFactory make_backend;
  AllocateFunction allocate;  // unset: by `search`
};

// What a measured search knows of a level, before prefix factors are refitted. Losses are
// DivergenceOf the full level on the probes' text.
struct SearchedLevel {
  Profile profile;
  // Absent for a level that a delta names: it was not searched for.
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

// Where a ladder's levels aim: its cost as share of the full level's, ascending, `count` of them.
// A residual ladder (`cheapest`: the share at rank 0 everywhere) is fine-grained in the first
// seventh of what is between there and full, where rank buys most, and coarse above.
std::vector<double> ResidualTargets(int count, double cheapest);
std::vector<double> PrefixTargets(int count, bool is_encoder);
// In equal steps from the cheapest level, for any other ladder and objective.
std::vector<double> EvenTargets(int count, double cheapest);

// Along each ladder, leaves out levels that measured worse than a cheaper one by more than the
// standard error; `notes` says which.
std::vector<Level> WithoutInversions(const std::vector<Level>& levels,
                                     std::vector<std::string>* notes);

}  // namespace nestor
