#pragma once

#include <chrono>
#include <cstdint>
#include <string>

namespace nestor {

// A progress bar on stderr with the time left, redrawn in place on a terminal and printed as one
// line every few seconds elsewhere. Not thread-safe.
class Progress {
 public:
  Progress(std::string title, int64_t total);
  // Prints the final line with the time it took.
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  void Advance(int64_t amount = 1);

 private:
  void Draw(bool is_last);

  const std::string title_;
  const int64_t total_;
  const bool is_terminal_;
  const std::chrono::steady_clock::time_point start_;
  std::chrono::steady_clock::time_point last_drawn_;
  int64_t done_ = 0;
};

}  // namespace nestor
