#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "engine/tokenizer_json.h"

namespace nestor {

// Rewrites text before it is split: Unicode forms, lower case, accents, prefixes.
//
// Immutable, so safe to share between threads.
class TextNormalizer {
 public:
  virtual ~TextNormalizer() = default;
  // RESOURCE_EXHAUSTED where an expression backtracks too much. REQUIRES: `*text` is valid UTF-8.
  virtual absl::Status Normalize(std::string* text) const = 0;
};

// From the `normalizer` of a tokenizer.json; null stands for none. INVALID_ARGUMENT names the field
// of a type that is not supported.
absl::StatusOr<std::unique_ptr<TextNormalizer>> ParseNormalizer(const JsonField& field);

}  // namespace nestor
