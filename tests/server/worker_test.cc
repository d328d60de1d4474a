#include "server/worker.h"

#include <map>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "absl/strings/cord.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/scheduler/admission.h"
#include "tests/testing/fake_engine.h"

namespace nestor {
namespace {

using std::chrono::hours;
using std::chrono::milliseconds;
using ::testing::ElementsAre;
using ::testing::IsEmpty;

// Keeps what a task puts out. Push reports a full buffer once `capacity` tokens have come.
class RecordingOutput : public TaskOutput {
 public:
  explicit RecordingOutput(size_t capacity) : capacity_(capacity) {}

  bool Push(GeneratedToken token) override {
    MutexLock lock(&mutex_);
    tokens_.push_back(token.id);
    text_ += token.text;
    changed_.NotifyAll();
    return tokens_.size() < capacity_;
  }

  void Finish(const absl::Status& status, TaskResult result) override {
    MutexLock lock(&mutex_);
    EXPECT_FALSE(status_.has_value()) << "Finish called twice";
    text_ += result.text;
    status_ = status;
    result_ = std::move(result);
    changed_.NotifyAll();
  }

  absl::Status WaitForEnd() {
    MutexLock lock(&mutex_);
    while (!status_.has_value()) changed_.Wait(&mutex_);
    return *status_;
  }
  void WaitForTokens(size_t count) {
    MutexLock lock(&mutex_);
    while (tokens_.size() < count) changed_.Wait(&mutex_);
  }
  bool has_ended() {
    MutexLock lock(&mutex_);
    return status_.has_value();
  }
  std::vector<int32_t> tokens() {
    MutexLock lock(&mutex_);
    return tokens_;
  }
  std::string text() {
    MutexLock lock(&mutex_);
    return text_;
  }
  TaskResult result() {
    MutexLock lock(&mutex_);
    return result_;
  }
  void set_capacity(size_t capacity) {
    MutexLock lock(&mutex_);
    capacity_ = capacity;
  }

 private:
  Mutex mutex_;
  CondVar changed_;
  size_t capacity_ ABSL_GUARDED_BY(mutex_);
  std::vector<int32_t> tokens_ ABSL_GUARDED_BY(mutex_);
  std::string text_ ABSL_GUARDED_BY(mutex_);
  std::optional<absl::Status> status_ ABSL_GUARDED_BY(mutex_);
  TaskResult result_ ABSL_GUARDED_BY(mutex_);
};

class RecordingEvents : public Events {
 public:
  void OnRejected(absl::StatusCode) override {}
  void OnLoad(const LoadEvent&) override {}
  void OnStep(const StepEvent& step) override {
    MutexLock lock(&mutex_);
    rows_ += step.rows;
  }
  void OnSpeculation(const SpeculationEvent& round) override {
    MutexLock lock(&mutex_);
    drafted_ += round.num_drafted;
    accepted_ += round.num_accepted;
  }
  void OnTokens(int level, TokenKind kind, int64_t count) override {
    MutexLock lock(&mutex_);
    tokens_[{level, kind}] += count;
  }
  void OnFirstToken(Duration) override {}
  void OnNextToken(Duration) override {}
  void OnFinished(FinishReason, const Usage&, Duration) override {}
  void OnFailed(Failure failure, const Usage&) override {
    MutexLock lock(&mutex_);
    failures_.push_back(failure);
  }

  std::vector<Failure> failures() {
    MutexLock lock(&mutex_);
    return failures_;
  }
  int64_t tokens(int level, TokenKind kind) {
    MutexLock lock(&mutex_);
    return tokens_[{level, kind}];
  }
  int64_t rows() {
    MutexLock lock(&mutex_);
    return rows_;
  }
  int64_t drafted() {
    MutexLock lock(&mutex_);
    return drafted_;
  }
  int64_t accepted() {
    MutexLock lock(&mutex_);
    return accepted_;
  }

 private:
  Mutex mutex_;
  int64_t rows_ ABSL_GUARDED_BY(mutex_) = 0;
  int64_t drafted_ ABSL_GUARDED_BY(mutex_) = 0;
  int64_t accepted_ ABSL_GUARDED_BY(mutex_) = 0;
  std::map<std::pair<int, TokenKind>, int64_t> tokens_ ABSL_GUARDED_BY(mutex_);
  std::vector<Failure> failures_ ABSL_GUARDED_BY(mutex_);
};

class WorkerTest : public testing::Test {
 protected:
  WorkerTest() {
    options_.limits = {.max_step_rows = 64, .prefill_chunk = 8};
    options_.max_queue = 16;
    options_.max_running = 8;
    options_.stall_limit = hours(1);
  }

  ~WorkerTest() override { control_.AllowAllSteps(); }

