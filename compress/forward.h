#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "base/progress.h"
#include "compress/corpus.h"
#include "engine/engine.h"

namespace nestor {

// Running whole texts through an engine, the way compression and evaluation need it.

using BackendFactory = std::function<absl::StatusOr<std::unique_ptr<Backend>>()>;

// An engine with a KV cache of `positions`, all sequences together, whose steps have `max_rows`.
absl::StatusOr<std::unique_ptr<Engine>> OpenEngine(std::unique_ptr<NestedModel> model,
                                                   const BackendFactory& make_backend,
                                                   int64_t positions,
                                                   int64_t max_rows = kWindowTokens);

struct WindowScore {
  double log_likelihood = 0;  // of the scored tokens, natural logarithm
  int64_t tokens = 0;         // scored
};

// Log-probabilities of the tokens of `window` but the first one, in order.
absl::StatusOr<std::vector<double>> LogProbabilities(Engine* engine,
                                                     const std::vector<int32_t>& window, int level);

// Scores the tokens of each window but the first one. `progress` (may be null) advances by the
// tokens processed. REQUIRES: a language model.
absl::StatusOr<std::vector<WindowScore>> ScoreWindows(Engine* engine, const TokenSequences& windows,
                                                      int level, Progress* progress);

// Embeddings of sentences, or a classifier's logits, several of them in a step. `second_texts`
// (StepEntry::second_text) are parallel to them, or empty. REQUIRES: an encoder.
absl::StatusOr<std::vector<std::vector<float>>> EmbedSentences(
    Engine* engine, const TokenSequences& sentences, int level, Progress* progress,
    std::span<const size_t> second_texts = {});

// Of two vectors of one length; 0 where either is zero.
double Cosine(const std::vector<float>& a, const std::vector<float>& b);

}  // namespace nestor
