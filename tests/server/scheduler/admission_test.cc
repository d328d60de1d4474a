#include "server/scheduler/admission.h"

#include "absl/strings/cord.h"
#include "gtest/gtest.h"

namespace nestor {
namespace {

const TimePoint kNow = TimePoint(std::chrono::hours(1));

TEST(AdmissionTest, TasksAreAdmittedWhileTheQueueHasRoom) {
  const AdmissionSnapshot snapshot = {.num_waiting = 3, .max_queue = 5};
  EXPECT_TRUE(Admit(snapshot, 2, TimePoint::max(), kNow).ok());
}

TEST(AdmissionTest, AllTasksOfACallOrNone) {
  const AdmissionSnapshot snapshot = {
      .num_waiting = 3, .max_queue = 5, .retry_after = std::chrono::microseconds(2500)};
  const absl::Status status = Admit(snapshot, 3, TimePoint::max(), kNow);
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  ASSERT_TRUE(status.GetPayload(kRetryAfterPayload).has_value());
  EXPECT_EQ(std::string(*status.GetPayload(kRetryAfterPayload)), "3");
}

TEST(AdmissionTest, DrainingServerIsUnavailable) {
  const AdmissionSnapshot snapshot = {.is_closed = true, .max_queue = 5};
  EXPECT_EQ(Admit(snapshot, 1, TimePoint::max(), kNow).code(), absl::StatusCode::kUnavailable);
}

TEST(AdmissionTest, PassedDeadlineIsRefused) {
  EXPECT_EQ(Admit({.max_queue = 5}, 1, kNow, kNow).code(), absl::StatusCode::kDeadlineExceeded);
}

}  // namespace
}  // namespace nestor
