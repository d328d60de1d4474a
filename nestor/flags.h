#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace nestor {

// The flags of one command: `--name value`, `--name=value`, and `--name` for a bool
// (`--name=false`). `--` ends the flags; a lone `-` is an argument, not a flag.
//
//   Flags flags("nestor evaluate ARTIFACT --text FILE", "nestor evaluate models/x.nested ...");
//   flags.Add("text", &text, "held-out text, UTF-8");
//   NESTOR_ASSIGN_OR_RETURN(std::vector<std::string> positional, flags.Parse(args));
class Flags {
 public:
  using Target = std::variant<bool*, int64_t*, double*, std::string*, std::optional<int64_t>*,
                              std::optional<double>*, std::optional<bool>*,
                              std::optional<std::string>*, std::optional<absl::Duration>*,
                              std::vector<std::string>*>;  // the last: may be given several times

  // `usage` is a line with the command and its arguments, and what it does below; `example` one
  // or more command lines.
  Flags(std::string usage, std::string example);
  // `target` is borrowed and holds the default.
  void Add(std::string name, Target target, std::string description);

  // The arguments that are no flags. A UsageError names an unknown flag, one given twice, or a
  // value that does not parse, with the value. `--help` gives a HelpRequest with Help().
  absl::StatusOr<std::vector<std::string>> Parse(const std::vector<std::string>& arguments) const;
  // Usage, every flag with its default, and the example.
  std::string Help() const;

 private:
  struct Flag {
    std::string name;
    Target target;
    std::string description;
  };
  absl::StatusOr<const Flag*> Find(const std::string& name) const;

  const std::string usage_;
  const std::string example_;
  std::vector<Flag> flags_;
};

// INVALID_ARGUMENT, told apart from what a server or a file is blamed for: the command line itself
// is wrong (exit code 2).
absl::Status UsageError(const std::string& message);
bool IsUsageError(const absl::Status& status);

// Not a failure: the command was asked for its help text, which is the message.
absl::Status HelpRequest(const std::string& help);
bool IsHelpRequest(const absl::Status& status);

// "200ms", "1.5s", "2m". A UsageError names the flag and the value; a length that is not finite is
// one too.
absl::StatusOr<absl::Duration> ParseDurationFlag(const std::string& name, const std::string& value);

// `value` as a 32-bit field of a request; a UsageError names the flag.
absl::StatusOr<int32_t> ToInt32(const std::string& name, int64_t value);

}  // namespace nestor
