#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "compress/corpus.h"
#include "engine/engine.h"

namespace nestor {

// The distinct inputs of a model's linear layers: q, k and v read one, gate and up read one.
struct LayerInputs {
  std::vector<size_t> input_of_layer;  // parallel to NestedModel::layers()
  std::vector<int64_t> sizes;          // by input
};
LayerInputs LayerInputsOf(const std::vector<LinearSpec>& layers);

// Uncentred second moments S = E[x x^T] of every distinct layer input, kept in a directory: they
// are as large as the model, and only one is in memory at a time. Immutable; thread-safe.
class Calibration {
 public:
  // S [size, size] of one input, symmetric, in double.
  absl::StatusOr<std::vector<double>> Moment(size_t input) const;

 private:
  friend class MomentDirectory;
  Calibration() = default;
  std::unique_ptr<TensorFile> file_;
  std::vector<int64_t> sizes_;
  std::vector<int64_t> rows_;  // accumulated, by input
};

// Runs `sequences` through the source model's full level and accumulates the moments in fp32
// (BLAS ssyrk over the rows of a step). Progress is saved in `directory` every minute and at the
// end, each time as one commit, so a run that was killed continues where it was saved. `key` says
// what the moments depend on; a directory with another key, or with damaged files, is replaced.
// `resumed_sequences` (may be null) receives how many were found done.
absl::StatusOr<Calibration> Calibrate(Engine* engine, const TokenSequences& sequences,
                                      const std::string& key, const std::string& directory,
                                      int64_t* resumed_sequences);

// The finished calibration of an earlier run; NOT_FOUND where `directory` does not hold all of
// `num_sequences` for `key`, undamaged.
absl::StatusOr<Calibration> OpenCalibration(const std::string& directory, const std::string& key,
                                            int64_t num_sequences, const LayerInputs& inputs);

}  // namespace nestor
