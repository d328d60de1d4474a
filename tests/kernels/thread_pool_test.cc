#include "kernels/cpu/thread_pool.h"

#include <sys/resource.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <vector>

#include "gtest/gtest.h"

namespace nestor {
namespace {

TEST(ThreadPool, RunsEveryTaskOfEveryPhaseOnce) {
  for (const int threads : {1, 2, 3, 8}) {
    ThreadPool pool(threads);
    std::vector<int> counts(100);
    for (int phase = 0; phase < 3000; ++phase) {
      const int64_t tasks = phase % 100;
      pool.Run(tasks, [&](int64_t task, int thread) {
        ASSERT_LT(thread, threads);
        ++counts[task];
      });
    }
    for (int task = 0; task < 100; ++task) EXPECT_EQ(counts[task], 30 * (99 - task));
  }
}

TEST(ThreadPool, APhaseSeesWhatTheOneBeforeWrote) {
  ThreadPool pool(3);
  std::vector<int64_t> values(64, 1);
  std::vector<int64_t> next(64);
  for (int phase = 0; phase < 500; ++phase) {
    pool.Run(64, [&](int64_t i, int) { next[i] = values[63 - i] + 1; });
    values.swap(next);
  }
  for (const int64_t value : values) EXPECT_EQ(value, 501);
}

TEST(ThreadPool, RangesCoverTheirTotal) {
  ThreadPool pool(2);
  std::vector<int> counts(103);
  std::atomic<int> ranges{0};
  pool.RunRanges(103, 10, [&](int64_t begin, int64_t end, int) {
    ++ranges;
    for (int64_t i = begin; i < end; ++i) ++counts[i];
  });
  EXPECT_EQ(ranges, 11);
  EXPECT_EQ(counts, std::vector<int>(103, 1));
}

TEST(ThreadPool, WorkersTakePart) {
  ThreadPool pool(2);
  std::atomic<int> arrived{0};
  // Both tasks wait for each other, so one thread alone would hang.
  pool.Run(2, [&](int64_t, int) {
    ++arrived;
    while (arrived < 2) {
    }
  });
  EXPECT_EQ(arrived, 2);
}

double CpuSeconds() {
  rusage usage;
  getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& time) {
    return static_cast<double>(time.tv_sec) + 1e-6 * static_cast<double>(time.tv_usec);
  };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

TEST(ThreadPool, AnIdlePoolUsesNoCpu) {
  ThreadPool pool(4);
  pool.Run(100, [](int64_t, int) {});
  // A condition that nobody signals: windows of 100 ms in which this thread does nothing. The best
  // of five, since the first may still see threads start; workers that spin would fill them all.
  std::mutex mutex;
  std::condition_variable never;
  std::unique_lock<std::mutex> lock(mutex);
  double least = 1;
  for (int window = 0; window < 5; ++window) {
    const double before = CpuSeconds();
    never.wait_for(lock, std::chrono::milliseconds(100), [] { return false; });
    least = std::min(least, CpuSeconds() - before);
  }
  EXPECT_LT(least, 0.01);
  // And it wakes up again.
  std::atomic<int> count{0};
  pool.Run(1000, [&](int64_t, int) { ++count; });
  EXPECT_EQ(count, 1000);
}

}  // namespace
}  // namespace nestor
