#pragma once

#include <cstdint>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "base/mutex.h"
#include "engine/engine.h"
#include "server/served_model.h"

namespace nestor {

// What a test sees and steers of a FakeEngine that someone else owns. Thread-safe; must outlive
// the engine.
class FakeEngineControl {
 public:
  struct RecordedEntry {
    SequenceId sequence = 0;
    int64_t position = 0;  // of the first row
    int64_t rows = 0;
    int level = 0;
    StepEntry::Output output = StepEntry::Output::kNone;
  };
  using RecordedStep = std::vector<RecordedEntry>;

  // Steps beyond this many wait in Step until more are allowed. No limit at first.
  void AllowSteps(int64_t count);
  void AllowAllSteps() { AllowSteps(std::numeric_limits<int64_t>::max()); }
  // Waits until `count` steps have begun.
  void WaitForSteps(int64_t count);
  // An entry that runs this token fails; others go on.
  void FailToken(int32_t token);

  std::vector<RecordedStep> steps() const;
  int64_t free_pages() const;

 private:
  friend class FakeEngine;
  // Records the step and waits for its turn.
  void Begin(RecordedStep step);
  bool Fails(int32_t token) const;
  void SetFreePages(int64_t count);

  mutable Mutex mutex_;
  CondVar changed_;
  int64_t num_allowed_ ABSL_GUARDED_BY(mutex_) = std::numeric_limits<int64_t>::max();
  std::vector<RecordedStep> steps_ ABSL_GUARDED_BY(mutex_);
  int32_t failing_token_ ABSL_GUARDED_BY(mutex_) = -1;
  int64_t free_pages_ ABSL_GUARDED_BY(mutex_) = 0;
};

struct FakeEngineOptions {
  EngineOptions engine = {.max_step_rows = 64, .max_sequences = 8, .page_size = 4};
  int64_t num_pages = 64;
  int64_t max_sequence_length = 256;
  int num_levels = 3;
  bool is_encoder = false;
  // Below the last level, t + 2 comes after a token t that it divides; 0: every level agrees.
  int32_t low_levels_err_at = 0;
};

// An engine without a model. After token t comes t + 1 (in the vocabulary of its tokenizer, bytes
// in ascending order); the log-probability of target u after t is -(1000 t + u); an embedding is
// {level, number of tokens, first token, last token}.
class FakeEngine : public Engine {
 public:
  FakeEngine(const FakeEngineOptions& options, FakeEngineControl* control);

  const NestedModel& model() const override;  // REQUIRES: not called
  const Backend& backend() const override;    // REQUIRES: not called
  const Tokenizer& tokenizer() const override { return *tokenizer_; }
  const ChatTemplate* chat_template() const override { return nullptr; }
  const EngineOptions& options() const override { return options_.engine; }
  int64_t max_sequence_length() const override { return options_.max_sequence_length; }
  bool HasRoomFor(int64_t max_length) const override;
  absl::StatusOr<SequenceId> AddSequence(int64_t max_length) override;
  void RemoveSequence(SequenceId sequence) override;
  int64_t LengthOf(SequenceId sequence) const override;
  void Truncate(SequenceId sequence, int64_t length) override;
  int64_t free_pages() const override { return free_pages_; }
  int64_t num_pages() const override { return options_.num_pages; }
  absl::Status Step(const StepPlan& plan, StepResult* result) override;
  void SetObserver(LinearInputObserver*) override {}

  // What a server is told of it: level i of n costs (i + 1) / n and has quality 1 - (n - 1 - i)
  // / 20.
  ServedModel Describe() const;

 private:
  struct Sequence {
    int64_t max_length = 0;
    int64_t length = 0;
  };
  struct Output {
    std::vector<float> values;
    std::vector<double> log_probabilities;
  };
  int64_t PagesFor(int64_t length) const;
  // The token that comes after `token` at `level`.
  int32_t NextToken(int32_t token, int level) const;
  void SetFreePages(int64_t count);

  const FakeEngineOptions options_;
  FakeEngineControl* const control_;
  std::unique_ptr<Tokenizer> tokenizer_;
  int64_t free_pages_;
  SequenceId next_sequence_ = 1;
  std::map<SequenceId, Sequence> sequences_;
  std::vector<Output> outputs_;  // of the last step
};

}  // namespace nestor
