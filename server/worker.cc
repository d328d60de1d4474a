#include "server/worker.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/json_log.h"
#include "server/scheduler/admission.h"

namespace nestor {
namespace {

// The retry hint before anything has ended.
constexpr Duration kFirstEndInterval = std::chrono::milliseconds(100);

absl::Status DrainStatus() {
  return absl::UnavailableError("the server shut down before the request had ended");
}

absl::Status DeadlineStatus(const char* where) {
  return absl::DeadlineExceededError(absl::StrCat("the deadline passed ", where));
}

// Fraction of the KV cache in use; an encoder has none.
double KvCacheUsage(const Engine& engine) {
  if (engine.num_pages() == 0) return 0;
  return 1 - static_cast<double>(engine.free_pages()) / static_cast<double>(engine.num_pages());
}

}  // namespace

Worker::Worker(std::unique_ptr<Engine> engine, Ladder ladder, CostModel cost_model,
               WorkerOptions options, Events* events)
    : engine_(std::move(engine)),
      ladder_(std::move(ladder)),
      options_(std::move(options)),
      events_(events),
      cost_model_(std::move(cost_model)),
      speculation_(ladder_, options_.max_drafts),
      round_(engine_.get()),
      snapshot_{.tasks = {},
                .limits = options_.limits,
                .cost_model = &cost_model_,
                .num_levels = ladder_.size()},
      end_interval_(kFirstEndInterval),
      last_end_(Clock::now()),
      thread_([this] { Run(); }) {}

Worker::~Worker() {
  {
    MutexLock lock(&mutex_);
    is_closed_ = true;
    inbox_.stops = true;
    has_inbox_ = true;
    has_news_.NotifyOne();
  }
  thread_.join();
}

absl::StatusOr<std::vector<TaskId>> Worker::Submit(std::vector<std::unique_ptr<Task>> tasks) {
  NESTOR_CHECK(!tasks.empty());
  const TimePoint now = Clock::now();
  MutexLock lock(&mutex_);
  const AdmissionSnapshot snapshot = {.is_closed = is_closed_,
                                      .num_waiting = queue_.size(),
                                      .max_queue = options_.max_queue,
                                      .retry_after = end_interval_};
  const absl::Status admitted =
      Admit(snapshot, static_cast<int64_t>(tasks.size()), tasks.front()->deadline, now);
  if (!admitted.ok()) return admitted;
  std::vector<TaskId> ids;
  for (std::unique_ptr<Task>& task : tasks) {
    const TaskId id = next_id_++;
    queue_.Push({.id = id,
                 .priority = task->sla.priority,
                 .deadline = task->deadline,
                 .length = static_cast<int64_t>(task->tokens.size()) + task->max_tokens});
    waiting_.emplace(id, std::move(task));
    ids.push_back(id);
  }
  num_tasks_ += static_cast<int64_t>(ids.size());
  has_inbox_ = true;
  has_news_.NotifyOne();
  return ids;
}

void Worker::Cancel(TaskId id) {
  std::vector<std::unique_ptr<Task>> tasks;
  {
    MutexLock lock(&mutex_);
    if (queue_.Remove(id)) {
      tasks = TakeWaiting({id});
    } else {
      inbox_.cancelled.push_back(id);
      has_inbox_ = true;
      has_news_.NotifyOne();
    }
  }
  if (!tasks.empty()) {
    const bool is_late = tasks.front()->deadline <= Clock::now();
    EndWaiting(
        tasks, is_late ? Failure::kDeadline : Failure::kCancelled,
        is_late ? DeadlineStatus("in the queue") : absl::CancelledError("cancelled by the client"),
        FinishReason::kComplete);
  }
}

void Worker::Resume(TaskId id) {
  MutexLock lock(&mutex_);
  inbox_.resumed.push_back(id);
  has_inbox_ = true;
  has_news_.NotifyOne();
}

void Worker::CloseAdmission() {
  MutexLock lock(&mutex_);
  is_closed_ = true;
}

bool Worker::WaitUntilIdle(TimePoint limit) {
  MutexLock lock(&mutex_);
  while (num_tasks_ > 0) {
    if (!is_idle_.WaitUntil(&mutex_, limit) && num_tasks_ > 0) return false;
  }
  return true;
}

void Worker::EndAll() {
  MutexLock lock(&mutex_);
  inbox_.ends_all = true;
  has_inbox_ = true;
  has_news_.NotifyOne();
}

void Worker::Run() {
  std::optional<TimePoint> wait_until = TimePoint::max();
  while (true) {
    const Inbox inbox = TakeInbox(wait_until);
    const TimePoint now = Clock::now();
    EndCancelled(inbox.cancelled, now);
    for (const TaskId id : inbox.resumed) {
      const auto found = running_.find(id);
      if (found != running_.end()) found->second->Resume();
    }
    if (inbox.ends_all || inbox.stops) EndAllTasks();
    if (inbox.stops) return;
    EndExpired(now);
    StartWaiting(now);
    const bool has_run = RunStep();
    ReportLoad();
    wait_until = has_run ? std::nullopt : std::make_optional(NextTimer());
  }
}

Worker::Inbox Worker::TakeInbox(std::optional<TimePoint> wait_until) {
  MutexLock lock(&mutex_);
  while (wait_until.has_value() && !has_inbox_) {
    if (*wait_until == TimePoint::max()) {
      has_news_.Wait(&mutex_);
    } else if (!has_news_.WaitUntil(&mutex_, *wait_until)) {
      break;
    }
  }
  has_inbox_ = false;
  return std::exchange(inbox_, Inbox());
}

std::vector<std::unique_ptr<Task>> Worker::TakeWaiting(const std::vector<TaskId>& ids) {
  std::vector<std::unique_ptr<Task>> tasks;
  for (const TaskId id : ids) {
    const auto found = waiting_.find(id);
    NESTOR_CHECK(found != waiting_.end());
    tasks.push_back(std::move(found->second));
    waiting_.erase(found);
  }
  return tasks;
}

void Worker::EndWaiting(const std::vector<std::unique_ptr<Task>>& tasks, Failure failure,
                        const absl::Status& status, FinishReason reason) {
  if (tasks.empty()) return;
  const TimePoint now = Clock::now();
  for (const std::unique_ptr<Task>& task : tasks) {
    TaskResult result;
    result.finish_reason = reason;
    result.usage.queue_time = now - task->arrival;
    result.usage.has_target = task->sla.has_target();
    result.usage.target_met = false;
    {
      MutexLock lock(&mutex_);
      --num_tasks_;
    }
    events_->OnFailed(failure, result.usage);
    task->output->Finish(status, std::move(result));
  }
  MutexLock lock(&mutex_);
  if (num_tasks_ == 0) is_idle_.NotifyAll();
}

void Worker::EndCancelled(const std::vector<TaskId>& ids, TimePoint now) {
  for (const TaskId id : ids) {
    const auto found = running_.find(id);
    if (found == running_.end()) continue;
    RunningTask* task = found->second.get();
    if (task->task().deadline <= now) {
      Fail(task, Failure::kDeadline, DeadlineStatus("while the request ran"));
    } else {
      Fail(task, Failure::kCancelled, absl::CancelledError("cancelled by the client"));
    }
  }
}

void Worker::EndAllTasks() {
  std::vector<std::unique_ptr<Task>> tasks;
  {
    MutexLock lock(&mutex_);
    tasks = TakeWaiting(queue_.TakeAll());
  }
  EndWaiting(tasks, Failure::kDrain, DrainStatus(), FinishReason::kDrain);
  while (!running_.empty()) {
    Fail(running_.begin()->second.get(), Failure::kDrain, DrainStatus());
  }
}

void Worker::EndExpired(TimePoint now) {
  std::vector<std::unique_ptr<Task>> tasks;
  {
    MutexLock lock(&mutex_);
    tasks = TakeWaiting(queue_.TakeExpired(now));
  }
  if (!tasks.empty()) {
    EndWaiting(tasks, Failure::kDeadline, DeadlineStatus("in the queue"), FinishReason::kComplete);
  }
  for (auto next = running_.begin(); next != running_.end();) {
    RunningTask* task = (next++)->second.get();
    if (task->task().deadline <= now) {
      Fail(task, Failure::kDeadline, DeadlineStatus("while the request ran"));
    } else if (task->is_paused() && *task->paused_since() + options_.stall_limit <= now) {
      Fail(task, Failure::kSlowReader,
           absl::AbortedError(absl::StrCat("the client did not read its stream for ",
                                           SecondsOf(options_.stall_limit), " s")));
    }
  }
}

void Worker::StartWaiting(TimePoint now) {
  while (static_cast<int64_t>(running_.size()) < options_.max_running) {
    std::optional<QueuedTask> front;
    {
      MutexLock lock(&mutex_);
      front = queue_.Front();
    }
    // The first in line waits for its room; nobody overtakes, so nobody starves.
    if (!front.has_value() || !engine_->HasRoomFor(front->length)) return;
    std::unique_ptr<Task> task;
    {
      MutexLock lock(&mutex_);
      // It may have been cancelled in between.
      if (!queue_.Remove(front->id)) continue;
      task = std::move(TakeWaiting({front->id}).front());
    }
    absl::StatusOr<SequenceId> sequence = engine_->AddSequence(front->length);
    if (!sequence.ok()) {
      std::vector<std::unique_ptr<Task>> failed;
      failed.push_back(std::move(task));
      EndWaiting(failed, Failure::kInternal, sequence.status(), FinishReason::kComplete);
      continue;
    }
    running_.emplace(front->id, std::make_unique<RunningTask>(front->id, std::move(task), *sequence,
                                                              &engine_->tokenizer(), now));
  }
}

void Worker::TakeSnapshot() {
  snapshot_.tasks.clear();
  step_tasks_.clear();
  for (const auto& [id, task] : running_) {
    if (task->is_paused()) continue;
    snapshot_.tasks.push_back(task->View());
    step_tasks_.push_back(task.get());
  }
}

int64_t Worker::FillPlan() {
  plan_.entries.clear();
  int64_t rows = 0;
  for (const StepDecision::Entry& entry : decision_.entries) {
    RunningTask* const task = step_tasks_[entry.task];
    plan_.entries.push_back(task->Entry(entry.rows, entry.level));
    for (const int level : task->task().sla.levels) plan_.entries.back().may_run |= SetOf(level);
    rows += entry.rows;
  }
  return rows;
}

void Worker::CountExecutedRows() {
  rows_by_level_.assign(ladder_.size(), 0);
  for (size_t i = 0; i < decision_.entries.size(); ++i)
    rows_by_level_[result_.entries[i].executed_level] += decision_.entries[i].rows;
}

bool Worker::RunStep() {
  TakeSnapshot();
  if (step_tasks_.empty()) return false;
  const TimePoint begin = Clock::now();
  PlanStep(snapshot_, begin, &decision_);
  const bool is_single_stream = IsSingleStream();
  if (is_single_stream) {
    const StepDecision::Entry& planned = decision_.entries.front();
    // A round verifies as many rows as it may give tokens.
    const int64_t most_tokens =
        std::min(snapshot_.tasks.front().tokens_left, options_.limits.max_step_rows);
    const SpeculationChoice choice = speculation_.Choose(planned.level, most_tokens, cost_model_);
    if (choice.num_drafts > 0) {
      RunRound(step_tasks_.front(), planned, choice);
      return true;
    }
  }
  const int64_t rows = FillPlan();
  const absl::Status status = engine_->Step(plan_, &result_);
  if (!status.ok()) {
    LogEvent(LogSeverity::kError, "step_failed", {{"error", status.ToString()}});
    for (const StepDecision::Entry& entry : decision_.entries) {
      Fail(step_tasks_[entry.task], Failure::kInternal, absl::InternalError(status.ToString()));
    }
    return true;
  }
  const Duration actual = Clock::now() - begin;
  events_->OnStep({.rows = rows, .actual = actual, .predicted = decision_.predicted});
  CountExecutedRows();
  cost_model_.Observe(rows_by_level_, actual);
  ApplyResult();
  if (is_single_stream) {
    speculation_.Observe({.verify_level = decision_.entries.front().level,
                          .num_tokens = 1,
                          .time = Clock::now() - begin},
                         cost_model_);
  }
  return true;
}

bool Worker::IsSingleStream() {
  if (options_.max_drafts == 0 || running_.size() != 1 || step_tasks_.size() != 1) return false;
  const RunningTask& task = *step_tasks_.front();
  if (!task.is_decoding() || !task.task().may_speculate) return false;
  MutexLock lock(&mutex_);
  return queue_.size() == 0;
}

void Worker::RunRound(RunningTask* task, const StepDecision::Entry& planned,
                      const SpeculationChoice& choice) {
  const TimePoint begin = Clock::now();
  const absl::Status status = round_.Run(task->RoundShape(choice, planned.level), task->sampler());
  for (const SpeculativeRound::RanStep& step : round_.steps()) {
    events_->OnStep({.rows = step.rows,
                     .actual = step.time,
                     .predicted = cost_model_.Predict(step.level, step.rows)});
    rows_by_level_.assign(ladder_.size(), 0);
    rows_by_level_[static_cast<size_t>(step.level)] = step.rows;
    cost_model_.Observe(rows_by_level_, step.time);
  }
  if (!status.ok()) {
    LogEvent(LogSeverity::kError, "step_failed", {{"error", status.ToString()}});
    Fail(task, Failure::kInternal, absl::InternalError(status.ToString()));
    return;
  }
  if (!round_.sequence_status().ok()) {
    FailNonFinite(task, planned.level, round_.sequence_status());
    return;
  }
  const TimePoint now = Clock::now();
  Drawn drawn;
  bool goes_on = true;
  while (goes_on) {
    task->AddRows(1, planned.level, ladder_[planned.level], planned.degradation);
    drawn = Draw(task, round_.logits(), planned.level, now);
    goes_on = round_.Accept(drawn.token) && !drawn.end.has_value() && drawn.has_room;
  }
  round_.Settle();
  task->AddRound(round_, ladder_);
  events_->OnSpeculation(
      {.num_drafted = round_.num_drafted(), .num_accepted = round_.num_accepted()});
  speculation_.Observe({.verify_level = planned.level,
                        .choice = choice,
                        .num_examined = std::min(round_.num_drawn(), round_.num_drafted()),
                        .num_accepted = round_.num_accepted(),
                        .num_tokens = round_.num_drawn(),
                        .time = Clock::now() - begin},
                       cost_model_);
  Conclude(task, drawn, now);
}

void Worker::ApplyResult() {
  const TimePoint now = Clock::now();
  for (size_t i = 0; i < decision_.entries.size(); ++i) {
    StepDecision::Entry planned = decision_.entries[i];
    const StepResult::Entry& ran = result_.entries[i];
    RunningTask* const task = step_tasks_[planned.task];
    if (ran.executed_level == task->task().sla.levels.front())
      planned.degradation = Degradation::kNone;
    if (!ran.status.ok()) {
      FailNonFinite(task, ran.executed_level, ran.status);
      continue;
    }
    if (!task->is_prompt_done()) {
      events_->OnTokens(ran.executed_level, TokenKind::kPrompt, planned.rows);
    }
    task->AddRows(planned.rows, ran.executed_level, ladder_[ran.executed_level],
                  planned.degradation);
    if (task->task().kind == TaskKind::kScore) task->AddLogProbabilities(ran.log_probabilities);
    if (!task->is_prompt_done()) continue;
    if (task->task().kind != TaskKind::kGenerate) {
      TaskResult done;
      done.log_probabilities = task->TakeLogProbabilities();
      if (task->task().kind == TaskKind::kEmbed) {
        done.embedding.assign(ran.values.begin(), ran.values.end());
      }
      Complete(task, FinishReason::kComplete, std::move(done));
      continue;
    }
    Conclude(task, Draw(task, ran.values, ran.executed_level, now), now);
  }
}

Worker::Drawn Worker::Draw(RunningTask* task, std::span<const float> logits, int level,
                           TimePoint now) {
  const std::optional<TimePoint> last = task->last_token();
  GeneratedToken token = task->DrawToken(logits, level, now);
  events_->OnTokens(level, TokenKind::kCompletion, 1);
  if (last.has_value()) {
    events_->OnNextToken(now - *last);
  } else {
    events_->OnFirstToken(now - task->task().arrival);
  }
  Drawn drawn = {.token = token.id, .end = task->GenerationEnd(options_.end_tokens)};
  drawn.has_room = task->output()->Push(std::move(token));
  return drawn;
}

void Worker::Conclude(RunningTask* task, const Drawn& drawn, TimePoint now) {
  if (drawn.end.has_value()) {
    Complete(task, *drawn.end, {});
  } else if (!drawn.has_room) {
    task->Pause(now);
  }
}

void Worker::FailNonFinite(RunningTask* task, int level, const absl::Status& status) {
  Fail(task, Failure::kNonFinite,
       absl::InternalError(absl::StrCat("level ", level, ": ", status.message())));
}

void Worker::Fail(RunningTask* task, Failure failure, const absl::Status& status) {
  TaskResult result;
  result.finish_reason =
      failure == Failure::kDrain ? FinishReason::kDrain : FinishReason::kComplete;
  result.text = task->TakeHeldText();
  result.usage = task->UsageAt(Clock::now());
  result.usage.target_met = false;
  events_->OnFailed(failure, result.usage);
  End(task, status, std::move(result));
}

void Worker::Complete(RunningTask* task, FinishReason reason, TaskResult result) {
  const TimePoint now = Clock::now();
  result.finish_reason = reason;
  result.text = task->TakeHeldText();
  result.usage = task->UsageAt(now);
  events_->OnFinished(reason, result.usage, now - task->task().arrival);
  End(task, absl::OkStatus(), std::move(result));
}

void Worker::End(RunningTask* task, const absl::Status& status, TaskResult result) {
  const TimePoint now = Clock::now();
  TaskOutput* const output = task->output();
  engine_->RemoveSequence(task->sequence());
  running_.erase(task->id());
  {
    MutexLock lock(&mutex_);
    --num_tasks_;
    end_interval_ += (now - last_end_ - end_interval_) / 8;
    last_end_ = now;
  }
  output->Finish(status, std::move(result));
  MutexLock lock(&mutex_);
  if (num_tasks_ == 0) is_idle_.NotifyAll();
}

void Worker::ReportLoad() {
  LoadEvent load;
  load.num_running = static_cast<int64_t>(running_.size());
  load.kv_cache_usage = KvCacheUsage(*engine_);
  {
    MutexLock lock(&mutex_);
    load.num_waiting = queue_.size();
  }
  events_->OnLoad(load);
}

TimePoint Worker::NextTimer() {
  TimePoint next = TimePoint::max();
  for (const auto& [id, task] : running_) {
    next = std::min(next, task->task().deadline);
    if (task->is_paused()) next = std::min(next, *task->paused_since() + options_.stall_limit);
  }
  MutexLock lock(&mutex_);
  return std::min(next, queue_.EarliestDeadline());
}

}  // namespace nestor
