// What a steady step of the worker allocates: decoding of generations that nobody joins or leaves.

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "server/worker.h"
#include "tests/testing/allocation_counter.h"
#include "tests/testing/temporary_directory.h"
#include "tests/testing/tiny_nested_model.h"

namespace nestor {
namespace {

using std::chrono::hours;
using std::chrono::nanoseconds;

// Where the allocations are read: by the token that comes first and the one that comes last, 200
// steps later at least.
constexpr int64_t kFirst = 20;
constexpr int64_t kLast = 220;
constexpr int64_t kTokens = 240;

// Reads the count as its tokens come. The generation that says so is the only one that reads.
class CountingOutput : public TaskOutput {
 public:
  bool Push(GeneratedToken token) override {
    text_bytes_ += static_cast<int64_t>(token.text.size());
    ++num_tokens_;
    if (num_tokens_ == kFirst) first_ = NumAllocations();
    if (num_tokens_ == kLast) last_ = NumAllocations();
    return true;
  }
  void Finish(const absl::Status& status, TaskResult result) override {
    MutexLock lock(&mutex_);
    usage_ = result.usage;
    status_ = status;
    has_ended_ = true;
    changed_.NotifyAll();
  }
  absl::Status WaitForEnd() {
    MutexLock lock(&mutex_);
    while (!has_ended_) changed_.Wait(&mutex_);
    return status_;
  }
  // After WaitForEnd.
  int64_t allocations() const { return last_ - first_; }
  int64_t num_tokens() const { return num_tokens_; }
  int64_t text_bytes() const { return text_bytes_; }
  const Usage& usage() const { return usage_; }

 private:
  int64_t num_tokens_ = 0;
  int64_t text_bytes_ = 0;
  int64_t first_ = 0;
  int64_t last_ = 0;
  Usage usage_;
  Mutex mutex_;
  CondVar changed_;
  absl::Status status_;
  bool has_ended_ = false;
};

class NoEvents : public Events {
 public:
  void OnRejected(absl::StatusCode) override {}
  void OnLoad(const LoadEvent&) override {}
  void OnStep(const StepEvent&) override {}
  void OnSpeculation(const SpeculationEvent&) override {}
  void OnTokens(int, TokenKind, int64_t) override {}
  void OnFirstToken(Duration) override {}
  void OnNextToken(Duration) override {}
  void OnFinished(FinishReason, const Usage&, Duration) override {}
  void OnFailed(Failure, const Usage&) override {}
};

class WorkerAllocationTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    directory_ = std::make_unique<TemporaryDirectory>();
    const absl::Status written =
        WriteTinyNestedModel(directory_->path(), {.context_length = 512, .seed = 6});
    ASSERT_TRUE(written.ok()) << written;
  }
  static void TearDownTestSuite() { directory_.reset(); }

  void Start(int max_drafts) {
    auto model = NestedModel::Open(directory_->path() + "/nested");
    ASSERT_TRUE(model.ok()) << model.status();
    auto backend = MakeCpuBackend({.num_threads = 2});
    ASSERT_TRUE(backend.ok()) << backend.status();
    auto engine = Engine::Create(*std::move(model), *std::move(backend), {.max_sequences = 32});
    ASSERT_TRUE(engine.ok()) << engine.status();
    const size_t num_levels = (*engine)->model().levels().size();
    full_ = static_cast<int>(num_levels) - 1;
    Ladder ladder(num_levels);
    CostModel cost_model(ladder);
    for (int level = 0; level <= full_; ++level) {
      ladder[static_cast<size_t>(level)].relative_cost = (level + 1.0) / (full_ + 1);
      // Cheap drafts: a round is worth its while.
      cost_model.AddMeasurement(level, 1, std::chrono::milliseconds(level == full_ ? 100 : 1));
    }
    worker_ = std::make_unique<Worker>(
        *std::move(engine), std::move(ladder), std::move(cost_model),
        WorkerOptions{.limits = {.max_step_rows = 512, .prefill_chunk = 512},
                      .max_queue = 64,
                      .max_running = 32,
                      .max_drafts = max_drafts,
                      .stall_limit = hours(1)},
        &events_);
  }

  std::unique_ptr<Task> NewTask() {
    outputs_.push_back(std::make_unique<CountingOutput>());
    auto task = std::make_unique<Task>();
    task->tokens = {1, 2, 3};
    task->max_tokens = kTokens;
    task->ignores_end_tokens = true;
    for (int level = full_; level >= 0; --level) task->sla.levels.push_back(level);
    task->arrival = Clock::now();
    task->output = outputs_.back().get();
    return task;
  }

  void SubmitAll(std::vector<std::unique_ptr<Task>> tasks) {
    const auto ids = worker_->Submit(std::move(tasks));
    ASSERT_TRUE(ids.ok()) << ids.status();
    for (const auto& output : outputs_) {
      const absl::Status status = output->WaitForEnd();
      EXPECT_TRUE(status.ok()) << status;
      EXPECT_EQ(output->num_tokens(), kTokens);
      EXPECT_GT(output->text_bytes(), 0);
    }
  }

  static inline std::unique_ptr<TemporaryDirectory> directory_;
  int full_ = 0;
  NoEvents events_;
  std::vector<std::unique_ptr<CountingOutput>> outputs_;
  std::unique_ptr<Worker> worker_;
};

TEST_F(WorkerAllocationTest, SteadyStepsOfManyGenerationsDoNotAllocate) {
  Start(/*max_drafts=*/0);
  std::vector<std::unique_ptr<Task>> tasks;
  for (uint64_t i = 0; i < 12; ++i) {
    auto task = NewTask();
    task->sla.priority = 1 + static_cast<int>(i % 3);
    if (i % 2 == 1) task->sampling = {.temperature = 1, .top_p = 0.9, .seed = i};
    if (i % 3 == 1) task->sampling.repetition_penalty = 1.1;
    if (i % 4 == 1) task->sla.levels = {static_cast<int>(i) % full_};
    if (i % 4 == 2) task->stops = {"no such text"};
    // A target out of reach: the fastest level, chosen anew in every step.
    if (i % 4 == 3) task->sla.per_token_target = nanoseconds(1);
    tasks.push_back(std::move(task));
  }
  SubmitAll(std::move(tasks));
  for (const auto& output : outputs_) EXPECT_EQ(output->allocations(), 0);
}

TEST_F(WorkerAllocationTest, SteadyRoundsOfSpeculationDoNotAllocate) {
  Start(/*max_drafts=*/4);
  std::vector<std::unique_ptr<Task>> tasks;
  tasks.push_back(NewTask());
  tasks.back()->may_speculate = true;
  SubmitAll(std::move(tasks));
  EXPECT_EQ(outputs_.front()->allocations(), 0);
  EXPECT_GT(outputs_.front()->usage().drafted_tokens, 0);
}

}  // namespace
}  // namespace nestor
