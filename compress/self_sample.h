#pragma once

#include <cstdint>

#include "absl/status/statusor.h"
#include "compress/corpus.h"
#include "engine/engine.h"

namespace nestor {

struct SelfSampleOptions {
  int64_t tokens = 0;
  uint64_t seed = 1;
};

// Sequences running side by side; with kWindowTokens positions each.
inline constexpr int64_t kSelfSampleBatch = 32;

// How many windows SampleFromModel returns, and their tokens: `options.tokens` rounded up to whole
// windows.
int64_t SampledSequences(const Engine& engine, const SelfSampleOptions& options);
int64_t SampledTokens(const Engine& engine, const SelfSampleOptions& options);

// Text that the model itself writes at temperature 1, as windows: what it was trained on, as far
// as it remembers. Each window goes on from a few tokens of a random window of `prompts`.
// Deterministic in the seed. REQUIRES: a language model, room for kSelfSampleBatch windows.
absl::StatusOr<TokenSequences> SampleFromModel(Engine* engine, const TokenSequences& prompts,
                                               const SelfSampleOptions& options);

}  // namespace nestor
