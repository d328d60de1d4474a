#include "server/scheduler/admission.h"

#include <algorithm>

#include "absl/strings/cord.h"
#include "absl/strings/str_cat.h"

namespace nestor {

absl::Status Admit(const AdmissionSnapshot& snapshot, int64_t num_tasks, TimePoint deadline,
                   TimePoint now) {
  if (snapshot.is_closed) return absl::UnavailableError("the server is shutting down");
  if (deadline <= now) return absl::DeadlineExceededError("the deadline passed before admission");
  if (snapshot.num_waiting + num_tasks <= snapshot.max_queue) return absl::OkStatus();
  const int64_t milliseconds = std::max<int64_t>(
      1, std::chrono::ceil<std::chrono::milliseconds>(snapshot.retry_after).count());
  absl::Status status = absl::ResourceExhaustedError(
      absl::StrCat("the queue is full: ", snapshot.num_waiting, " of ", snapshot.max_queue,
                   " waiting; retry after ", milliseconds, " ms"));
  status.SetPayload(kRetryAfterPayload, absl::Cord(absl::StrCat(milliseconds)));
  return status;
}

}  // namespace nestor
