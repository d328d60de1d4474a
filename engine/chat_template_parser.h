#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "engine/chat_template_ast.h"

namespace nestor::chat_template {

// Parses a template. INVALID_ARGUMENT names the line and the construct that is malformed or not
// supported. Nesting is bounded, so evaluation may recurse.
absl::StatusOr<Body> ParseTemplate(const std::string& source);

}  // namespace nestor::chat_template