  Worker* Start() {
    auto engine = std::make_unique<FakeEngine>(engine_options_, &control_);
    const Ladder ladder = LadderOf(engine->Describe());
    CostModel cost_model(ladder);
    for (int level = 0; level < engine_options_.num_levels; ++level) {
      cost_model.AddMeasurement(level, 1, milliseconds(level + 1));
    }
    worker_ = std::make_unique<Worker>(std::move(engine), ladder, cost_model, options_, &events_);
    return worker_.get();
  }

  static std::unique_ptr<Task> Generate(std::vector<int32_t> prompt, int64_t max_tokens,
                                        TaskOutput* output) {
    auto task = std::make_unique<Task>();
    task->kind = TaskKind::kGenerate;
    task->tokens = std::move(prompt);
    task->max_tokens = max_tokens;
    task->sla.levels = {2, 1, 0};
    task->arrival = Clock::now();
    task->output = output;
    return task;
  }

  RecordingOutput& NewOutput(size_t capacity = 1000000) {
    return *outputs_.emplace_back(std::make_unique<RecordingOutput>(capacity));
  }

  absl::StatusOr<TaskId> Submit(std::unique_ptr<Task> task) {
    std::vector<std::unique_ptr<Task>> tasks;
    tasks.push_back(std::move(task));
    absl::StatusOr<std::vector<TaskId>> ids = worker_->Submit(std::move(tasks));
    if (!ids.ok()) return ids.status();
    return ids->front();
  }

