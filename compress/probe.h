#pragma once

#include <cstdint>
#include <fstream>
#include <map>
#include <span>
#include <string>
#include <tuple>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "compress/allocate.h"
#include "compress/corpus.h"
#include "engine/engine.h"

namespace nestor {

// Probes of a measured search: what the model loses with one layer at one choice and all others
// dense.
struct Probe {
  size_t layer = 0;
  FormAndRank choice;
  double energy = 0;  // share of the layer's output energy that the choice leaves out
  double loss = 0;    // measured: DivergenceOf the full level
};

// `count` ranks of each form that a layer has, in geometric steps (fewer where it has fewer); with
// one, the rank where a ladder spends most. The errors of `options` are shares of energy.
std::vector<Probe> ChooseProbes(const LayerOptions& options, int64_t count);

// A level for each probe, and the full one. Not nested: for NestedModel::SetProbes.
std::vector<Level> ProbeLevels(const std::vector<Probe>& probes, size_t num_layers);

// Losses that were measured, one line of a file each, so that a search that is killed goes on where
// it was. A file with another key is begun anew; a last line that was torn off is left out.
class ProbeLog {
 public:
  // `key` says what losses depend on beside layer, form and rank.
  static absl::StatusOr<ProbeLog> Open(const std::string& path, const std::string& key);

  // The loss of an earlier run, or null.
  const double* Find(const Probe& probe) const;
  // Writes it out before it returns. RESOURCE_EXHAUSTED or INTERNAL names the file.
  absl::Status Add(const Probe& probe);

 private:
  using Key = std::tuple<size_t, Form, int64_t>;
  explicit ProbeLog(std::string path) : path_(std::move(path)) {}
  std::string path_;
  std::map<Key, double> losses_;
  std::ofstream file_;
};

// Fills in `loss` of the probes, those of `log` unmeasured, and returns how many those are.
// `engine` has the levels of ProbeLevels.
absl::StatusOr<int64_t> MeasureProbes(Engine* engine, const TokenSequences& sequences,
                                      std::vector<Probe>* probes, ProbeLog* log);

// Makes the errors of `options` losses: of each form of a layer, log loss runs linearly in log
// energy between two probes, and in proportion to energy beyond the first and the last. Probes are
// made monotone before, so errors are.
void ErrorsFromProbes(const std::vector<Probe>& probes, LayerOptions* options);

}  // namespace nestor
