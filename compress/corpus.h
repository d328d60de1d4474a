#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/model_spec.h"
#include "engine/tokenizer.h"

namespace nestor {

// Token sequences to feed to a model: windows of text for a language model, one line each (with
// its special tokens) for an encoder.
using TokenSequences = std::vector<std::vector<int32_t>>;

int64_t CountTokens(const TokenSequences& sequences);

// Positions of an evaluation window, by the definition of `perplexity`.
inline constexpr int64_t kWindowTokens = 512;

// `text` in reading order, at most `max_tokens` (0: all). Windows do not overlap and get no BOS; a
// last window of one token is left out. Lines longer than the model's context are cut.
absl::StatusOr<TokenSequences> SequencesOf(const std::string& text, const Tokenizer& tokenizer,
                                           const ModelSpec& spec, int64_t max_tokens);

// Beginnings of `sequences`, of at most `longest` tokens each, evenly taken until there are
// `tokens` (or all of them, where that is less). Longer ones where those of all sequences were too
// few.
TokenSequences SpreadOver(TokenSequences sequences, int64_t tokens, int64_t longest);

struct CorpusOptions {
  // None: nothing to calibrate with is read. REQUIRES: then an evaluation_path.
  std::vector<std::string> calibration_paths;
  // Empty: the last fifth of each calibration text, which then does not calibrate.
  std::string evaluation_path;
  int64_t calibration_tokens = 0;
  int64_t evaluation_tokens = 0;
};

// Text that compression reads. Calibration and evaluation never share a part.
struct Corpus {
  TokenSequences calibration;
  TokenSequences evaluation;
  std::string calibration_sha256;
  std::string evaluation_sha256;
};

// Reads the texts and takes sequences spread evenly over each, the same number of tokens from each
// as far as it has them. INVALID_ARGUMENT where a text is too short, saying how many tokens there
// are and how many are needed.
absl::StatusOr<Corpus> ReadCorpus(const CorpusOptions& options, const Tokenizer& tokenizer,
                                  const ModelSpec& spec);

}  // namespace nestor
