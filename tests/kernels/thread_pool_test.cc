#include "kernels/cpu/thread_pool.h"

#include <pthread.h>
#include <sched.h>
#include <sys/resource.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/cpu_info.h"

namespace nestor {
namespace {

using ::testing::HasSubstr;

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

std::vector<int> CpusOfThisThread() {
  cpu_set_t mask;
  EXPECT_EQ(pthread_getaffinity_np(pthread_self(), sizeof(mask), &mask), 0);
  std::vector<int> cpus;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET(cpu, &mask)) cpus.push_back(cpu);
  }
  return cpus;
}

TEST(ThreadPool, PinnedWorkersRunWhereTheyShould) {
  const std::vector<int> allowed = AllowedCpus();
  if (allowed.size() < 2) GTEST_SKIP() << "one CPU";
  const int threads = static_cast<int>(std::min<size_t>(allowed.size(), 4));
  // From the last one down, so that an order by chance does not pass.
  const std::vector<int> cpus(allowed.rbegin(), allowed.rend());
  ThreadPool pool(threads);
  const absl::Status pinned = pool.PinWorkers(cpus);
  ASSERT_TRUE(pinned.ok()) << pinned;
  std::vector<int> ran_on(threads, -1);
  std::vector<std::vector<int>> masks(threads);
  std::atomic<int> arrived{0};
  // As many tasks as threads, which wait for each other: each thread has one.
  pool.Run(threads, [&](int64_t, int thread) {
    ++arrived;
    while (arrived < threads) std::this_thread::yield();
    ran_on[thread] = sched_getcpu();
    masks[thread] = CpusOfThisThread();
  });
  for (int thread = 1; thread < threads; ++thread) {
    EXPECT_EQ(ran_on[thread], cpus[thread]);
    EXPECT_EQ(masks[thread], std::vector<int>{cpus[thread]});
  }
  EXPECT_EQ(masks[0], allowed);
}

TEST(ThreadPool, PinningSaysWhatItLacks) {
  ThreadPool pool(3);
  const std::vector<int> two = {0, 1};
  const absl::Status too_few = pool.PinWorkers(two);
  EXPECT_EQ(too_few.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(too_few.message()), HasSubstr("3 threads for the 2 CPUs"));
  // CPU_SETSIZE - 1 is the highest number there is; no test machine has so many.
  const std::vector<int> absent = {0, CPU_SETSIZE - 1, 0};
  const absl::Status refused = pool.PinWorkers(absent);
  EXPECT_EQ(refused.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(refused.message()), HasSubstr("cannot pin thread 1 to CPU 1023"));
}

TEST(ThreadPool, ABackendPinsAsManyThreadsAsThereAreCpus) {
  const int cpus = static_cast<int>(AllowedCpus().size());
  EXPECT_TRUE(MakeCpuBackend({.num_threads = cpus, .pin_threads = true}).ok());
  const absl::Status status =
      MakeCpuBackend({.num_threads = cpus + 1, .pin_threads = true}).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("pin_threads: "));
}

TEST(ThreadPool, AllowedCpusAreThoseOfTheAffinityMask) {
  const std::vector<int> before = AllowedCpus();
  ASSERT_FALSE(before.empty());
  std::vector<int> restricted;
  // On a thread of its own, whose mask nobody inherits.
  std::thread([&] {
    cpu_set_t mask;
    CPU_ZERO(&mask);
    CPU_SET(before.back(), &mask);
    ASSERT_EQ(pthread_setaffinity_np(pthread_self(), sizeof(mask), &mask), 0);
    restricted = AllowedCpus();
  }).join();
  EXPECT_EQ(restricted, std::vector<int>{before.back()});
  EXPECT_EQ(AllowedCpus(), before);
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
