#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "server/scheduler/time.h"

namespace nestor {

// What admission looks at.
struct AdmissionSnapshot {
  bool is_closed = false;  // the server drains
  int64_t num_waiting = 0;
  int64_t max_queue = 0;
  Duration retry_after{};  // when a place in the queue may be free again
};

// A status payload: milliseconds after which a retry may succeed, as decimal text.
inline constexpr char kRetryAfterPayload[] = "nestor/retry-after-ms";

// Whether `num_tasks` more may wait; all of them or none. UNAVAILABLE while draining;
// DEADLINE_EXCEEDED where `deadline` has passed; RESOURCE_EXHAUSTED, with the payload above, where
// the queue has no room.
absl::Status Admit(const AdmissionSnapshot& snapshot, int64_t num_tasks, TimePoint deadline,
                   TimePoint now);

}  // namespace nestor
