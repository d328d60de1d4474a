#include "base/progress.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <utility>

#include "absl/strings/str_format.h"

namespace nestor {
namespace {

constexpr std::chrono::milliseconds kTerminalInterval(200);
constexpr std::chrono::milliseconds kFileInterval(10000);
constexpr int kBarWidth = 30;

std::string FormatSeconds(double seconds) {
  const int whole = static_cast<int>(seconds + 0.5);
  if (whole < 60) return absl::StrFormat("%ds", whole);
  return absl::StrFormat("%dm%02ds", whole / 60, whole % 60);
}

}  // namespace

Progress::Progress(std::string title, int64_t total)
    : title_(std::move(title)),
      total_(std::max<int64_t>(total, 1)),
      is_terminal_(::isatty(STDERR_FILENO) == 1),
      start_(std::chrono::steady_clock::now()),
      last_drawn_(start_) {}

Progress::~Progress() { Draw(true); }

void Progress::Advance(int64_t amount) {
  done_ = std::min(done_ + amount, total_);
  const auto now = std::chrono::steady_clock::now();
  if (now - last_drawn_ < (is_terminal_ ? kTerminalInterval : kFileInterval)) return;
  last_drawn_ = now;
  Draw(false);
}

void Progress::Draw(bool is_last) {
  const double elapsed =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  const double fraction = static_cast<double>(done_) / static_cast<double>(total_);
  std::string bar(static_cast<size_t>(fraction * kBarWidth), '#');
  bar.resize(kBarWidth, '.');
  const std::string time =
      is_last      ? absl::StrFormat("in %s", FormatSeconds(elapsed))
      : done_ == 0 ? "estimating"
                   : absl::StrFormat("%s left", FormatSeconds(elapsed / fraction - elapsed));
  const std::string line =
      absl::StrFormat("%-28s [%s] %3.0f%% %s", title_, bar, 100 * fraction, time);
  if (is_terminal_) {
    std::fprintf(stderr, "\r%s\033[K%s", line.c_str(), is_last ? "\n" : "");
  } else {
    std::fprintf(stderr, "%s\n", line.c_str());
  }
  std::fflush(stderr);
}

}  // namespace nestor
