#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/tokenizer_json.h"

namespace nestor {

// A part of the normalised text; never empty between pre-tokenisers.
struct TextPiece {
  std::string text;
  // Whether it starts where the whole input starts: some pre-tokenisers treat that piece alone.
  bool starts_input;
};

// Splits text into the words that the model sees, each on its own.
//
// Immutable, so safe to share between threads.
class PreTokenizer {
 public:
  virtual ~PreTokenizer() = default;
  // Replaces `*pieces` by finer ones. RESOURCE_EXHAUSTED where an expression backtracks too much.
  // REQUIRES: valid UTF-8.
  virtual absl::Status Split(std::vector<TextPiece>* pieces) const = 0;
};

// From the `pre_tokenizer` of a tokenizer.json; null stands for none. INVALID_ARGUMENT names the
// field of a type that is not supported.
absl::StatusOr<std::unique_ptr<PreTokenizer>> ParsePreTokenizer(const JsonField& field);

}  // namespace nestor
