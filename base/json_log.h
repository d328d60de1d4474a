#pragma once

#include <string_view>

#include "nlohmann/json.hpp"

namespace nestor {

enum class LogSeverity { kInfo, kWarning, kError };

// Writes one JSON line to stderr: {"time": ..., "severity": ..., "event": event, ...fields}. For
// state changes and failures, not for requests. Thread-safe; a line is written whole.
void LogEvent(LogSeverity severity, std::string_view event,
              const nlohmann::json& fields = nlohmann::json::object());

}  // namespace nestor
