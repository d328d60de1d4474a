#pragma once

#include <vector>

#include "absl/status/statusor.h"
#include "base/progress.h"
#include "compress/corpus.h"
#include "engine/engine.h"

namespace nestor {

// How far apart a model's outputs are at two levels: what probes measure. To second order in what
// is changed it adds up over independent changes, and it needs far less text than a difference of
// losses, whose first-order part is noise.

// Fewer outputs than this say nothing.
inline constexpr size_t kMinOutputs = 3;

// One vector for each token but the last of a window (its log-probability), or for each sentence
// (its embedding, or its labels' logits). `progress` (may be null) advances by the tokens
// processed.
using Outputs = std::vector<std::vector<float>>;
absl::StatusOr<Outputs> OutputsAt(Engine* engine, const TokenSequences& sequences, int level,
                                  Progress* progress);

// Of a language model the Kullback-Leibler divergence to second order, half the mean squared
// difference of the text's log-probabilities; of a classifier the same of its labels; of another
// encoder the variance, over all pairs of sentences, of what their similarity changes by. REQUIRES:
// outputs of the same sequences.
double DivergenceOf(const ModelSpec& spec, const Outputs& a, const Outputs& b);

// Of a classifier's labels, from their logits for one text.
std::vector<double> LabelLogProbabilities(const std::vector<float>& logits);

}  // namespace nestor
