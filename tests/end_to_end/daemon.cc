#include "tests/end_to_end/daemon.h"

#include <filesystem>
#include <random>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "base/file.h"
#include "base/status_macros.h"
#include "nlohmann/json.hpp"
#include "tests/end_to_end/http.h"

namespace nestor {
namespace {

constexpr absl::Duration kStartLimit = absl::Minutes(2);

// Of the log's line that says it is serving.
absl::StatusOr<int> MetricsPortFrom(const std::string& log) {
  for (const absl::string_view line : absl::StrSplit(log, '\n')) {
    const auto json = nlohmann::json::parse(line.begin(), line.end(), nullptr, false);
    if (json.is_object() && json.value("event", "") == "serving") {
      return json.value("metrics_port", 0);
    }
  }
  return absl::InternalError("the log has no line with the event \"serving\"");
}

}  // namespace

absl::Status WriteProse(const std::string& path, size_t num_bytes) {
  static constexpr const char* kWords[] = {
      "the",   "river", "runs",  "slowly", "under", "an",   "old", "stone", "bridge",
      "while", "seven", "birds", "sing",   "about", "rain", "and", "bread", "children"};
  std::mt19937 random(7);
  std::string text;
  while (text.size() < num_bytes) {
    const int num_words = 4 + static_cast<int>(random() % 9);
    for (int i = 0; i < num_words; ++i) {
      absl::StrAppend(&text, i == 0 ? "" : " ", kWords[random() % std::size(kWords)]);
    }
    text += ".\n";
  }
  return WriteFileAtomically(path, text);
}

absl::StatusOr<std::unique_ptr<Daemon>> Daemon::Start(const std::string& model,
                                                      const std::vector<std::string>& settings) {
  std::unique_ptr<Daemon> daemon(new Daemon());
  const std::string port_file = daemon->directory_.path() + "/port";
  std::vector<std::string> arguments = {
      "--model",     model,     "--listen", "127.0.0.1:0",
      "--port-file", port_file, "--set",    "metrics.listen=127.0.0.1:0"};
  for (const std::string& setting : settings) {
    arguments.push_back("--set");
    arguments.push_back(setting);
  }
  NESTOR_ASSIGN_OR_RETURN(daemon->program_, Program::Start(NESTORD_PROGRAM, arguments));
  Program& program = *daemon->program_;
  const bool has_news = WaitUntil(
      kStartLimit, [&] { return std::filesystem::exists(port_file) || program.has_ended(); });
  if (!has_news || program.has_ended()) {
    return absl::InternalError(absl::StrCat("nestord did not start: ", program.err()));
  }
  // The log's line follows the port file.
  WaitUntil(kStartLimit, [&] { return MetricsPortFrom(program.err()).ok(); });
  NESTOR_ASSIGN_OR_RETURN(daemon->metrics_port_, MetricsPortFrom(program.err()));
  NESTOR_ASSIGN_OR_RETURN(const std::string port, ReadFile(port_file));
  daemon->address_ = absl::StrCat("127.0.0.1:", absl::StripAsciiWhitespace(port));
  return daemon;
}

std::vector<std::string> Daemon::Arguments(std::vector<std::string> arguments) const {
  arguments.push_back("--server=" + address_);
  return arguments;
}

ProgramResult Daemon::Run(const std::vector<std::string>& arguments) const {
  return RunNestor(Arguments(arguments));
}

absl::StatusOr<double> Daemon::Metric(const std::string& name) const {
  NESTOR_ASSIGN_OR_RETURN(const std::string page, HttpGet(metrics_port_, "/metrics"));
  for (const absl::string_view line : absl::StrSplit(page, '\n')) {
    double value;
    if (absl::StartsWith(line, name + " ") &&
        absl::SimpleAtod(line.substr(name.size() + 1), &value)) {
      return value;
    }
  }
  return absl::NotFoundError(absl::StrCat("/metrics has no ", name));
}

}  // namespace nestor
