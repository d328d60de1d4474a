#pragma once

#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace nestor {

// The content of `path`, or of stdin for "-".
absl::StatusOr<std::string> ReadFileOrStdin(const std::string& path);

// INVALID_ARGUMENT where `text` is not UTF-8, which a request cannot carry; `name` says whose.
absl::Status CheckUtf8(const std::string& name, const std::string& text);

// The one text of a command: its argument ("-" is stdin), or the file of --`flag`. A UsageError
// where there is none or more than one; INVALID_ARGUMENT where it is not UTF-8.
absl::StatusOr<std::string> ReadText(const std::vector<std::string>& positional,
                                     const std::optional<std::string>& file,
                                     const std::string& flag);

// Lines without their ends ("\n", "\r\n"); empty lines are left out.
std::vector<std::string> NonEmptyLines(const std::string& text);

// "1,4,16" as integers in [min, max]; a UsageError names the flag and the entry.
absl::StatusOr<std::vector<int>> ParseIntegers(const std::string& flag, const std::string& text,
                                               int min, int max);

}  // namespace nestor
