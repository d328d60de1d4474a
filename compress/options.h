#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "compress/activations.h"
#include "compress/allocate.h"
#include "compress/corpus.h"
#include "compress/forward.h"
#include "engine/interpolate.h"
#include "kernels/nested_linear.h"

namespace nestor {

// kBoth: one of each. kMixed: one ladder whose layers take what serves each best, a residual, a
// prefix or dense.
enum class LadderChoice : uint8_t { kResidual, kPrefix, kBoth, kMixed };

// What levels call the ladders of a choice.
std::vector<std::string> NamesOf(LadderChoice choice);

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

inline constexpr int64_t kRefitTokens = 12288;

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
  // all. kRefitTokens unless set; 0 with a delta, whose terms were trained beside the factors as
  // they are. A residual ladder gains nothing from it (measured) and is left as it is.
  std::optional<int64_t> refit_tokens;
  // Levels of the prefix ladder (or the mixed one), a delta's too, from its cheapest, 0, on, that
  // may run gar pairs where a layer's prefix is cheaper so; unset: all. Extra costs do not count.
  std::optional<std::vector<int>> gar_levels;
  // Whether those pairs are made. An artifact without is one to train: its ranks are chosen at the
  // cost of pairs, and run as plain factors, which may cost more than the dense layer. Of a delta
  // it has the levels and the calibration, not what was trained, from which training may go on.
  bool makes_gar_pairs = true;
  RankSearchOptions search;
  // Levels to have between those that are chosen, interpolated and then measured like any other:
  // shares of the full level's FLOPs on a prefix ladder, of its weight bytes on any other, whatever
  // the objective. One that is not between them, or has no ranks of its own, is left out, which a
  // note says.
  std::vector<WantedLevel> extra_costs;
  // A file of consolidate/, empty for none: it names the prefix ladder's levels and improves them
  // (delta.h). Where it brings what its factors were calibrated on, that takes the place of
  // `corpus`'s text and of sampled tokens, for all ladders.
  std::string delta;
  // Layers whose inputs stay floats: chosen by measurement, none, or all.
  Activations activations = Activations::kAuto;
  int threads = 1;  // layers decomposed side by side
  BackendFactory make_backend;
  AllocateFunction allocate;  // unset: by `search`

  // What follows from the above.
  bool has_residual() const { return ladder != LadderChoice::kPrefix; }
  bool has_prefix() const { return ladder != LadderChoice::kResidual; }
  // On some level.
  bool may_be_gar() const {
    return has_prefix() && (!gar_levels.has_value() || !gar_levels->empty());
  }
  // An artifact to train: pairs come when that is done.
  bool is_to_train() const { return !makes_gar_pairs; }
  bool is_measured() const { return search.method == RankSearch::kMeasured; }
  int64_t tokens_to_refit_on() const {
    return refit_tokens.value_or(delta.empty() ? kRefitTokens : 0);
  }
};

// INVALID_ARGUMENT names the option that is out of its range or contradicts another. Looks at no
// file.
absl::Status CheckOptions(const CompressOptions& options);
// The same for `gar_levels` of a ladder of `count` levels, which a delta may name.
absl::Status CheckGarLevels(const CompressOptions& options, int64_t count);
// The same for tokens to probe with, of those to calibrate on, which a delta may bring.
absl::Status CheckProbeTokens(const CompressOptions& options, int64_t calibration_tokens);

}  // namespace nestor
