#include "base/mutex.h"

#include <chrono>
#include <thread>

#include "gtest/gtest.h"

namespace nestor {
namespace {

TEST(MutexTest, ANotifiedWaiterSeesWhatChanged) {
  Mutex mutex;
  CondVar changed;
  bool is_set = false;
  std::jthread setter([&] {
    MutexLock lock(&mutex);
    is_set = true;
    changed.NotifyAll();
  });
  MutexLock lock(&mutex);
  while (!is_set) changed.Wait(&mutex);
  EXPECT_TRUE(is_set);
}

TEST(MutexTest, ATimeInThePastDoesNotWait) {
  Mutex mutex;
  CondVar changed;
  MutexLock lock(&mutex);
  EXPECT_FALSE(changed.WaitUntil(&mutex, std::chrono::steady_clock::time_point::min()));
}

}  // namespace
}  // namespace nestor
