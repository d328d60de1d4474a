#pragma once

#include <map>
#include <memory>
#include <optional>
#include <span>
#include <thread>
#include <unordered_map>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/mutex.h"
#include "engine/engine.h"
#include "engine/speculation.h"
#include "server/events.h"
#include "server/running_task.h"
#include "server/scheduler/cost_model.h"
#include "server/scheduler/ladder.h"
#include "server/scheduler/speculation.h"
#include "server/scheduler/step_planner.h"
#include "server/scheduler/task_queue.h"
#include "server/task.h"

namespace nestor {

struct WorkerOptions {
  StepLimits limits;
  int64_t max_queue = 0;
  int64_t max_running = 0;
  int max_drafts = 0;      // of a round of speculation; 0: none
  Duration stall_limit{};  // how long a sequence may wait for its reader
  std::vector<int32_t> end_tokens;
};

// Owns the engine and the thread that runs it: plan a step, run it, sample, emit, finish, learn.
//
// Thread-safe. A task has one owner at a time: the queue until a step takes it, then the worker's
// thread. It ends in exactly one call of its output's Finish, on the worker's thread or on the one
// that called Cancel.
class Worker {
 public:
  // `events` is borrowed and must outlive the worker. `cost_model` holds the warm-up's measures.
  Worker(std::unique_ptr<Engine> engine, Ladder ladder, CostModel cost_model, WorkerOptions options,
         Events* events);
  // Ends what is left with UNAVAILABLE.
  ~Worker();

  // Accepts all of `tasks`, or none. The statuses of Admit; on an error no output is called. Does
  // not block.
  absl::StatusOr<std::vector<TaskId>> Submit(std::vector<std::unique_ptr<Task>> tasks);
  // Ends the task with CANCELLED (DEADLINE_EXCEEDED where its deadline has passed): at once where
  // it waits, before the next step where it runs. Nothing happens where it has ended.
  void Cancel(TaskId id);
  // The reader of a paused task has room again.
  void Resume(TaskId id);

  // From now on Submit returns UNAVAILABLE.
  void CloseAdmission();
  // Waits until nothing waits or runs; false where `limit` came first.
  bool WaitUntilIdle(TimePoint limit);
  // Ends every task: UNAVAILABLE, finish reason kDrain.
  void EndAll();

 private:
  // What other threads ask of the worker's thread.
  struct Inbox {
    std::vector<TaskId> cancelled;
    std::vector<TaskId> resumed;
    bool ends_all = false;
    bool stops = false;
  };

  void Run();
  // Waits for news, at most until `wait_until`; none: does not wait.
  Inbox TakeInbox(std::optional<TimePoint> wait_until);
  void EndCancelled(const std::vector<TaskId>& ids, TimePoint now);
  void EndWaiting(const std::vector<std::unique_ptr<Task>>& tasks, Failure failure,
                  const absl::Status& status, FinishReason reason);
  void EndAllTasks();
  void EndExpired(TimePoint now);
  void StartWaiting(TimePoint now);
  // False where nothing can run now.
  bool RunStep();
  // Fills in snapshot_ and step_tasks_.
  void TakeSnapshot();
  // Fills in plan_ from decision_. Returns its number of rows.
  int64_t FillPlan();
  // Fills in rows_by_level_ with what ran, which may be above the level decided on.
  void CountExecutedRows();
  // Hands out what decision_ and result_ say.
  void ApplyResult();
  // True where the only thing to do is to decode one generation, which may speculate.
  bool IsSingleStream();
  // Runs the step as a round of speculation.
  void RunRound(RunningTask* task, const StepDecision::Entry& planned,
                const SpeculationChoice& choice);
  // What came of drawing a token.
  struct Drawn {
    int32_t token = 0;
    std::optional<FinishReason> end;
    bool has_room = true;
  };
  // Draws and emits the next token of a generation.
  Drawn Draw(RunningTask* task, std::span<const float> logits, int level, TimePoint now);
  // Ends or pauses the generation where the token says so.
  void Conclude(RunningTask* task, const Drawn& drawn, TimePoint now);
  void Fail(RunningTask* task, Failure failure, const absl::Status& status);
  void FailNonFinite(RunningTask* task, int level, const absl::Status& status);
  void Complete(RunningTask* task, FinishReason reason, TaskResult result);
  // Frees the sequence and the permit, then tells the output.
  void End(RunningTask* task, const absl::Status& status, TaskResult result);
  void ReportLoad();
  // When the loop must look again although nobody calls: a deadline, a stall limit.
  TimePoint NextTimer();
  std::vector<std::unique_ptr<Task>> TakeWaiting(const std::vector<TaskId>& ids)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const std::unique_ptr<Engine> engine_;
  const Ladder ladder_;
  const WorkerOptions options_;
  Events* const events_;

  // The worker thread's own.
  CostModel cost_model_;
  SpeculationPolicy speculation_;
  SpeculativeRound round_;
  std::map<TaskId, std::unique_ptr<RunningTask>> running_;
  // The step in hand; kept so that a steady step does not allocate.
  StepSnapshot snapshot_;
  std::vector<RunningTask*> step_tasks_;  // as in snapshot_
  StepDecision decision_;
  StepPlan plan_;  // entry by entry as in decision_, like the next
  StepResult result_;
  std::vector<int64_t> rows_by_level_;  // that ran

  Mutex mutex_;
  CondVar has_news_;
  CondVar is_idle_;
  TaskQueue queue_ ABSL_GUARDED_BY(mutex_);
  std::unordered_map<TaskId, std::unique_ptr<Task>> waiting_ ABSL_GUARDED_BY(mutex_);
  Inbox inbox_ ABSL_GUARDED_BY(mutex_);
  bool has_inbox_ ABSL_GUARDED_BY(mutex_) = false;
  bool is_closed_ ABSL_GUARDED_BY(mutex_) = false;
  int64_t num_tasks_ ABSL_GUARDED_BY(mutex_) = 0;  // waiting and running
  TaskId next_id_ ABSL_GUARDED_BY(mutex_) = 1;
  // Mean time between two ends, the base of the retry hint.
  Duration end_interval_ ABSL_GUARDED_BY(mutex_);
  TimePoint last_end_ ABSL_GUARDED_BY(mutex_);

  std::thread thread_;
};

}  // namespace nestor
