#pragma once

#include <chrono>

namespace nestor {

// Intervals and deadlines inside the server. Wall-clock time appears only at the wire.
using Clock = std::chrono::steady_clock;
using TimePoint = Clock::time_point;
using Duration = Clock::duration;

inline double SecondsOf(Duration duration) {
  return std::chrono::duration<double>(duration).count();
}

inline Duration DurationOfSeconds(double seconds) {
  return std::chrono::duration_cast<Duration>(std::chrono::duration<double>(seconds));
}

}  // namespace nestor
