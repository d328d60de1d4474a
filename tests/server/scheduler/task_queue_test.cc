#include "server/scheduler/task_queue.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace nestor {
namespace {

using ::testing::ElementsAre;

TimePoint At(int seconds) { return TimePoint(std::chrono::seconds(seconds)); }

TEST(TaskQueueTest, ServesByPriorityAndFirstComeFirstServedInside) {
  TaskQueue queue;
  queue.Push({.id = 1, .priority = 5});
  queue.Push({.id = 2, .priority = 1});
  queue.Push({.id = 3, .priority = 5});
  queue.Push({.id = 4, .priority = 1});
  EXPECT_EQ(queue.Front()->id, 2);
  EXPECT_THAT(queue.TakeAll(), ElementsAre(2, 4, 1, 3));
  EXPECT_EQ(queue.size(), 0);
}

TEST(TaskQueueTest, RemovedTaskIsGone) {
  TaskQueue queue;
  queue.Push({.id = 1});
  queue.Push({.id = 2});
  EXPECT_TRUE(queue.Remove(1));
  EXPECT_FALSE(queue.Remove(1));
  EXPECT_EQ(queue.Front()->id, 2);
  EXPECT_EQ(queue.size(), 1);
}

TEST(TaskQueueTest, ExpiredTasksLeaveWhereverTheyStand) {
  TaskQueue queue;
  queue.Push({.id = 1, .deadline = At(30)});
  queue.Push({.id = 2, .deadline = At(10)});
  queue.Push({.id = 3});
  EXPECT_EQ(queue.EarliestDeadline(), At(10));
  EXPECT_THAT(queue.TakeExpired(At(9)), ElementsAre());
  EXPECT_THAT(queue.TakeExpired(At(10)), ElementsAre(2));
  EXPECT_EQ(queue.EarliestDeadline(), At(30));
  EXPECT_THAT(queue.TakeExpired(At(99)), ElementsAre(1));
  EXPECT_EQ(queue.EarliestDeadline(), TimePoint::max());
}

}  // namespace
}  // namespace nestor
