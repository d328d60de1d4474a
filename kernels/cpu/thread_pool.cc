#include "kernels/cpu/thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <chrono>
#include <system_error>

#include "absl/strings/str_cat.h"
#include "base/check.h"

namespace nestor {
namespace {

// Longer than the gap between two phases of a step, shorter than a sleep and a wake-up cost.
constexpr std::chrono::microseconds kSpinTime(50);
// Polls between two looks at the clock: about a microsecond.
constexpr int kPollsPerLook = 32;
// The caller spins this often for the last task of a phase before it lets others run.
constexpr int kPollsBeforeYield = 20000;

constexpr int kCountBits = 20;
constexpr uint64_t kCountMask = (uint64_t{1} << kCountBits) - 1;

void PauseCpu() { __builtin_ia32_pause(); }

uint64_t PhaseOf(uint64_t ticket) { return ticket >> (2 * kCountBits); }
uint64_t NextOf(uint64_t ticket) { return (ticket >> kCountBits) & kCountMask; }
uint64_t EndOf(uint64_t ticket) { return ticket & kCountMask; }
// The phase number wraps around; a wait only needs it to differ from the one before.
uint64_t TicketOf(uint64_t phase, uint64_t count) { return (phase << (2 * kCountBits)) | count; }
constexpr uint64_t kOneTask = uint64_t{1} << kCountBits;

}  // namespace

ThreadPool::ThreadPool(int num_threads)
    : num_threads_(num_threads), shares_(std::max(num_threads, 1)) {
  NESTOR_CHECK(num_threads >= 1);
  workers_.reserve(num_threads - 1);
  for (int thread = 1; thread < num_threads; ++thread)
    workers_.emplace_back([this, thread] { WorkerLoop(thread); });
}

ThreadPool::~ThreadPool() {
  is_stopping_.store(true);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    // A phase without tasks, so that every wait ends.
    for (Share& share : shares_) share.ticket.store(TicketOf(PhaseOf(share.ticket.load()) + 1, 0));
  }
  wake_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

absl::Status ThreadPool::PinWorkers(std::span<const int> cpus) {
  if (cpus.size() < static_cast<size_t>(num_threads_)) {
    return absl::InvalidArgumentError(absl::StrCat(num_threads_, " threads for the ", cpus.size(),
                                                   " CPUs that this process may run on"));
  }
  for (int thread = 1; thread < num_threads_; ++thread) {
    cpu_set_t mask;
    CPU_ZERO(&mask);
    CPU_SET(cpus[thread], &mask);
    const int error =
        pthread_setaffinity_np(workers_[thread - 1].native_handle(), sizeof(mask), &mask);
    if (error != 0) {
      return absl::FailedPreconditionError(absl::StrCat("cannot pin thread ", thread, " to CPU ",
                                                        cpus[thread], ": ",
                                                        std::generic_category().message(error)));
    }
  }
  return absl::OkStatus();
}

void ThreadPool::Run(int64_t num_tasks, Task task) {
  NESTOR_CHECK(num_tasks >= 0 && num_tasks < num_threads_ * static_cast<int64_t>(kCountMask));
  if (num_threads_ == 1 || num_tasks <= 1) {
    for (int64_t i = 0; i < num_tasks; ++i) task(i, 0);
    return;
  }
  // Nobody reads these now: every task of the last phase is done, and none can be claimed.
  done_.store(0, std::memory_order_relaxed);
  task_ = &task;
  for (int thread = 0; thread < num_threads_; ++thread)
    shares_[thread].first = num_tasks * thread / num_threads_;
  const uint64_t phase = PhaseOf(shares_[0].ticket.load(std::memory_order_relaxed)) + 1;
  for (int thread = 0; thread < num_threads_; ++thread) {
    const int64_t end = num_tasks * (thread + 1) / num_threads_;
    // Sequentially consistent with num_sleeping_: either this thread sees the sleeper, or the
    // sleeper sees the new phase.
    shares_[thread].ticket.store(
        TicketOf(phase, static_cast<uint64_t>(end - shares_[thread].first)));
  }
  if (num_sleeping_.load() > 0) {
    { std::lock_guard<std::mutex> lock(mutex_); }
    wake_.notify_all();
  }
  RunTasks(0);
  for (int polls = 0; done_.load(std::memory_order_acquire) != num_tasks; ++polls) {
    if (polls < kPollsBeforeYield) {
      PauseCpu();
    } else {
      std::this_thread::yield();
    }
  }
}

void ThreadPool::RunRanges(int64_t total, int64_t grain, RangeTask task) {
  const int64_t num_tasks = (total + grain - 1) / grain;
  Run(num_tasks,
      [&](int64_t i, int thread) { task(i * grain, std::min(total, (i + 1) * grain), thread); });
}

void ThreadPool::RunTasks(int thread) {
  for (int offset = 0; offset < num_threads_; ++offset) {
    Share& share = shares_[(thread + offset) % num_threads_];
    uint64_t ticket = share.ticket.load(std::memory_order_acquire);
    while (NextOf(ticket) < EndOf(ticket)) {
      if (!share.ticket.compare_exchange_weak(ticket, ticket + kOneTask, std::memory_order_acq_rel,
                                              std::memory_order_acquire))
        continue;
      (*task_)(share.first + static_cast<int64_t>(NextOf(ticket)), thread);
      done_.fetch_add(1, std::memory_order_release);
      ticket = share.ticket.load(std::memory_order_acquire);
    }
  }
}

uint64_t ThreadPool::WaitForPhase(int thread, uint64_t seen) {
  const std::atomic<uint64_t>& ticket = shares_[thread].ticket;
  const auto end = std::chrono::steady_clock::now() + kSpinTime;
  do {
    for (int i = 0; i < kPollsPerLook; ++i) {
      const uint64_t phase = PhaseOf(ticket.load(std::memory_order_acquire));
      if (phase != seen) return phase;
      PauseCpu();
    }
  } while (std::chrono::steady_clock::now() < end);
  std::unique_lock<std::mutex> lock(mutex_);
  num_sleeping_.fetch_add(1);
  wake_.wait(lock, [&] { return PhaseOf(ticket.load()) != seen; });
  num_sleeping_.fetch_sub(1);
  return PhaseOf(ticket.load());
}

void ThreadPool::WorkerLoop(int thread) {
  uint64_t seen = 0;
  while (true) {
    seen = WaitForPhase(thread, seen);
    if (is_stopping_.load()) return;
    RunTasks(thread);
  }
}

}  // namespace nestor
