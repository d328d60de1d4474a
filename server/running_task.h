#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "engine/sampler.h"
#include "engine/speculation.h"
#include "engine/tokenizer.h"
#include "server/scheduler/speculation.h"
#include "server/task.h"

namespace nestor {

// A task with a sequence in the engine: what it has run and what it has made so far. Owned by the
// worker's thread.
class RunningTask {
 public:
  // `tokenizer` is borrowed.
  RunningTask(TaskId id, std::unique_ptr<Task> task, SequenceId sequence,
              const Tokenizer* tokenizer, TimePoint now);

  TaskId id() const { return id_; }
  SequenceId sequence() const { return sequence_; }
  const Task& task() const { return *task_; }
  TaskOutput* output() const { return task_->output; }
  TaskView View() const;

  // The engine's share of a step of `rows` rows at `level`. The spans live until the next call.
  StepEntry Entry(int64_t rows, int level);
  // The engine ran that share at `view`'s level.
  void AddRows(int64_t rows, int level, const LevelView& view, Degradation degradation);
  // Score: the log-probabilities of the rows that have just run.
  void AddLogProbabilities(std::span<const double> values);
  bool is_prompt_done() const { return prompt_done_ == NumPromptTokens(); }
  bool is_decoding() const { return generation_ != nullptr && is_prompt_done(); }

  // A round that drafts for this generation. REQUIRES: is_decoding().
  SpeculativeRound::Shape RoundShape(const SpeculationChoice& choice, int verify_level) const;
  Sampler* sampler() { return &generation_->sampler; }
  // Counts what `round` ran beside the rows of the tokens drawn.
  void AddRound(const SpeculativeRound& round, const Ladder& ladder);

  // Draws the next token. `now` is when the step ended.
  GeneratedToken DrawToken(std::span<const float> logits, int level, TimePoint now);
  // Why generation is over after the token drawn last; none where it goes on.
  std::optional<FinishReason> GenerationEnd(const std::vector<int32_t>& end_tokens) const;
  // Text that was held back (a part of a character, or of a stop string).
  std::string TakeHeldText();

  // When the last token was drawn; none before the first.
  std::optional<TimePoint> last_token() const { return last_token_; }

  // Times, and whether the targets were met, as of `now`.
  Usage UsageAt(TimePoint now) const;
  std::vector<double> TakeLogProbabilities() { return std::move(log_probabilities_); }

  bool is_paused() const { return paused_since_.has_value(); }
  std::optional<TimePoint> paused_since() const { return paused_since_; }
  void Pause(TimePoint now) { paused_since_ = now; }
  void Resume() { paused_since_.reset(); }

 private:
  struct Generation {
    Sampler sampler;
    StreamingDecoder decoder;
    StopMatcher stops;
    std::vector<int32_t> tokens;  // drawn so far
  };
  int64_t NumPromptTokens() const { return static_cast<int64_t>(task_->tokens.size()); }

  const TaskId id_;
  const std::unique_ptr<Task> task_;
  const SequenceId sequence_;
  const TimePoint started_;
  int64_t prompt_done_ = 0;
  std::unique_ptr<Generation> generation_;  // kGenerate
  std::vector<int32_t> targets_;            // kScore: of the step being run
  std::vector<double> log_probabilities_;
  Usage usage_;
  std::optional<TimePoint> first_token_;
  std::optional<TimePoint> last_token_;
  std::optional<TimePoint> paused_since_;
};

}  // namespace nestor