  FakeEngineOptions engine_options_;
  WorkerOptions options_;
  FakeEngineControl control_;
  RecordingEvents events_;
  std::vector<std::unique_ptr<RecordingOutput>> outputs_;
  std::unique_ptr<Worker> worker_;  // ends its tasks before their outputs go
};

TEST_F(WorkerTest, GenerationRunsToMaxTokensAndSaysWhatItRan) {
  Start();
  RecordingOutput& output = NewOutput();
  ASSERT_TRUE(Submit(Generate({'d', 'e', 'f'}, 4, &output)).ok());
  EXPECT_TRUE(output.WaitForEnd().ok());
  EXPECT_THAT(output.tokens(), ElementsAre('g', 'h', 'i', 'j'));
  EXPECT_EQ(output.text(), "ghij");
  const TaskResult result = output.result();
  EXPECT_EQ(result.finish_reason, FinishReason::kLength);
  EXPECT_THAT(result.usage.prompt_levels, ElementsAre(LevelRun{2, 3}));
  EXPECT_THAT(result.usage.completion_levels, ElementsAre(LevelRun{2, 4}));
  // The last token is drawn, and not run.
  EXPECT_EQ(result.usage.rows, 6);
  EXPECT_DOUBLE_EQ(result.usage.flops, 6 * 6000.0);
  EXPECT_FALSE(result.usage.has_target);
  EXPECT_EQ(events_.tokens(2, TokenKind::kPrompt), 3);
  EXPECT_EQ(events_.tokens(2, TokenKind::kCompletion), 4);
  EXPECT_EQ(control_.free_pages(), 64);
}

TEST_F(WorkerTest, EndTokenStopsUnlessIgnored) {
  options_.end_tokens = {'h'};
  Start();
  RecordingOutput& stopped = NewOutput();
  RecordingOutput& ignoring = NewOutput();
  ASSERT_TRUE(Submit(Generate({'f'}, 5, &stopped)).ok());
  auto task = Generate({'f'}, 5, &ignoring);
  task->ignores_end_tokens = true;
  ASSERT_TRUE(Submit(std::move(task)).ok());
  EXPECT_TRUE(stopped.WaitForEnd().ok());
  EXPECT_TRUE(ignoring.WaitForEnd().ok());
  EXPECT_THAT(stopped.tokens(), ElementsAre('g', 'h'));
  EXPECT_EQ(stopped.result().finish_reason, FinishReason::kStop);
  EXPECT_THAT(ignoring.tokens(), ElementsAre('g', 'h', 'i', 'j', 'k'));
}

TEST_F(WorkerTest, StopStringEndsTheTextBeforeIt) {
  Start();
  RecordingOutput& output = NewOutput();
  auto task = Generate({'f'}, 10, &output);
  task->stops = {"ij"};
  ASSERT_TRUE(Submit(std::move(task)).ok());
  EXPECT_TRUE(output.WaitForEnd().ok());
  EXPECT_EQ(output.text(), "gh");
  EXPECT_EQ(output.result().finish_reason, FinishReason::kStop);
}

TEST_F(WorkerTest, HeldBackTextComesAtTheEnd) {
  Start();
  RecordingOutput& output = NewOutput();
  auto task = Generate({'f'}, 2, &output);
  task->stops = {"hi"};
  ASSERT_TRUE(Submit(std::move(task)).ok());
  EXPECT_TRUE(output.WaitForEnd().ok());
  EXPECT_EQ(output.text(), "gh");
}

TEST_F(WorkerTest, LongPromptRunsInChunks) {
  Start();
  RecordingOutput& output = NewOutput();
  ASSERT_TRUE(Submit(Generate(std::vector<int32_t>(20, 'a'), 1, &output)).ok());
  EXPECT_TRUE(output.WaitForEnd().ok());
  const auto steps = control_.steps();
  ASSERT_EQ(steps.size(), 3u);
  EXPECT_EQ(steps[0].front().rows, 8);
  EXPECT_EQ(steps[0].front().output, StepEntry::Output::kNone);
  EXPECT_EQ(steps[1].front().rows, 8);
  EXPECT_EQ(steps[2].front().rows, 4);
  EXPECT_EQ(steps[2].front().output, StepEntry::Output::kLastLogits);
}

TEST_F(WorkerTest, NewcomerJoinsTheNextStepAtItsOwnLevel) {
  control_.AllowSteps(0);
  Start();
  RecordingOutput& first = NewOutput();
  RecordingOutput& second = NewOutput();
  ASSERT_TRUE(Submit(Generate({'a'}, 3, &first)).ok());
  control_.WaitForSteps(1);
  auto task = Generate({'k', 'l'}, 2, &second);
  task->sla.levels = {0};
  ASSERT_TRUE(Submit(std::move(task)).ok());
  control_.AllowAllSteps();
  EXPECT_TRUE(first.WaitForEnd().ok());
  EXPECT_TRUE(second.WaitForEnd().ok());
  const auto steps = control_.steps();
  ASSERT_EQ(steps[1].size(), 2u);
  EXPECT_EQ(steps[1][0].level, 2);
  EXPECT_EQ(steps[1][1].level, 0);
  EXPECT_EQ(steps[1][1].rows, 2);
  EXPECT_THAT(second.tokens(), ElementsAre('m', 'n'));
}

TEST_F(WorkerTest, CancelledSequenceFreesItsPagesByTheNextStep) {
  control_.AllowSteps(1);
  Start();
  RecordingOutput& output = NewOutput();
  const auto id = Submit(Generate({'a'}, 100, &output));
  ASSERT_TRUE(id.ok());
  control_.WaitForSteps(2);  // the second is held
  worker_->Cancel(*id);
  control_.AllowAllSteps();
  EXPECT_EQ(output.WaitForEnd().code(), absl::StatusCode::kCancelled);
  EXPECT_EQ(control_.steps().size(), 2u);
  EXPECT_EQ(control_.free_pages(), 64);
  EXPECT_THAT(events_.failures(), ElementsAre(Failure::kCancelled));
}

TEST_F(WorkerTest, CancelledWhileWaitingEndsAtOnceThoughTheDeviceIsBusy) {
  options_.max_running = 1;
  control_.AllowSteps(0);
  Start();
  RecordingOutput& running = NewOutput();
  RecordingOutput& waiting = NewOutput();
  ASSERT_TRUE(Submit(Generate({'a'}, 2, &running)).ok());
  control_.WaitForSteps(1);
  const auto id = Submit(Generate({'a'}, 2, &waiting));
  ASSERT_TRUE(id.ok());
  worker_->Cancel(*id);
  EXPECT_TRUE(waiting.has_ended());
  EXPECT_EQ(waiting.WaitForEnd().code(), absl::StatusCode::kCancelled);
  control_.AllowAllSteps();
  EXPECT_TRUE(running.WaitForEnd().ok());
}

TEST_F(WorkerTest, DeadlineFiresInTheQueue) {
  options_.max_running = 1;
  Start();
  RecordingOutput& stalled = NewOutput(/*capacity=*/1);
  ASSERT_TRUE(Submit(Generate({'a'}, 5, &stalled)).ok());
  stalled.WaitForTokens(1);
  RecordingOutput& waiting = NewOutput();
  auto task = Generate({'a'}, 5, &waiting);
  task->deadline = Clock::now() + milliseconds(20);
  ASSERT_TRUE(Submit(std::move(task)).ok());
  EXPECT_EQ(waiting.WaitForEnd().code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_THAT(waiting.tokens(), IsEmpty());
  EXPECT_FALSE(stalled.has_ended());
}

TEST_F(WorkerTest, DeadlineStopsARunningTask) {
  Start();
  RecordingOutput& output = NewOutput(/*capacity=*/2);  // pauses, so that it cannot finish
  auto task = Generate({'a'}, 5, &output);
  task->deadline = Clock::now() + milliseconds(50);
  ASSERT_TRUE(Submit(std::move(task)).ok());
  EXPECT_EQ(output.WaitForEnd().code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_EQ(control_.free_pages(), 64);
}

TEST_F(WorkerTest, SlowReaderPausesAloneAndGoesOnWhereItStopped) {
  Start();
  RecordingOutput& slow = NewOutput(/*capacity=*/2);
  const auto id = Submit(Generate({'a'}, 4, &slow));
  ASSERT_TRUE(id.ok());
  slow.WaitForTokens(2);
  RecordingOutput& other = NewOutput();
  ASSERT_TRUE(Submit(Generate({'p'}, 6, &other)).ok());
  EXPECT_TRUE(other.WaitForEnd().ok());
  EXPECT_THAT(slow.tokens(), ElementsAre('b', 'c'));
  slow.set_capacity(100);
  worker_->Resume(*id);
  EXPECT_TRUE(slow.WaitForEnd().ok());
  EXPECT_THAT(slow.tokens(), ElementsAre('b', 'c', 'd', 'e'));
}

TEST_F(WorkerTest, ReaderThatNeverComesBackIsEnded) {
  options_.stall_limit = milliseconds(1);
  Start();
  RecordingOutput& output = NewOutput(/*capacity=*/2);
  ASSERT_TRUE(Submit(Generate({'a'}, 50, &output)).ok());
  EXPECT_EQ(output.WaitForEnd().code(), absl::StatusCode::kAborted);
  EXPECT_EQ(control_.free_pages(), 64);
  EXPECT_THAT(events_.failures(), ElementsAre(Failure::kSlowReader));
  EXPECT_EQ(output.result().usage.completion_tokens, 2);
}

TEST_F(WorkerTest, FullQueueRefusesWithARetryHint) {
  options_.max_running = 1;
  options_.max_queue = 1;
  control_.AllowSteps(0);
  Start();
  RecordingOutput& running = NewOutput();
  RecordingOutput& waiting = NewOutput();
  RecordingOutput& refused = NewOutput();
  ASSERT_TRUE(Submit(Generate({'a'}, 2, &running)).ok());
  control_.WaitForSteps(1);
  ASSERT_TRUE(Submit(Generate({'a'}, 2, &waiting)).ok());
  const absl::Status status = Submit(Generate({'a'}, 2, &refused)).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(status.GetPayload(kRetryAfterPayload).has_value());
  control_.AllowAllSteps();
  EXPECT_TRUE(running.WaitForEnd().ok());
  EXPECT_TRUE(waiting.WaitForEnd().ok());
  EXPECT_FALSE(refused.has_ended());
}

TEST_F(WorkerTest, HigherPriorityLeavesTheQueueFirst) {
  options_.max_running = 1;
  control_.AllowSteps(0);
  Start();
  RecordingOutput& running = NewOutput();
  RecordingOutput& patient = NewOutput();
  RecordingOutput& urgent = NewOutput(/*capacity=*/1);
  ASSERT_TRUE(Submit(Generate({'a'}, 1, &running)).ok());
  control_.WaitForSteps(1);
  auto task = Generate({'a'}, 1, &patient);
  task->sla.priority = 5;
  ASSERT_TRUE(Submit(std::move(task)).ok());
  task = Generate({'a'}, 2, &urgent);
  task->sla.priority = 1;
  const auto urgent_id = Submit(std::move(task));
  ASSERT_TRUE(urgent_id.ok());
  control_.AllowAllSteps();
  // The urgent one pauses in the only place, so the patient one cannot have run before it.
  urgent.WaitForTokens(1);
  EXPECT_FALSE(patient.has_ended());
  worker_->Resume(*urgent_id);
  EXPECT_TRUE(patient.WaitForEnd().ok());
}

TEST_F(WorkerTest, TaskWaitsForRoomInTheCache) {
  engine_options_.num_pages = 3;  // of 4 positions
  Start();
  RecordingOutput& first = NewOutput(/*capacity=*/1);
  RecordingOutput& second = NewOutput();
  const auto id = Submit(Generate({'a', 'b'}, 6, &first));
  ASSERT_TRUE(id.ok());
  first.WaitForTokens(1);
  ASSERT_TRUE(Submit(Generate({'a', 'b'}, 6, &second)).ok());
  worker_->Resume(*id);  // runs one more, and pauses again
  first.WaitForTokens(2);
  EXPECT_FALSE(second.has_ended());
  first.set_capacity(100);
  worker_->Resume(*id);
  EXPECT_TRUE(first.WaitForEnd().ok());
  EXPECT_TRUE(second.WaitForEnd().ok());
}

TEST_F(WorkerTest, NonFiniteActivationsFailTheirSequenceAlone) {
  control_.FailToken('x');
  Start();
  RecordingOutput& bad = NewOutput();
  RecordingOutput& good = NewOutput();
  ASSERT_TRUE(Submit(Generate({'w'}, 5, &bad)).ok());
  ASSERT_TRUE(Submit(Generate({'a'}, 5, &good)).ok());
  EXPECT_EQ(bad.WaitForEnd().code(), absl::StatusCode::kInternal);
  EXPECT_TRUE(good.WaitForEnd().ok());
  EXPECT_THAT(bad.tokens(), ElementsAre('x'));
  EXPECT_THAT(events_.failures(), ElementsAre(Failure::kNonFinite));
}

TEST_F(WorkerTest, ScoreJoinsItsChunks) {
  Start();
  RecordingOutput& output = NewOutput();
  auto task = Generate({}, 0, &output);
  task->kind = TaskKind::kScore;
  for (int32_t i = 0; i < 10; ++i) task->tokens.push_back(10 * i);
  ASSERT_TRUE(Submit(std::move(task)).ok());
  EXPECT_TRUE(output.WaitForEnd().ok());
  EXPECT_THAT(output.result().log_probabilities,
              ElementsAre(-10, -10020, -20030, -30040, -40050, -50060, -60070, -70080, -80090));
  EXPECT_EQ(control_.steps().size(), 2u);
  EXPECT_EQ(output.result().usage.prompt_tokens, 10);
  EXPECT_EQ(output.result().usage.completion_tokens, 0);
}

TEST_F(WorkerTest, TextsAreEmbeddedInOneStep) {
  engine_options_.is_encoder = true;
  options_.limits.splits_prompts = false;
  Start();
  RecordingOutput& a = NewOutput();
  RecordingOutput& b = NewOutput();
  std::vector<std::unique_ptr<Task>> tasks;
  tasks.push_back(Generate({3, 4, 5}, 0, &a));
  tasks.push_back(Generate({6, 7}, 0, &b));
  for (const auto& task : tasks) {
    task->kind = TaskKind::kEmbed;
    task->sla.levels = {1};
  }
  ASSERT_TRUE(worker_->Submit(std::move(tasks)).ok());
  EXPECT_TRUE(a.WaitForEnd().ok());
  EXPECT_TRUE(b.WaitForEnd().ok());
  EXPECT_THAT(a.result().embedding, ElementsAre(1, 3, 3, 5));
  EXPECT_THAT(b.result().embedding, ElementsAre(1, 2, 6, 7));
  EXPECT_EQ(control_.steps().size(), 1u);
}

TEST_F(WorkerTest, UnreachableTargetDegradesToTheFastestLevelAndSaysWhy) {
  Start();
  RecordingOutput& output = NewOutput();
  auto task = Generate({'a'}, 3, &output);
  task->sla.latency_target = std::chrono::nanoseconds(1);
  ASSERT_TRUE(Submit(std::move(task)).ok());
  EXPECT_TRUE(output.WaitForEnd().ok());
  const Usage usage = output.result().usage;
  EXPECT_THAT(usage.completion_levels, ElementsAre(LevelRun{0, 3}));
  EXPECT_EQ(usage.degradation, Degradation::kLatencyTarget);
  EXPECT_TRUE(usage.has_target);
  EXPECT_FALSE(usage.target_met);
}

TEST_F(WorkerTest, GenerousTargetIsMetAtTheBestLevel) {
  Start();
  RecordingOutput& output = NewOutput();
  auto task = Generate({'a'}, 3, &output);
  task->sla.latency_target = hours(1);
  task->sla.per_token_target = hours(1);
  ASSERT_TRUE(Submit(std::move(task)).ok());
  EXPECT_TRUE(output.WaitForEnd().ok());
  const Usage usage = output.result().usage;
  EXPECT_THAT(usage.completion_levels, ElementsAre(LevelRun{2, 3}));
  EXPECT_TRUE(usage.target_met);
}

TEST_F(WorkerTest, ClosedAdmissionFinishesWhatWasAccepted) {
  control_.AllowSteps(0);
  Start();
  RecordingOutput& accepted = NewOutput();
  RecordingOutput& late = NewOutput();
  ASSERT_TRUE(Submit(Generate({'a'}, 3, &accepted)).ok());
  worker_->CloseAdmission();
  EXPECT_EQ(Submit(Generate({'a'}, 3, &late)).status().code(), absl::StatusCode::kUnavailable);
  EXPECT_FALSE(worker_->WaitUntilIdle(Clock::now()));
  control_.AllowAllSteps();
  EXPECT_TRUE(worker_->WaitUntilIdle(TimePoint::max()));
  EXPECT_TRUE(accepted.WaitForEnd().ok());
  EXPECT_THAT(accepted.tokens(), ElementsAre('b', 'c', 'd'));
}

TEST_F(WorkerTest, DrainLimitEndsTasksWithAStatusAndTheirUsage) {
  options_.max_running = 1;
  control_.AllowSteps(3);
  Start();
  RecordingOutput& running = NewOutput();
  RecordingOutput& waiting = NewOutput();
  ASSERT_TRUE(Submit(Generate({'a'}, 100, &running)).ok());
  ASSERT_TRUE(Submit(Generate({'a'}, 100, &waiting)).ok());
  control_.WaitForSteps(4);
  worker_->EndAll();
  control_.AllowAllSteps();
  EXPECT_EQ(running.WaitForEnd().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(waiting.WaitForEnd().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(running.result().finish_reason, FinishReason::kDrain);
  EXPECT_EQ(running.result().usage.completion_tokens, 4);
  EXPECT_TRUE(worker_->WaitUntilIdle(TimePoint::max()));
}

TEST_F(WorkerTest, DestructionEndsEveryTask) {
  Start();
  RecordingOutput& output = NewOutput(/*capacity=*/1);
  ASSERT_TRUE(Submit(Generate({'a'}, 100, &output)).ok());
  output.WaitForTokens(1);
  worker_.reset();
  ASSERT_TRUE(output.has_ended());
  EXPECT_EQ(output.WaitForEnd().code(), absl::StatusCode::kUnavailable);
}

// Time on the fake engine means nothing, so these tests hold for rounds and plain steps in any mix;
// only the first choice is known: five drafts at level 0.
class SpeculatingWorkerTest : public WorkerTest {
 protected:
  SpeculatingWorkerTest() { options_.max_drafts = 8; }

  static std::unique_ptr<Task> Speculate(std::vector<int32_t> prompt, int64_t max_tokens,
                                         TaskOutput* output) {
    auto task = Generate(std::move(prompt), max_tokens, output);
    task->may_speculate = true;
    return task;
  }

  int64_t NumRounds() const {
    int64_t rounds = 0;
    for (const auto& step : control_.steps()) {
      rounds += step.front().output == StepEntry::Output::kAllLogits;
    }
    return rounds;
  }
};

TEST_F(SpeculatingWorkerTest, TokensAreThoseOfPlainDecodingAndUsageSaysWhatRan) {
  engine_options_.low_levels_err_at = 4;  // after 'd', 'h', 'l', ...
  Start();
  RecordingOutput& output = NewOutput();
  ASSERT_TRUE(Submit(Speculate({'a'}, 12, &output)).ok());
  EXPECT_TRUE(output.WaitForEnd().ok());
  EXPECT_EQ(output.text(), "bcdefghijklm");
  const Usage usage = output.result().usage;
  EXPECT_EQ(output.result().finish_reason, FinishReason::kLength);
  EXPECT_THAT(usage.completion_levels, ElementsAre(LevelRun{2, 12}));
  EXPECT_EQ(usage.completion_tokens, 12);
  EXPECT_EQ(usage.kept_rows, 12);
  EXPECT_DOUBLE_EQ(usage.quality, 12);
  EXPECT_EQ(usage.rows, events_.rows());
  EXPECT_GT(usage.drafted_tokens, usage.accepted_tokens);
  EXPECT_EQ(usage.drafted_tokens, events_.drafted());
  EXPECT_EQ(usage.accepted_tokens, events_.accepted());
  EXPECT_EQ(events_.tokens(2, TokenKind::kCompletion), 12);
  EXPECT_EQ(control_.free_pages(), 64);
}

TEST_F(SpeculatingWorkerTest, ARoundDraftsVerifiesAndGoesOnBehindWhatWasAccepted) {
  engine_options_.low_levels_err_at = 4;
  Start();
  RecordingOutput& output = NewOutput();
  ASSERT_TRUE(Submit(Speculate({'a'}, 20, &output)).ok());
  EXPECT_TRUE(output.WaitForEnd().ok());
  const auto steps = control_.steps();
  // The prompt gives 'b'; the drafts c d f g h; the level above draws e after d.
  ASSERT_GE(steps.size(), 8u);
  for (int64_t i = 1; i <= 5; ++i) {
    EXPECT_EQ(steps[static_cast<size_t>(i)].front().position, i);
    EXPECT_EQ(steps[static_cast<size_t>(i)].front().rows, 1);
    EXPECT_EQ(steps[static_cast<size_t>(i)].front().level, 0);
  }
  EXPECT_EQ(steps[6].front().position, 1);
  EXPECT_EQ(steps[6].front().rows, 6);
  EXPECT_EQ(steps[6].front().level, 2);
  EXPECT_EQ(steps[6].front().output, StepEntry::Output::kAllLogits);
  EXPECT_EQ(steps[7].front().position, 4);
}

TEST_F(SpeculatingWorkerTest, AnEndTokenInsideAnAcceptedRunEndsItThere) {
  options_.end_tokens = {'d'};
  Start();
  RecordingOutput& output = NewOutput();
  ASSERT_TRUE(Submit(Speculate({'a'}, 20, &output)).ok());
  EXPECT_TRUE(output.WaitForEnd().ok());
  EXPECT_THAT(output.tokens(), ElementsAre('b', 'c', 'd'));
  EXPECT_EQ(output.result().finish_reason, FinishReason::kStop);
  EXPECT_EQ(output.result().usage.drafted_tokens, 5);
  EXPECT_EQ(output.result().usage.accepted_tokens, 2);
  // The prompt, five drafts, six rows verified: 'b', 'c', and those of 'd' on for nothing.
  EXPECT_EQ(output.result().usage.rows, 12);
  EXPECT_EQ(output.result().usage.kept_rows, 3);
  EXPECT_EQ(control_.free_pages(), 64);
}

TEST_F(SpeculatingWorkerTest, AStopStringInsideAnAcceptedRunEndsTheTextBeforeIt) {
  Start();
  RecordingOutput& output = NewOutput();
  auto task = Speculate({'a'}, 20, &output);
  task->stops = {"de"};
  ASSERT_TRUE(Submit(std::move(task)).ok());
  EXPECT_TRUE(output.WaitForEnd().ok());
  EXPECT_EQ(output.text(), "bc");
  EXPECT_THAT(output.tokens(), ElementsAre('b', 'c', 'd', 'e'));
  EXPECT_EQ(output.result().finish_reason, FinishReason::kStop);
}

TEST_F(SpeculatingWorkerTest, DraftsStayWithinMaxTokensAndTheReservation) {
  engine_options_.num_pages = 1;  // of 4 positions
  Start();
  RecordingOutput& output = NewOutput();
  ASSERT_TRUE(Submit(Speculate({'a'}, 3, &output)).ok());
  EXPECT_TRUE(output.WaitForEnd().ok());
  EXPECT_THAT(output.tokens(), ElementsAre('b', 'c', 'd'));
  EXPECT_LE(output.result().usage.drafted_tokens, 1);
}

TEST_F(SpeculatingWorkerTest, ASlowReaderPausesInsideARoundAndGoesOnWhereItStopped) {
  Start();
  RecordingOutput& output = NewOutput(/*capacity=*/3);
  const auto id = Submit(Speculate({'a'}, 9, &output));
  ASSERT_TRUE(id.ok());
  output.WaitForTokens(3);
  RecordingOutput& other = NewOutput();
  ASSERT_TRUE(Submit(Generate({'p'}, 4, &other)).ok());
  EXPECT_TRUE(other.WaitForEnd().ok());
  EXPECT_THAT(output.tokens(), ElementsAre('b', 'c', 'd'));
  output.set_capacity(100);
  worker_->Resume(*id);
  EXPECT_TRUE(output.WaitForEnd().ok());
  EXPECT_EQ(output.text(), "bcdefghij");
  EXPECT_EQ(output.result().usage.kept_rows, 9);
}

TEST_F(SpeculatingWorkerTest, CompanyMeansPlainSteps) {
  for (const int64_t max_running : {2, 1}) {  // beside it, or waiting behind it
    options_.max_running = max_running;
    Start();
    RecordingOutput& a = NewOutput();
    RecordingOutput& b = NewOutput();
    std::vector<std::unique_ptr<Task>> tasks;
    tasks.push_back(Speculate({'a'}, 8, &a));
    tasks.push_back(max_running > 1 ? Speculate({'p'}, 8, &b) : Generate({'p'}, 8, &b));
    ASSERT_TRUE(worker_->Submit(std::move(tasks)).ok());
    EXPECT_TRUE(a.WaitForEnd().ok());
    EXPECT_TRUE(b.WaitForEnd().ok());
    EXPECT_EQ(NumRounds(), 0);
    EXPECT_EQ(a.result().usage.drafted_tokens, 0);
  }
}

TEST_F(SpeculatingWorkerTest, ATaskThatMayNotSpeculateRunsPlainSteps) {
  Start();
  RecordingOutput& output = NewOutput();
  ASSERT_TRUE(Submit(Generate({'a'}, 8, &output)).ok());
  EXPECT_TRUE(output.WaitForEnd().ok());
  EXPECT_EQ(NumRounds(), 0);
}

TEST_F(SpeculatingWorkerTest, TheLevelAboveIsTheOneThatTheBudgetAllows) {
  engine_options_.low_levels_err_at = 4;
  Start();
  RecordingOutput& output = NewOutput();
  auto task = Speculate({'a'}, 5, &output);
  task->sla.levels = {1};
  ASSERT_TRUE(Submit(std::move(task)).ok());
  EXPECT_TRUE(output.WaitForEnd().ok());
  EXPECT_EQ(output.text(), "bcdfg");  // level 1 errs as level 0 does
  EXPECT_THAT(output.result().usage.completion_levels, ElementsAre(LevelRun{1, 5}));
  for (const auto& step : control_.steps()) EXPECT_LE(step.front().level, 1);
}

TEST_F(SpeculatingWorkerTest, ADraftedTokenThatIsNotFiniteFailsNothing) {
  engine_options_.low_levels_err_at = 100;  // after 'd' comes 'f', which is drafted too soon
  control_.FailToken('f');
  Start();
  RecordingOutput& output = NewOutput();
  ASSERT_TRUE(Submit(Speculate({'a'}, 5, &output)).ok());
  EXPECT_TRUE(output.WaitForEnd().ok());
  EXPECT_EQ(output.text(), "bcdef");
}

TEST_F(SpeculatingWorkerTest, ATokenThatIsNotFiniteFailsItsSequence) {
  control_.FailToken('d');
  Start();
  RecordingOutput& output = NewOutput();
  ASSERT_TRUE(Submit(Speculate({'a'}, 9, &output)).ok());
  EXPECT_EQ(output.WaitForEnd().code(), absl::StatusCode::kInternal);
  EXPECT_EQ(output.text(), "bcd");
  EXPECT_THAT(events_.failures(), ElementsAre(Failure::kNonFinite));
  EXPECT_EQ(control_.free_pages(), 64);
}

TEST_F(SpeculatingWorkerTest, LongStreamsMixRoundsAndStepsWithoutLosingAToken) {
  engine_options_.low_levels_err_at = 7;
  engine_options_.num_pages = 1000;
  engine_options_.max_sequence_length = 4000;
  Start();
  RecordingOutput& output = NewOutput();
  ASSERT_TRUE(Submit(Speculate({0}, 3000, &output)).ok());
  EXPECT_TRUE(output.WaitForEnd().ok());
  const std::vector<int32_t> tokens = output.tokens();
  ASSERT_EQ(tokens.size(), 3000u);
  for (size_t i = 0; i < tokens.size(); ++i) {
    ASSERT_EQ(tokens[i], static_cast<int32_t>((i + 1) % 256));
  }
  EXPECT_GT(NumRounds(), 0);
}

TEST_F(SpeculatingWorkerTest, ManyThreadsSubmitAndCancelStreams) {
  options_.max_queue = 1000;
  engine_options_.low_levels_err_at = 3;
  Start();
  constexpr int kThreads = 4;
  constexpr int kTasks = 25;
  for (int i = 0; i < kThreads * kTasks; ++i) NewOutput();
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < kTasks; ++i) {
        RecordingOutput* output = outputs_[static_cast<size_t>(t * kTasks + i)].get();
        const auto id = Submit(Speculate({'a'}, 9, output));
        ASSERT_TRUE(id.ok());
        if (i % 2 == 0) worker_->Cancel(*id);
        if (i % 5 == 0) (void)output->WaitForEnd();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const auto& output : outputs_) {
    const absl::Status status = output->WaitForEnd();
    EXPECT_TRUE(status.ok() || absl::IsCancelled(status)) << status;
    if (status.ok()) {
      EXPECT_EQ(output->text(), "bcdefghij");
    }
  }
  EXPECT_EQ(control_.free_pages(), 64);
}

TEST_F(WorkerTest, ManyThreadsSubmitAndCancel) {
  options_.max_queue = 1000;
  Start();
  constexpr int kThreads = 4;
  constexpr int kTasks = 25;
  for (int i = 0; i < kThreads * kTasks; ++i) NewOutput();
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < kTasks; ++i) {
        const auto id = Submit(Generate({'a', 'b'}, 6, outputs_[t * kTasks + i].get()));
        ASSERT_TRUE(id.ok());
        if (i % 2 == 0) worker_->Cancel(*id);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const auto& output : outputs_) {
    const absl::Status status = output->WaitForEnd();
    EXPECT_TRUE(status.ok() || absl::IsCancelled(status)) << status;
    if (status.ok()) {
      EXPECT_THAT(output->tokens(), ElementsAre('c', 'd', 'e', 'f', 'g', 'h'));
    }
  }
  EXPECT_EQ(control_.free_pages(), 64);
}

}  // namespace
}  // namespace nestor
