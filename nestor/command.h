#pragma once

#include <string>
#include <vector>

#include "absl/status/status.h"

namespace nestor {

// One command of the `nestor` program. `run` gets the arguments behind the command's name; it
// prints its result to stdout and returns what went wrong, which main prints to stderr
// ("nestor COMMAND: CODE: MESSAGE"). `--help` comes back from Flags::Parse as a HelpRequest, which
// the command returns like an error and main prints.
struct Command {
  const char* name;
  const char* summary;
  absl::Status (*run)(const std::vector<std::string>& arguments);
};

// Each in its own file, <name>_command.cc.
absl::Status RunCompress(const std::vector<std::string>& arguments);
absl::Status RunEvaluate(const std::vector<std::string>& arguments);
absl::Status RunGenerate(const std::vector<std::string>& arguments);
absl::Status RunScore(const std::vector<std::string>& arguments);
absl::Status RunEmbed(const std::vector<std::string>& arguments);
absl::Status RunLevels(const std::vector<std::string>& arguments);
absl::Status RunHealth(const std::vector<std::string>& arguments);
absl::Status RunBench(const std::vector<std::string>& arguments);

}  // namespace nestor
