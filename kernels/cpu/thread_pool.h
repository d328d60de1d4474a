#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <span>
#include <thread>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"

namespace nestor {

// Runs the phases of a step: each a number of independent tasks, done when all are done.
//
// Every thread starts with its own share of the tasks, a contiguous range, and then takes over
// what others have left. So phases that split the same rows the same way keep them in the same
// core's caches, and a core that other programs slow down does not hold the phase up.
//
// Workers spin for some microseconds after a phase, so that the phases of one step follow each
// other without system calls, and then sleep until the next one; an idle pool uses no CPU. One
// thread owns the pool and calls it.
class ThreadPool {
 public:
  using Task = absl::FunctionRef<void(int64_t task, int thread)>;

  // `num_threads` includes the caller. REQUIRES: num_threads >= 1.
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return num_threads_; }

  // Has worker i run on cpus[i] alone, 1 <= i < num_threads. cpus[0] is left to the caller, which
  // is not pinned: every thread that it starts would be, too. INVALID_ARGUMENT where there are
  // fewer CPUs than threads; FAILED_PRECONDITION names the CPU that the system refuses.
  absl::Status PinWorkers(std::span<const int> cpus);

  // Calls task(i, thread) for every i in [0, num_tasks), `thread` in [0, num_threads) being unique
  // among those that run at the same time; the caller takes part as thread 0. Returns when all
  // have returned; what they wrote is visible then. Does not allocate.
  // REQUIRES: 0 <= num_tasks < 2^20 for each thread; not called from a task.
  void Run(int64_t num_tasks, Task task);

  // The same over ranges [begin, end) of at most `grain` items of [0, total).
  using RangeTask = absl::FunctionRef<void(int64_t begin, int64_t end, int thread)>;
  void RunRanges(int64_t total, int64_t grain, RangeTask task);

 private:
  // A share of the phase's tasks as one word: phase number (24 bits), next task, end (20 bits
  // each, from `first`). A claim is a compare and swap on it, so that it always belongs to the
  // phase that is running, and a phase need not wait for workers that still sleep.
  struct alignas(64) Share {
    std::atomic<uint64_t> ticket{0};
    int64_t first = 0;  // written before `ticket`, read after a claim
  };

  void WorkerLoop(int thread);
  // Claims and runs tasks, the thread's own share first, until none is left.
  void RunTasks(int thread);
  // Spins, then sleeps, until the phase of the thread's share differs from `seen`; returns it.
  uint64_t WaitForPhase(int thread, uint64_t seen);

  const int num_threads_;
  std::vector<Share> shares_;
  const Task* task_ = nullptr;  // written before the tickets, read after a claim
  std::atomic<int64_t> done_{0};
  std::atomic<bool> is_stopping_{false};
  std::atomic<int> num_sleeping_{0};
  std::mutex mutex_;  // guards nothing but the sleep itself
  std::condition_variable wake_;
  std::vector<std::thread> workers_;
};

}  // namespace nestor
