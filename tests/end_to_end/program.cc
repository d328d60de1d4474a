#include "tests/end_to_end/program.h"

#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>

#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/file.h"
#include "gtest/gtest.h"

extern char** environ;

namespace nestor {
namespace {

// Ample for a sanitizer's build on a busy machine; a hang ends the test, not the run.
constexpr absl::Duration kNestorLimit = absl::Minutes(3);

std::string ContentOf(const std::string& path) {
  const absl::StatusOr<std::string> content = ReadFile(path);
  return content.ok() ? *content : "";
}

}  // namespace

absl::StatusOr<std::unique_ptr<Program>> Program::Start(const std::string& executable,
                                                        const std::vector<std::string>& arguments) {
  std::unique_ptr<Program> program(new Program());
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
  const std::pair<int, std::string> outputs[] = {
      {STDOUT_FILENO, program->directory_.path() + "/out"},
      {STDERR_FILENO, program->directory_.path() + "/err"}};
  for (const auto& [descriptor, path] : outputs) {
    posix_spawn_file_actions_addopen(&actions, descriptor, path.c_str(),
                                     O_WRONLY | O_CREAT | O_TRUNC, 0600);
  }
  std::vector<std::string> words = {executable};
  words.insert(words.end(), arguments.begin(), arguments.end());
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  const int error =
      posix_spawn(&program->pid_, executable.c_str(), &actions, nullptr, argv.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  if (error != 0) {
    program->pid_ = -1;
    return absl::InternalError(absl::StrCat(executable, ": ", std::strerror(error)));
  }
  return program;
}

Program::~Program() {
  if (pid_ == -1 || has_ended()) return;
  kill(pid_, SIGKILL);
  waitpid(pid_, nullptr, 0);
}

std::string Program::out() const { return ContentOf(directory_.path() + "/out"); }
std::string Program::err() const { return ContentOf(directory_.path() + "/err"); }

bool Program::has_ended() {
  if (exit_code_) return true;
  int status = 0;
  if (waitpid(pid_, &status, WNOHANG) != pid_) return false;
  exit_code_ = WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
  return true;
}

void Program::Signal(int signal) {
  // Never to a process that is gone: its number may be another's by now.
  if (!has_ended()) kill(pid_, signal);
}

absl::StatusOr<ProgramResult> Program::Wait(absl::Duration limit) {
  if (!WaitUntil(limit, [this] { return has_ended(); })) {
    return absl::DeadlineExceededError(absl::StrCat("still runs after ",
                                                    absl::FormatDuration(limit),
                                                    "\nstdout: ", out(), "\nstderr: ", err()));
  }
  return ProgramResult{.exit_code = *exit_code_, .out = out(), .err = err()};
}

ProgramResult RunNestor(const std::vector<std::string>& arguments) {
  const auto program = Program::Start(NESTOR_PROGRAM, arguments);
  if (!program.ok()) {
    ADD_FAILURE() << program.status();
    return {};
  }
  const auto result = (*program)->Wait(kNestorLimit);
  if (!result.ok()) {
    ADD_FAILURE() << "nestor " << arguments[0] << ": " << result.status();
    return {};
  }
  return *result;
}

}  // namespace nestor
