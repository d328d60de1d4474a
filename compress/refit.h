#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "compress/corpus.h"
#include "compress/decompose.h"
#include "compress/forward.h"
#include "compress/layer.h"
#include "engine/nested_model.h"

namespace nestor {

struct RefitOptions {
  std::vector<int> levels;     // of the artifact's prefix ladder, at least one
  std::vector<int64_t> ranks;  // by layer: components of the new factors; 0: leave it alone
};

// What a layer's new factors were made from: all borrowed.
struct RefittedLayer {
  size_t layer = 0;
  std::span<const float> weights;      // W P [out, in], see below
  std::span<const double> moment;      // E[x' x'^T] [in, in]
  const Decomposition& decomposition;  // of `weights` in `moment`
  const FactorPair& factors;           // the same, quantised
};
using KeepRefitted = std::function<absl::Status(const RefittedLayer&)>;

// Sequential refit of prefix factors, without training. Factors are first made for the inputs that
// the whole model gives a layer; at a level, earlier layers were cut too, and its inputs x' are
// others. Runs `sequences` through the artifact at every one of `options.levels` and at the full
// level side by side, in one step, and on the way, before a layer runs, replaces its factors by
// those of
//   W P,  P = (E[x x'^T] + d I) (E[x' x'^T] + d I)^-1,  means over tokens and levels,
// decomposed in E[x' x'^T]: W P x' is the best linear guess of W x. d is a tenth of the mean input
// energy, which keeps P near the identity where the text says little. Later layers see what the
// new factors give. Hands each layer to `keep`, in order.
// `source` has the unquantised weights. Memory is taken for the rows of all levels at once, so
// `sequences` are some thousand tokens. INTERNAL where the moments cannot be solved.
absl::Status RefitFactors(std::unique_ptr<NestedModel> artifact, const NestedModel& source,
                          const TokenSequences& sequences, const RefitOptions& options,
                          const BackendFactory& make_backend, const KeepRefitted& keep);

}  // namespace nestor
