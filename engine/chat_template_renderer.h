#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "engine/chat_template_ast.h"

namespace nestor::chat_template {

// Evaluates a template with `variables`. INVALID_ARGUMENT names the line and what the template
// raised or did wrong; RESOURCE_EXHAUSTED where it prints, computes or recurses too much.
absl::StatusOr<std::string> RenderTemplate(const Body& body, const Value::Dict& variables);

}  // namespace nestor::chat_template
