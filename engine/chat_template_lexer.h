#pragma once

#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace nestor::chat_template {

struct Token {
  enum class Kind {
    kText,         // outside of any tag, white space already trimmed
    kOutputBegin,  // {{
    kOutputEnd,
    kTagBegin,  // {%
    kTagEnd,
    kName,
    kString,
    kInteger,
    kOperator,
    kEnd,
  };
  Kind kind;
  std::string text;  // of a string: its value
  int line;
};

// Jinja's lexer with trim_blocks and lstrip_blocks on, as transformers sets it. The last token is
// kEnd. INVALID_ARGUMENT names the line.
absl::StatusOr<std::vector<Token>> Tokenize(const std::string& source);

}  // namespace nestor::chat_template
