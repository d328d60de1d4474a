#include "nestor/flags.h"

#include <algorithm>
#include <limits>
#include <type_traits>
#include <utility>

#include "absl/strings/cord.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"

namespace nestor {
namespace {

constexpr char kUsageErrorPayload[] = "nestor/usage_error";
constexpr char kHelpRequestPayload[] = "nestor/help_request";

absl::Status BadValue(const std::string& name, const std::string& value,
                      const std::string& expected) {
  return UsageError(absl::StrCat("--", name, ": expected ", expected, "; was \"", value, "\""));
}

// One overload for each type that a flag can have.
absl::Status Assign(const std::string& name, const std::string& value, bool* target) {
  if (!absl::SimpleAtob(value, target)) return BadValue(name, value, "true or false");
  return absl::OkStatus();
}

absl::Status Assign(const std::string& name, const std::string& value, int64_t* target) {
  if (!absl::SimpleAtoi(value, target)) return BadValue(name, value, "an integer");
  return absl::OkStatus();
}

absl::Status Assign(const std::string& name, const std::string& value, double* target) {
  if (!absl::SimpleAtod(value, target)) return BadValue(name, value, "a number");
  return absl::OkStatus();
}

absl::Status Assign(const std::string&, const std::string& value, std::string* target) {
  *target = value;
  return absl::OkStatus();
}

absl::Status Assign(const std::string& name, const std::string& value, absl::Duration* target) {
  NESTOR_ASSIGN_OR_RETURN(*target, ParseDurationFlag(name, value));
  return absl::OkStatus();
}

absl::Status Assign(const std::string&, const std::string& value,
                    std::vector<std::string>* target) {
  target->push_back(value);
  return absl::OkStatus();
}

template <typename T>
absl::Status Assign(const std::string& name, const std::string& value, std::optional<T>* target) {
  T parsed{};
  NESTOR_RETURN_IF_ERROR(Assign(name, value, &parsed));
  *target = std::move(parsed);
  return absl::OkStatus();
}

// What stands behind the flag's name in the help text, by type.
std::string Placeholder(bool) { return ""; }
std::string Placeholder(int64_t) { return " INTEGER"; }
std::string Placeholder(double) { return " NUMBER"; }
std::string Placeholder(const std::string&) { return " TEXT"; }
std::string Placeholder(absl::Duration) { return " DURATION"; }
std::string Placeholder(const std::vector<std::string>&) { return " TEXT ..."; }
template <typename T>
std::string Placeholder(const std::optional<T>&) {
  return Placeholder(T{});
}

std::string DefaultOf(bool) { return ""; }
std::string DefaultOf(int64_t value) { return absl::StrCat(value); }
std::string DefaultOf(double value) { return absl::StrCat(value); }
std::string DefaultOf(const std::string& value) { return value; }
std::string DefaultOf(const std::vector<std::string>&) { return ""; }
template <typename T>
std::string DefaultOf(const std::optional<T>&) {
  return "";
}

}  // namespace

absl::Status UsageError(const std::string& message) {
  absl::Status status = absl::InvalidArgumentError(message);
  status.SetPayload(kUsageErrorPayload, absl::Cord());
  return status;
}

bool IsUsageError(const absl::Status& status) {
  return status.GetPayload(kUsageErrorPayload).has_value();
}

absl::Status HelpRequest(const std::string& help) {
  absl::Status status = absl::CancelledError(help);
  status.SetPayload(kHelpRequestPayload, absl::Cord());
  return status;
}

bool IsHelpRequest(const absl::Status& status) {
  return status.GetPayload(kHelpRequestPayload).has_value();
}

absl::StatusOr<absl::Duration> ParseDurationFlag(const std::string& name,
                                                 const std::string& value) {
  absl::Duration duration;
  if (!absl::ParseDuration(value, &duration) || duration == absl::InfiniteDuration() ||
      duration == -absl::InfiniteDuration()) {
    return BadValue(name, value, "a duration with its unit, such as 200ms or 1.5s");
  }
  return duration;
}

absl::StatusOr<int32_t> ToInt32(const std::string& name, int64_t value) {
  if (value < std::numeric_limits<int32_t>::min() || value > std::numeric_limits<int32_t>::max()) {
    return BadValue(name, absl::StrCat(value), "a 32-bit integer");
  }
  return static_cast<int32_t>(value);
}

Flags::Flags(std::string usage, std::string example)
    : usage_(std::move(usage)), example_(std::move(example)) {}

void Flags::Add(std::string name, Target target, std::string description) {
  flags_.push_back({std::move(name), target, std::move(description)});
}

absl::StatusOr<const Flags::Flag*> Flags::Find(const std::string& name) const {
  for (const Flag& flag : flags_) {
    if (flag.name == name) return &flag;
  }
  return UsageError(absl::StrCat("unknown flag --", name));
}

absl::StatusOr<std::vector<std::string>> Flags::Parse(
    const std::vector<std::string>& arguments) const {
  std::vector<std::string> positional;
  std::vector<const Flag*> seen;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const std::string& argument = arguments[i];
    if (argument == "--help" || argument == "-h") return HelpRequest(Help());
    if (argument == "--") {
      positional.insert(positional.end(), arguments.begin() + i + 1, arguments.end());
      break;
    }
    if (!absl::StartsWith(argument, "-") || argument == "-") {
      positional.push_back(argument);
      continue;
    }
    if (!absl::StartsWith(argument, "--")) {
      return UsageError(absl::StrCat("unknown flag ", argument,
                                     "; put -- before an argument that begins with a dash"));
    }
    const size_t equals = argument.find('=');
    NESTOR_ASSIGN_OR_RETURN(const Flag* flag, Find(argument.substr(2, equals - 2)));
    const bool is_list = std::holds_alternative<std::vector<std::string>*>(flag->target);
    if (!is_list && std::find(seen.begin(), seen.end(), flag) != seen.end()) {
      return UsageError(absl::StrCat("--", flag->name, " is given twice"));
    }
    seen.push_back(flag);
    std::string value = "true";
    if (equals != std::string::npos) {
      value = argument.substr(equals + 1);
    } else if (!std::holds_alternative<bool*>(flag->target) &&
               !std::holds_alternative<std::optional<bool>*>(flag->target)) {
      if (i + 1 == arguments.size() || absl::StartsWith(arguments[i + 1], "--")) {
        return UsageError(absl::StrCat("--", flag->name, " needs a value"));
      }
      value = arguments[++i];
    }
    NESTOR_RETURN_IF_ERROR(
        std::visit([&](auto* target) { return Assign(flag->name, value, target); }, flag->target));
  }
  return positional;
}

std::string Flags::Help() const {
  std::vector<std::string> names;
  size_t width = 0;
  for (const Flag& flag : flags_) {
    names.push_back(absl::StrCat(
        "--", flag.name,
        std::visit([](const auto* target) { return Placeholder(*target); }, flag.target)));
    width = std::max(width, names.back().size());
  }
  std::string help = absl::StrCat("Usage: ", usage_, "\n\nFlags:\n");
  for (size_t i = 0; i < flags_.size(); ++i) {
    const std::string value =
        std::visit([](const auto* target) { return DefaultOf(*target); }, flags_[i].target);
    absl::StrAppend(&help, "  ", names[i], std::string(width - names[i].size() + 2, ' '),
                    flags_[i].description,
                    value.empty() ? "" : absl::StrCat(" (default: ", value, ")"), "\n");
  }
  absl::StrAppend(&help, "\nExample:\n  ", example_, "\n");
  return help;
}

}  // namespace nestor
