#include "nestor/text_input.h"

#include <cstdio>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "base/file.h"
#include "base/status_macros.h"
#include "engine/unicode.h"
#include "nestor/flags.h"

namespace nestor {

absl::StatusOr<std::string> ReadFileOrStdin(const std::string& path) {
  if (path != "-") return ReadFile(path);
  std::string text;
  char buffer[1 << 14];
  size_t size;
  while ((size = std::fread(buffer, 1, sizeof(buffer), stdin)) > 0) text.append(buffer, size);
  if (std::ferror(stdin)) return absl::InternalError("stdin: cannot be read");
  return text;
}

absl::Status CheckUtf8(const std::string& name, const std::string& text) {
  if (IsValidUtf8(text)) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(name, ": is not UTF-8"));
}

absl::StatusOr<std::string> ReadText(const std::vector<std::string>& positional,
                                     const std::optional<std::string>& file,
                                     const std::string& flag) {
  if (positional.size() + (file ? 1 : 0) != 1) {
    return UsageError(absl::StrCat("expected one text, or --", flag, " FILE; got ",
                                   positional.size(), file ? " texts and a file" : " texts"));
  }
  const std::string name = file ? *file : "the text";
  std::string text;
  if (file || positional[0] == "-") {
    NESTOR_ASSIGN_OR_RETURN(text, ReadFileOrStdin(file ? *file : positional[0]));
  } else {
    text = positional[0];
  }
  NESTOR_RETURN_IF_ERROR(CheckUtf8(name, text));
  return text;
}

std::vector<std::string> NonEmptyLines(const std::string& text) {
  std::vector<std::string> lines;
  for (absl::string_view line : absl::StrSplit(text, '\n')) {
    if (!line.empty() && line.back() == '\r') line.remove_suffix(1);
    if (!line.empty()) lines.emplace_back(line);
  }
  return lines;
}

absl::StatusOr<std::vector<int>> ParseIntegers(const std::string& flag, const std::string& text,
                                               int min, int max) {
  std::vector<int> integers;
  for (absl::string_view entry : absl::StrSplit(text, ',')) {
    int value;
    if (!absl::SimpleAtoi(entry, &value) || value < min || value > max) {
      return UsageError(absl::StrCat("--", flag, ": expected integers from ", min, " to ", max,
                                     " with commas between them; got \"", entry, "\""));
    }
    integers.push_back(value);
  }
  return integers;
}

}  // namespace nestor
