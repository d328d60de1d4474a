#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "engine/tokenizer_json.h"

namespace nestor {

// The tokens of a model and their ids.
class Vocabulary {
 public:
  // From a JSON object of token to id. INVALID_ARGUMENT where an id is negative, too large or
  // used twice.
  static absl::StatusOr<Vocabulary> Parse(const JsonField& field);

  std::optional<int32_t> IdOf(std::string_view token) const;
  // Indexed by id; empty where no token has that id.
  const std::vector<std::string>& tokens() const { return tokens_; }

 private:
  absl::flat_hash_map<std::string, int32_t> ids_;
  std::vector<std::string> tokens_;
};

// Cuts one word of the pre-tokeniser into tokens.
//
// Immutable, so safe to share between threads.
class TokenizerModel {
 public:
  virtual ~TokenizerModel() = default;
  // Appends the ids of `word`. REQUIRES: `word` is valid UTF-8.
  virtual void Tokenize(std::string_view word, std::vector<int32_t>* ids) const = 0;
  virtual const Vocabulary& vocabulary() const = 0;
};

// Byte-pair encoding (Sennrich et al., arXiv 1508.07909), with the byte fallback and the unknown
// token of sentencepiece. O(n log n) in the characters of a word.
absl::StatusOr<std::unique_ptr<TokenizerModel>> ParseBpeModel(const JsonField& field);
// BERT's greedy longest match.
absl::StatusOr<std::unique_ptr<TokenizerModel>> ParseWordPieceModel(const JsonField& field);

// From the `model` of a tokenizer.json. INVALID_ARGUMENT names the field of what is not supported.
absl::StatusOr<std::unique_ptr<TokenizerModel>> ParseTokenizerModel(const JsonField& field);

}  // namespace nestor
