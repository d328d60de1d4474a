#include "nestor/bench_speculation.h"

#include <algorithm>
#include <functional>
#include <span>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/progress.h"
#include "base/speculative_gain.h"
#include "base/status_macros.h"
#include "engine/speculation.h"
#include "nestor/bench_measure.h"
#include "nestor/flags.h"
#include "nestor/text_table.h"

namespace nestor {
namespace {

using Prompts = std::vector<std::vector<int32_t>>;

absl::StatusOr<Prompts> TokensOf(const SpeculationBenchOptions& options, const Engine& engine) {
  Prompts prompts;
  for (const std::string& text : options.prompts) {
    std::string rendered = text;
    const bool is_chat = engine.chat_template() != nullptr;
    if (is_chat) {
      NESTOR_ASSIGN_OR_RETURN(rendered, engine.chat_template()->Render(
                                            {{"user", text}}, /*adds_generation_prompt=*/true));
    }
    NESTOR_ASSIGN_OR_RETURN(prompts.emplace_back(),
                            engine.tokenizer().Encode(rendered, /*adds_special_tokens=*/!is_chat));
    const int64_t length = static_cast<int64_t>(prompts.back().size()) + options.tokens;
    if (prompts.back().empty() || length > engine.max_sequence_length()) {
      return UsageError(absl::StrCat("--prompts: prompt ", prompts.size(), " and --tokens need ",
                                     length, " positions, at most ", engine.max_sequence_length(),
                                     " fit"));
    }
  }
  if (prompts.empty()) return UsageError("--prompts: the file has no prompt");
  return prompts;
}

// Drafts of a round that tells a draft level's acceptance and time.
constexpr int64_t kTriedDrafts = 4;

// The draft level and the number of drafts with the best gain by the formula: `draft_levels` are
// tried one by one, and so are the numbers of rows that verify.
absl::StatusOr<SpeculationReport> Choose(EngineTimer* timer, const std::vector<int>& draft_levels,
                                         EngineTimer::SpeculationShape shape, Progress* progress) {
  const auto run = [&]() -> absl::StatusOr<SpeculationMeasurement> {
    progress->Advance();
    return timer->Speculate(shape);
  };
  NESTOR_ASSIGN_OR_RETURN(const SpeculationMeasurement plain, run());
  const double plain_step = plain.verify_step_seconds();
  std::vector<double> verify_times;
  shape.draft_level = draft_levels.front();
  for (shape.num_drafts = 1; shape.num_drafts <= kMaxDrafts; ++shape.num_drafts) {
    NESTOR_ASSIGN_OR_RETURN(const SpeculationMeasurement tried, run());
    verify_times.push_back(tried.verify_step_seconds() / plain_step);
  }
  SpeculationReport best = {.verify_level = shape.verify_level};
  shape.num_drafts = kTriedDrafts;
  for (const int level : draft_levels) {
    shape.draft_level = level;
    NESTOR_ASSIGN_OR_RETURN(const SpeculationMeasurement tried, run());
    for (size_t i = 0; i < verify_times.size(); ++i) {
      const int num_drafts = static_cast<int>(i) + 1;
      const double gain = SpeculativeGain(tried.acceptance(), num_drafts,
                                          tried.draft_step_seconds() / plain_step, verify_times[i]);
      if (gain <= best.expected_gain) continue;
      best.draft_level = level;
      best.num_drafts = num_drafts;
      best.expected_gain = gain;
    }
  }
  return best;
}

}  // namespace

absl::StatusOr<SpeculationReport> MeasureSpeculation(Engine* engine,
                                                     const SpeculationBenchOptions& options) {
  NESTOR_ASSIGN_OR_RETURN(const Prompts prompts, TokensOf(options, *engine));
  const auto cost_of = [&](int level) {
    return engine->model().levels()[static_cast<size_t>(level)].relative_cost;
  };
  const int verify_level = *std::max_element(options.levels.begin(), options.levels.end(),
                                             [&](int a, int b) { return cost_of(a) < cost_of(b); });
  std::vector<int> draft_levels;
  for (const int level : options.levels) {
    if (cost_of(level) < cost_of(verify_level)) draft_levels.push_back(level);
  }
  if (draft_levels.empty()) return UsageError("--levels: a cheaper level must be there to draft");
  EngineTimer timer(engine);
  EngineTimer::SpeculationShape shape = {
      .prompts = prompts, .verify_level = verify_level, .tokens = options.tokens};
  Progress progress("speculate", 1 + kMaxDrafts + static_cast<int64_t>(draft_levels.size()) +
                                     2 * (options.rounds + 1));
  NESTOR_ASSIGN_OR_RETURN(SpeculationReport report, Choose(&timer, draft_levels, shape, &progress));
  SpeculationMeasurement last[2];  // plain, in rounds
  std::vector<std::function<absl::StatusOr<Timing>()>> jobs;
  for (const int num_drafts : {0, report.num_drafts}) {
    shape.draft_level = report.draft_level;
    shape.num_drafts = num_drafts;
    SpeculationMeasurement* const result = &last[jobs.size()];
    jobs.push_back([=, &timer]() -> absl::StatusOr<Timing> {
      NESTOR_ASSIGN_OR_RETURN(*result, timer.Speculate(shape));
      return result->decoding;
    });
  }
  NESTOR_ASSIGN_OR_RETURN(const std::vector<Timing> medians,
                          MedianOfRounds(jobs, options.rounds, &progress));
  report.acceptance = last[1].acceptance();
  report.draft_time = last[1].draft_step_seconds() / last[0].verify_step_seconds();
  report.verify_time = last[1].verify_step_seconds() / last[0].verify_step_seconds();
  report.expected_gain =
      SpeculativeGain(report.acceptance, report.num_drafts, report.draft_time, report.verify_time);
  report.plain_tokens_per_second = medians[0].tokens_per_second();
  report.tokens_per_second = medians[1].tokens_per_second();
  return report;
}

nlohmann::json ToJson(const SpeculationReport& report) {
  return {{"draft_level", report.draft_level},
          {"verify_level", report.verify_level},
          {"drafts", report.num_drafts},
          {"acceptance", report.acceptance},
          {"draft_time", report.draft_time},
          {"verify_time", report.verify_time},
          {"expected_gain", report.expected_gain},
          {"gain", report.gain()},
          {"tokens_per_second", report.tokens_per_second},
          {"tokens_per_second_plain", report.plain_tokens_per_second}};
}

std::string Render(const SpeculationReport& report) {
  TextTable table({"speculate: draft level", "verify level", "drafts", "acceptance", "c", "v",
                   "gain by formula", "measured", "of the formula's", "tokens/s", "plain"});
  table.AddRow(
      {absl::StrCat(report.draft_level), absl::StrCat(report.verify_level),
       absl::StrCat(report.num_drafts), absl::StrFormat("%.3f", report.acceptance),
       absl::StrFormat("%.3f", report.draft_time), absl::StrFormat("%.3f", report.verify_time),
       absl::StrFormat("%.2f", report.expected_gain), absl::StrFormat("%.2f", report.gain()),
       absl::StrFormat("%.0f %%", 100 * report.gain() / report.expected_gain),
       absl::StrFormat("%.1f", report.tokens_per_second),
       absl::StrFormat("%.1f", report.plain_tokens_per_second)});
  return table.Render();
}

}  // namespace nestor
