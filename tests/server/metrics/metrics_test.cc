#include "server/metrics/metrics.h"

#include <regex>
#include <set>

#include "base/file.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace nestor {
namespace {

using ::testing::HasSubstr;

ServedModel TwoLevels() {
  ServedModel model;
  model.name = "m";
  model.levels.resize(2);
  model.levels[0].form = "residual";
  model.levels[1].form = "full";
  return model;
}

std::set<std::string> NamesIn(const std::string& text, const std::string& pattern) {
  std::set<std::string> names;
  const std::regex regex(pattern);
  for (std::sregex_iterator match(text.begin(), text.end(), regex), end; match != end; ++match) {
    names.insert((*match)[1]);
  }
  return names;
}

TEST(MetricsTest, EveryDocumentedNameIsThereFromTheStartAndNoOther) {
  const auto document = ReadFile(NESTOR_SOURCE_DIR "/docs/metrics.md");
  ASSERT_TRUE(document.ok()) << document.status();
  const std::set<std::string> documented = NamesIn(*document, "\\| `(nestor_[a-z0-9_]+)");
  EXPECT_GE(documented.size(), 20u);
  const std::set<std::string> shown =
      NamesIn(Metrics(TwoLevels()).Text(), "# TYPE (nestor_[a-z0-9_]+) ");
  EXPECT_EQ(shown, documented);
}

TEST(MetricsTest, EveryLabelledChildExistsFromTheStart) {
  const std::string text = Metrics(TwoLevels()).Text();
  for (const char* line : {"nestor_request_success_total{finished_reason=\"stop\"} 0",
                           "nestor_requests_rejected_total{reason=\"queue_full\"} 0",
                           "nestor_requests_failed_total{reason=\"non_finite\"} 0",
                           "nestor_requests_degraded_total{reason=\"per_token_target\"} 0",
                           "nestor_request_target_total{result=\"missed\"} 0",
                           "nestor_tokens_by_level_total{kind=\"completion\",level=\"1\"} 0"}) {
    EXPECT_THAT(text, HasSubstr(line));
  }
}

TEST(MetricsTest, EventsAreCounted) {
  Metrics metrics(TwoLevels());
  metrics.SetReady(true);
  metrics.OnLoad({.num_running = 3, .num_waiting = 7, .kv_cache_usage = 0.25});
  metrics.OnTokens(1, TokenKind::kPrompt, 12);
  metrics.OnTokens(0, TokenKind::kCompletion, 1);
  metrics.OnRejected(absl::StatusCode::kResourceExhausted);
  metrics.OnFailed(Failure::kSlowReader, {});
  Usage usage;
  usage.relative_cost = 2.5;
  usage.has_target = true;
  usage.degradation = Degradation::kFirstTokenTarget;
  metrics.OnFinished(FinishReason::kLength, usage, std::chrono::milliseconds(30));
  metrics.OnSpeculation({.num_drafted = 9, .num_accepted = 4});
  metrics.OnStep({.rows = 5,
                  .actual = std::chrono::microseconds(300),
                  .predicted = std::chrono::microseconds(200)});
  const std::string text = metrics.Text();
  for (const char* line :
       {"nestor_ready 1", "nestor_num_requests_running 3", "nestor_num_requests_waiting 7",
        "nestor_kv_cache_usage_perc 0.25", "nestor_prompt_tokens_total 12",
        "nestor_generation_tokens_total 1", "nestor_spec_decode_num_draft_tokens_total 9",
        "nestor_spec_decode_num_accepted_tokens_total 4",
        "nestor_tokens_by_level_total{kind=\"prompt\",level=\"1\"} 12",
        "nestor_requests_rejected_total{reason=\"queue_full\"} 1",
        "nestor_requests_failed_total{reason=\"slow_reader\"} 1",
        "nestor_requests_degraded_total{reason=\"first_token_target\"} 1",
        "nestor_request_target_total{result=\"met\"} 1",
        "nestor_request_success_total{finished_reason=\"length\"} 1",
        "nestor_relative_cost_spent_total 2.5", "nestor_step_time_seconds_bucket{le=\"0.0002\"} 0",
        "nestor_step_time_seconds_bucket{le=\"0.0005\"} 1", "nestor_step_time_error_ratio_sum 1.5",
        "nestor_e2e_request_latency_seconds_count 1"}) {
    EXPECT_THAT(text, HasSubstr(line));
  }
}

}  // namespace
}  // namespace nestor
