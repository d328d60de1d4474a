#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/tokenizer_json.h"

namespace nestor {

// A range of bytes of a text.
struct TextSpan {
  size_t begin;
  size_t end;
};

// A literal string or a regular expression, as tokenizer.json writes them: {"String": "..."} or
// {"Regex": "..."}. Expressions are in Oniguruma's syntax, translated to PCRE2's.
//
// Immutable, so safe to share between threads.
class TextPattern {
 public:
  // INVALID_ARGUMENT names the field and what the expression uses that is not supported.
  static absl::StatusOr<TextPattern> Parse(const JsonField& field);
  static absl::StatusOr<TextPattern> FromRegex(const std::string& expression);

  // Matches from left to right, none overlapping. RESOURCE_EXHAUSTED where the expression
  // backtracks too much. REQUIRES: `text` is valid UTF-8.
  absl::StatusOr<std::vector<TextSpan>> FindAll(std::string_view text) const;
  // `text` with every match replaced by `content`, literally.
  absl::StatusOr<std::string> ReplaceAll(std::string_view text, std::string_view content) const;

 private:
  struct CodeDeleter {
    void operator()(void* code) const;
  };
  TextPattern() = default;
  std::vector<TextSpan> FindAllLiteral(std::string_view text) const;

  std::string literal_;                      // where code_ is null
  std::unique_ptr<void, CodeDeleter> code_;  // pcre2_code_8
};

}  // namespace nestor
