#include "nestor/bench_measure.h"

#include <algorithm>
#include <chrono>
#include <map>

#include "base/check.h"
#include "base/status_macros.h"
#include "engine/sampler.h"
#include "engine/speculation.h"
#include "nestor/statistics.h"

namespace nestor {
namespace {

// One row that decodes: its sequence and the token that it runs next.
struct Row {
  SequenceId sequence = 0;
  int level = 0;
  int32_t next_token = 0;
  Sampler sampler{SamplingOptions{}};
};

// Removes the sequences that were added, whatever happened in between.
class Sequences {
 public:
  explicit Sequences(Engine* engine) : engine_(engine) {}
  ~Sequences() {
    for (const SequenceId sequence : added_) engine_->RemoveSequence(sequence);
  }
  Sequences(const Sequences&) = delete;
  Sequences& operator=(const Sequences&) = delete;

  absl::StatusOr<SequenceId> Add(int64_t length) {
    NESTOR_ASSIGN_OR_RETURN(const SequenceId sequence, engine_->AddSequence(length));
    added_.push_back(sequence);
    return sequence;
  }

 private:
  Engine* const engine_;
  std::vector<SequenceId> added_;
};

// Adds what the step executed to `measurement`.
absl::Status CheckedStep(Engine* engine, const StepPlan& plan, StepResult* result,
                         Timing* measurement) {
  NESTOR_RETURN_IF_ERROR(engine->Step(plan, result));
  for (const StepResult::Entry& entry : result->entries) NESTOR_RETURN_IF_ERROR(entry.status);
  measurement->weight_bytes += result->executed.weight_bytes;
  measurement->flops += result->executed.flops;
  return absl::OkStatus();
}

// Runs `tokens` of one sequence in chunks; the result is that of the last chunk.
absl::StatusOr<StepResult> RunPrompt(Engine* engine, SequenceId sequence, int level,
                                     std::span<const int32_t> tokens, Timing* measurement) {
  const auto chunk = static_cast<size_t>(engine->options().max_step_rows);
  StepResult result;
  while (true) {
    const bool is_last = tokens.size() <= chunk;
    const std::span<const int32_t> head = tokens.first(std::min(tokens.size(), chunk));
    const StepPlan plan = {
        .entries = {{.sequence = sequence,
                     .tokens = head,
                     .level = level,
                     .output = is_last ? StepEntry::Output::kLastLogits : StepEntry::Output::kNone,
                     .targets = {}}}};
    NESTOR_RETURN_IF_ERROR(CheckedStep(engine, plan, &result, measurement));
    if (is_last) return result;
    tokens = tokens.subspan(chunk);
  }
}

// One pass of a decode step, the same in every step: `plan` points at the rows' next tokens.
struct Pass {
  std::vector<Row*> rows;
  StepPlan plan;
  StepResult result;
};

// One token for each row of `pass`.
absl::Status DecodeStep(Engine* engine, Pass* pass, Timing* measurement) {
  NESTOR_RETURN_IF_ERROR(CheckedStep(engine, pass->plan, &pass->result, measurement));
  for (size_t i = 0; i < pass->rows.size(); ++i) {
    const StepResult::Entry& ran = pass->result.entries[i];
    ++measurement->rows_by_level[ran.executed_level];
    pass->rows[i]->next_token = pass->rows[i]->sampler.Sample(ran.values);
  }
  return absl::OkStatus();
}

// The passes of a step. `rows` is borrowed.
std::vector<Pass> PassesOf(std::vector<Row>* rows, EngineTimer::Mix mix) {
  LevelSet may_run = 0;
  if (mix == EngineTimer::Mix::kEngineChooses) {
    for (const Row& row : *rows) may_run |= SetOf(row.level);
  }
  const bool in_one_pass = mix != EngineTimer::Mix::kPassPerLevel;
  std::map<int, Pass> passes;
  for (Row& row : *rows) {
    Pass& pass = passes[in_one_pass ? 0 : row.level];
    pass.rows.push_back(&row);
    pass.plan.entries.push_back({.sequence = row.sequence,
                                 .tokens = {&row.next_token, 1},
                                 .level = row.level,
                                 .may_run = may_run,
                                 .output = StepEntry::Output::kLastLogits,
                                 .targets = {}});
  }
  std::vector<Pass> list;
  for (auto& [level, pass] : passes) list.push_back(std::move(pass));
  return list;
}

// How many of `texts`, from the first on, one step takes; at least 1. REQUIRES: `texts` is not
// empty.
size_t CountThatFit(std::span<const std::vector<int32_t>> texts, int64_t max_rows) {
  auto rows = static_cast<int64_t>(texts[0].size());
  size_t count = 1;
  while (count < texts.size() && rows + static_cast<int64_t>(texts[count].size()) <= max_rows) {
    rows += static_cast<int64_t>(texts[count++].size());
  }
  return count;
}

// Embeds `texts` in one step.
absl::Status EmbedStep(Engine* engine, int level, std::span<const std::vector<int32_t>> texts,
                       Timing* measurement) {
  Sequences sequences(engine);
  StepPlan plan;
  for (const std::vector<int32_t>& text : texts) {
    NESTOR_ASSIGN_OR_RETURN(const SequenceId id, sequences.Add(static_cast<int64_t>(text.size())));
    plan.entries.push_back({.sequence = id,
                            .tokens = text,
                            .level = level,
                            .output = StepEntry::Output::kEmbedding,
                            .targets = {}});
  }
  StepResult result;
  return CheckedStep(engine, plan, &result, measurement);
}

void Add(const SpeculativeRound& round, SpeculationMeasurement* measurement) {
  measurement->decoding.tokens += round.num_drawn();
  measurement->num_examined += std::min(round.num_drawn(), round.num_drafted());
  measurement->num_accepted += round.num_accepted();
  for (const SpeculativeRound::RanStep& step : round.steps()) {
    const bool verifies = &step == &round.steps().back();
    const double seconds = std::chrono::duration<double>(step.time).count();
    (verifies ? measurement->verify_seconds : measurement->draft_seconds) += seconds;
    ++(verifies ? measurement->verify_steps : measurement->draft_steps);
    measurement->decoding.weight_bytes += step.weight_bytes;
  }
}

double Ratio(double numerator, int64_t denominator) {
  return denominator == 0 ? 0 : numerator / static_cast<double>(denominator);
}

double SecondsSince(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

double SpeculationMeasurement::acceptance() const {
  return Ratio(static_cast<double>(num_accepted), num_examined);
}

double SpeculationMeasurement::draft_step_seconds() const {
  return Ratio(draft_seconds, draft_steps);
}

double SpeculationMeasurement::verify_step_seconds() const {
  return Ratio(verify_seconds, verify_steps);
}

absl::StatusOr<std::vector<Timing>> MedianOfRounds(
    const std::vector<std::function<absl::StatusOr<Timing>()>>& jobs, int rounds,
    Progress* progress) {
  NESTOR_CHECK(rounds >= 1);
  std::vector<Timing> medians(jobs.size());
  std::vector<std::vector<double>> seconds(jobs.size());
  for (int round = -1; round < rounds; ++round) {
    for (size_t i = 0; i < jobs.size(); ++i) {
      NESTOR_ASSIGN_OR_RETURN(medians[i], jobs[i]());
      if (round >= 0) seconds[i].push_back(medians[i].seconds);
      progress->Advance();
    }
  }
  for (size_t i = 0; i < jobs.size(); ++i) medians[i].seconds = Median(seconds[i]);
  return medians;
}

std::vector<int32_t> EngineTimer::RandomTokens(int64_t count) {
  std::uniform_int_distribution<int32_t> any(
      0, static_cast<int32_t>(engine_->model().spec().vocabulary) - 1);
  std::vector<int32_t> tokens(count);
  for (int32_t& token : tokens) token = any(random_);
  return tokens;
}

absl::StatusOr<Timing> EngineTimer::Decode(const DecodeShape& shape) {
  NESTOR_CHECK(shape.context >= 1);
  Sequences sequences(engine_);
  std::vector<Row> rows;
  Timing measurement;
  for (const int level : shape.levels) {
    NESTOR_ASSIGN_OR_RETURN(const SequenceId id, sequences.Add(shape.context + shape.steps));
    Row row = {.sequence = id, .level = level};
    Timing prompt;  // not part of what is timed
    NESTOR_ASSIGN_OR_RETURN(const StepResult result,
                            RunPrompt(engine_, id, level, RandomTokens(shape.context), &prompt));
    row.next_token = row.sampler.Sample(result.entries[0].values);
    rows.push_back(std::move(row));
  }
  std::vector<Pass> passes = PassesOf(&rows, shape.mix);
  const auto start = std::chrono::steady_clock::now();
  for (int64_t step = 0; step < shape.steps; ++step) {
    for (Pass& pass : passes) {
      NESTOR_RETURN_IF_ERROR(DecodeStep(engine_, &pass, &measurement));
    }
  }
  measurement.seconds = SecondsSince(start);
  measurement.tokens = static_cast<int64_t>(rows.size()) * shape.steps;
  return measurement;
}

absl::StatusOr<SpeculationMeasurement> EngineTimer::Speculate(const SpeculationShape& shape) {
  SpeculationMeasurement measurement;
  for (const std::vector<int32_t>& prompt : shape.prompts) {
    NESTOR_RETURN_IF_ERROR(SpeculateOn(shape, prompt, &measurement));
  }
  return measurement;
}

absl::Status EngineTimer::SpeculateOn(const SpeculationShape& shape,
                                      std::span<const int32_t> prompt,
                                      SpeculationMeasurement* measurement) {
  Sequences sequences(engine_);
  NESTOR_ASSIGN_OR_RETURN(const SequenceId id,
                          sequences.Add(static_cast<int64_t>(prompt.size()) + shape.tokens));
  Timing of_prompt;
  NESTOR_ASSIGN_OR_RETURN(const StepResult first,
                          RunPrompt(engine_, id, shape.verify_level, prompt, &of_prompt));
  Sampler sampler{SamplingOptions{}};
  int32_t token = sampler.Sample(first.entries[0].values);
  const std::vector<int32_t>& ends = engine_->model().spec().end_tokens;
  const auto ends_text = [&](int32_t id) {
    return std::find(ends.begin(), ends.end(), id) != ends.end();
  };
  SpeculativeRound round(engine_);
  int64_t left = ends_text(token) ? 0 : shape.tokens;
  const auto start = std::chrono::steady_clock::now();
  while (left > 0) {
    NESTOR_RETURN_IF_ERROR(round.Run({.sequence = id,
                                      .token = token,
                                      .draft_level = shape.draft_level,
                                      .verify_level = shape.verify_level,
                                      .num_drafts = std::min(shape.num_drafts, left - 1)},
                                     &sampler));
    NESTOR_RETURN_IF_ERROR(round.sequence_status());
    bool goes_on = true;
    while (goes_on) {
      token = sampler.Sample(round.logits());
      left = ends_text(token) ? 0 : left - 1;
      goes_on = round.Accept(token) && left > 0;
    }
    round.Settle();
    Add(round, measurement);
  }
  measurement->decoding.seconds += SecondsSince(start);
  return absl::OkStatus();
}

absl::StatusOr<Timing> EngineTimer::Prefill(int level, int64_t tokens) {
  const std::vector<int32_t> prompt = RandomTokens(tokens);
  Sequences sequences(engine_);
  NESTOR_ASSIGN_OR_RETURN(const SequenceId id, sequences.Add(tokens));
  Timing measurement = {.tokens = tokens};
  const auto start = std::chrono::steady_clock::now();
  NESTOR_RETURN_IF_ERROR(RunPrompt(engine_, id, level, prompt, &measurement).status());
  measurement.seconds = SecondsSince(start);
  return measurement;
}

absl::StatusOr<Timing> EngineTimer::Embed(int level, std::span<const std::vector<int32_t>> texts,
                                          int64_t batch) {
  NESTOR_CHECK(batch >= 1);
  Timing measurement;
  for (const std::vector<int32_t>& text : texts) {
    measurement.tokens += static_cast<int64_t>(text.size());
  }
  const auto start = std::chrono::steady_clock::now();
  while (!texts.empty()) {
    std::span<const std::vector<int32_t>> rest =
        texts.first(std::min(texts.size(), static_cast<size_t>(batch)));
    texts = texts.subspan(rest.size());
    while (!rest.empty()) {
      const auto in_step = rest.first(CountThatFit(rest, engine_->options().max_step_rows));
      NESTOR_RETURN_IF_ERROR(EmbedStep(engine_, level, in_step, &measurement));
      rest = rest.subspan(in_step.size());
    }
  }
  measurement.seconds = SecondsSince(start);
  return measurement;
}

}  // namespace nestor
