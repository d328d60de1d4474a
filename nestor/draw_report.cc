#include "nestor/draw_report.h"

#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <filesystem>
#include <iostream>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/file.h"
#include "base/status_macros.h"

namespace nestor {
namespace {

namespace fs = std::filesystem;

constexpr int kNoMatplotlib = 3;  // as scripts/report.py exits

// The source tree that this program was built in; empty where it was installed elsewhere.
fs::path SourceTree() {
  std::error_code error;
  for (fs::path path = fs::read_symlink("/proc/self/exe", error); path.has_relative_path();
       path = path.parent_path()) {
    if (fs::exists(path / "scripts" / "report.py", error)) return path;
  }
  return {};
}

// Runs a program to its end, its output on stderr. Its exit code, -1 where it does not start.
int Run(const std::vector<std::string>& words) {
  std::vector<char*> arguments;
  for (const std::string& word : words) arguments.push_back(const_cast<char*>(word.c_str()));
  arguments.push_back(nullptr);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, STDERR_FILENO, STDOUT_FILENO);
  pid_t child = 0;
  const int error =
      posix_spawnp(&child, arguments[0], &actions, nullptr, arguments.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  if (error != 0) return -1;
  int status = 0;
  while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

}  // namespace

absl::Status WriteReport(const nlohmann::json& report, const std::string& directory) {
  std::error_code error;
  fs::create_directories(directory, error);
  if (error) return FileError(directory, error.value());
  const std::string path = (fs::path(directory) / "report.json").string();
  NESTOR_RETURN_IF_ERROR(WriteFileAtomically(path, report.dump(1) + "\n"));
  const fs::path tree = SourceTree();
  if (tree.empty()) {
    std::cerr << "No pictures: scripts/report.py is not near this program. Drawn by: "
              << "python3 scripts/report.py " << path << "\n";
    return absl::OkStatus();
  }
  const std::string script = (tree / "scripts" / "report.py").string();
  for (const std::string& python : {(tree / ".venv/bin/python").string(), std::string("python3")}) {
    const int code = Run({python, script, path});
    if (code == 0) {
      std::cerr << "Wrote " << (fs::path(directory) / "report.html").string() << "\n";
      return absl::OkStatus();
    }
    if (code != -1 && code != kNoMatplotlib) {
      std::cerr << "No pictures: " << python << " " << script << " " << path << " failed\n";
      return absl::OkStatus();
    }
  }
  std::cerr << "No pictures: no Python with matplotlib (pip install -r requirements-plots.txt). "
            << "Drawn by: python3 " << script << " " << path << "\n";
  return absl::OkStatus();
}

}  // namespace nestor
