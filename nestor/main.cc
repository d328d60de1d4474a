#include <cerrno>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_format.h"
#include "nestor/command.h"
#include "nestor/flags.h"

namespace nestor {
namespace {

constexpr int kExitFailure = 1;
constexpr int kExitUsage = 2;

constexpr Command kCommands[] = {
    {"compress", "make a nested artifact from a checkpoint", RunCompress},
    {"evaluate", "quality and cost of every level of an artifact", RunEvaluate},
    {"generate", "continue a prompt at a budget, streaming", RunGenerate},
    {"score", "log-probability of every token of a text", RunScore},
    {"embed", "embeddings of texts, or similarities of pairs", RunEmbed},
    {"levels", "the levels that a daemon serves", RunLevels},
    {"health", "whether a daemon is ready", RunHealth},
    {"bench", "speed of every level on this machine, without a daemon", RunBench},
};

void PrintOverview(FILE* out) {
  absl::FPrintF(out,
                "Usage: nestor COMMAND [arguments]\n\n"
                "Compresses, evaluates and measures nested models, and talks to nestord.\n\n"
                "Commands:\n");
  for (const Command& command : kCommands) {
    absl::FPrintF(out, "  %-10s %s\n", command.name, command.summary);
  }
  absl::FPrintF(
      out,
      "\n`nestor help COMMAND` prints a command's flags and an example; `nestor --version` "
      "the version.\n");
}

const Command* FindCommand(const std::string& name) {
  for (const Command& command : kCommands) {
    if (name == command.name) return &command;
  }
  return nullptr;
}

int UnknownCommand(const std::string& name) {
  absl::FPrintF(stderr, "nestor: unknown command \"%s\"; `nestor help` lists the commands\n", name);
  return kExitUsage;
}

int RunCommand(const Command& command, const std::vector<std::string>& arguments) {
  const absl::Status status = command.run(arguments);
  // What the command printed comes before what it failed with, whatever the streams' buffering.
  if (std::fflush(stdout) != 0 && status.ok()) {
    absl::FPrintF(stderr, "nestor %s: stdout: %s\n", command.name, std::strerror(errno));
    return kExitFailure;
  }
  if (status.ok()) return 0;
  const std::string message(status.message());
  if (IsHelpRequest(status)) {
    absl::FPrintF(stdout, "%s", message);
    return 0;
  }
  if (IsUsageError(status)) {
    absl::FPrintF(stderr, "nestor %s: %s\n`nestor help %s` shows its flags.\n", command.name,
                  message, command.name);
    return kExitUsage;
  }
  absl::FPrintF(stderr, "nestor %s: %s: %s\n", command.name,
                absl::StatusCodeToString(status.code()), message);
  return kExitFailure;
}

int Main(const std::vector<std::string>& arguments) {
  if (arguments.empty()) {
    PrintOverview(stderr);
    return kExitUsage;
  }
  const std::string& name = arguments[0];
  if (name == "--version") {
    absl::FPrintF(stdout, "nestor %s\n", NESTOR_VERSION);
    return 0;
  }
  if (name == "help" || name == "--help" || name == "-h") {
    if (arguments.size() < 2) {
      PrintOverview(stdout);
      return 0;
    }
    const Command* command = FindCommand(arguments[1]);
    return command == nullptr ? UnknownCommand(arguments[1]) : RunCommand(*command, {"--help"});
  }
  const Command* command = FindCommand(name);
  if (command == nullptr) return UnknownCommand(name);
  return RunCommand(*command, {arguments.begin() + 1, arguments.end()});
}

}  // namespace
}  // namespace nestor

int main(int argc, char** argv) {
  return nestor::Main(std::vector<std::string>(argv + 1, argv + argc));
}
