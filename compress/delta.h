#pragma once

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "compress/corpus.h"
#include "compress/export.h"
#include "compress/layer.h"
#include "engine/model_spec.h"
#include "engine/nested_model.h"

namespace nestor {

// What training adds to a prefix ladder (docs/ladders.md): of each layer a term U V in its own
// input and output space, quantised, and the profiles of the levels that it was trained for. The
// components of the term come before those of the layer's prefix factors, so that a level of rank
// r runs the term and the first r - k components of the weight. Where k is at least r the term is
// whole factors: the level runs its first r components, and nothing of the weight's.
struct Delta {
  // Forms dense and prefix, of any rank that a gar pair may have; nested, cheapest first.
  std::vector<Profile> profiles;
  std::vector<FactorPair> terms;  // by layer; of rank 0 where it has none
  // The tokens on which the factors beside the terms were calibrated: the terms fit what those
  // leave out. Empty where the terms are whole factors, which do not depend on it.
  TokenSequences calibration;
};

// Reads a delta that consolidate/ wrote. `source_sha256`, `layers` and `spec` are those of the
// checkpoint that it is meant for. INVALID_ARGUMENT names the file, what does not fit (another
// checkpoint, a tensor's type or shape, a scale that is not finite, a rank that no pair has, a
// token that is none, a sequence that is too long) and what was expected.
absl::StatusOr<Delta> ReadDelta(const std::string& path, const std::string& source_sha256,
                                const std::vector<LinearSpec>& layers, const ModelSpec& spec);

// Writes what an artifact's factors were calibrated on, a file of two I32 tensors: `tokens`, of all
// sequences one after the other, and `lengths`. consolidate/ puts them into the delta of terms that
// it trains beside those factors.
absl::Status WriteCalibrationTokens(const TokenSequences& sequences, const std::string& path);

// Puts the terms before the prefix factors in `spill`, whose last components make room.
absl::Status ApplyDelta(const Delta& delta, const std::vector<LinearSpec>& layers,
                        TensorSpill* spill);

}  // namespace nestor
