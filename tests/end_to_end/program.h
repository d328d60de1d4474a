#pragma once

#include <sys/types.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "tests/testing/temporary_directory.h"

namespace nestor {

// How a program ended: its exit code, or 128 + the signal that ended it.
struct ProgramResult {
  int exit_code = -1;
  std::string out;
  std::string err;
};

// A child process with its output in files. Killed, if it still runs, when this goes.
class Program {
 public:
  static absl::StatusOr<std::unique_ptr<Program>> Start(const std::string& executable,
                                                        const std::vector<std::string>& arguments);
  ~Program();
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;

  // What it has written so far.
  std::string out() const;
  std::string err() const;
  bool has_ended();
  void Signal(int signal);
  // DEADLINE_EXCEEDED, with the output, where it still runs after `limit`.
  absl::StatusOr<ProgramResult> Wait(absl::Duration limit);

 private:
  Program() = default;

  TemporaryDirectory directory_;
  pid_t pid_ = -1;
  std::optional<int> exit_code_;
};

// Waits until `condition` holds; false where it still does not after `limit`.
template <typename Condition>
bool WaitUntil(absl::Duration limit, const Condition& condition) {
  const absl::Time end = absl::Now() + limit;
  while (!condition()) {
    if (absl::Now() > end) return false;
    absl::SleepFor(absl::Milliseconds(5));
  }
  return true;
}

// Runs the `nestor` program to its end.
ProgramResult RunNestor(const std::vector<std::string>& arguments);

}  // namespace nestor
