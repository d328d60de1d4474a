#include "server/metrics/metrics.h"

#include <exception>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "prometheus/exposer.h"
#include "prometheus/text_serializer.h"

namespace nestor {
namespace {

// Seconds, from 100 us to five minutes, three a decade: a token of a small model takes a few
// milliseconds, a long answer minutes.
const std::vector<double>& TimeBounds() {
  static const std::vector<double> bounds = {0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01,
                                             0.02,   0.05,   0.1,    0.2,   0.5,   1,     2,
                                             5,      10,     30,     60,    120,   300};
  return bounds;
}

// Actual over predicted time of a step; 1 is a perfect prediction.
const std::vector<double>& RatioBounds() {
  static const std::vector<double> bounds = {0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 1,
                                             1.05, 1.1, 1.2, 1.3, 1.5, 2,    4};
  return bounds;
}

const std::vector<double>& RowBounds() {
  static const std::vector<double> bounds = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024};
  return bounds;
}

constexpr std::pair<FinishReason, const char*> kFinishReasons[] = {
    {FinishReason::kStop, "stop"},
    {FinishReason::kLength, "length"},
    {FinishReason::kComplete, "complete"}};

const char* NameOf(Failure failure) {
  switch (failure) {
    case Failure::kCancelled:
      return "cancelled";
    case Failure::kDeadline:
      return "deadline";
    case Failure::kSlowReader:
      return "slow_reader";
    case Failure::kNonFinite:
      return "non_finite";
    case Failure::kDrain:
      return "drain";
    case Failure::kInternal:
      return "internal";
  }
  return "internal";
}

constexpr std::pair<absl::StatusCode, const char*> kRejections[] = {
    {absl::StatusCode::kInvalidArgument, "invalid_argument"},
    {absl::StatusCode::kFailedPrecondition, "failed_precondition"},
    {absl::StatusCode::kResourceExhausted, "queue_full"},
    {absl::StatusCode::kUnavailable, "unavailable"},
    {absl::StatusCode::kDeadlineExceeded, "deadline"},
    {absl::StatusCode::kInternal, "internal"}};

}  // namespace

prometheus::Counter* Metrics::AddCounter(const std::string& name, const std::string& help,
                                         const std::map<std::string, std::string>& labels) {
  return &prometheus::BuildCounter().Name(name).Help(help).Register(*registry_).Add(labels);
}

prometheus::Gauge* Metrics::AddGauge(const std::string& name, const std::string& help,
                                     const std::map<std::string, std::string>& labels) {
  return &prometheus::BuildGauge().Name(name).Help(help).Register(*registry_).Add(labels);
}

prometheus::Histogram* Metrics::AddHistogram(const std::string& name, const std::string& help,
                                             const std::vector<double>& bounds) {
  return &prometheus::BuildHistogram().Name(name).Help(help).Register(*registry_).Add({}, bounds);
}

Metrics::Metrics(const ServedModel& model)
    : registry_(std::make_shared<prometheus::Registry>()),
      running_(AddGauge("nestor_num_requests_running", "Sequences in the engine.")),
      waiting_(AddGauge("nestor_num_requests_waiting", "Sequences waiting for the engine.")),
      kv_cache_usage_(AddGauge("nestor_kv_cache_usage_perc", "KV cache in use; 1 is all of it.")),
      ready_(AddGauge("nestor_ready", "1 while the server takes requests.")),
      prompt_tokens_(AddCounter("nestor_prompt_tokens_total", "Prompt tokens run.")),
      generation_tokens_(AddCounter("nestor_generation_tokens_total", "Tokens generated.")),
      draft_tokens_(AddCounter("nestor_spec_decode_num_draft_tokens_total",
                               "Tokens drafted at a cheaper level.")),
      accepted_tokens_(AddCounter("nestor_spec_decode_num_accepted_tokens_total",
                                  "Drafted tokens that the level above drew too.")),
      targets_met_(AddCounter("nestor_request_target_total",
                              "Accepted requests with a target, by whether they met it.",
                              {{"result", "met"}})),
      targets_missed_(AddCounter("nestor_request_target_total",
                                 "Accepted requests with a target, by whether they met it.",
                                 {{"result", "missed"}})),
      relative_cost_spent_(AddCounter("nestor_relative_cost_spent_total",
                                      "Sum of relative_cost over the rows that ran.")),
      first_token_time_(AddHistogram("nestor_time_to_first_token_seconds",
                                     "From arrival to the first token.", TimeBounds())),
      inter_token_time_(AddHistogram("nestor_inter_token_latency_seconds",
                                     "Between two tokens of a request.", TimeBounds())),
      request_time_(AddHistogram("nestor_e2e_request_latency_seconds",
                                 "From arrival to the end of finished requests.", TimeBounds())),
      queue_time_(AddHistogram("nestor_request_queue_time_seconds",
                               "Waiting for the engine, finished requests.", TimeBounds())),
      prefill_time_(AddHistogram("nestor_request_prefill_time_seconds",
                                 "From leaving the queue to the first token, finished requests.",
                                 TimeBounds())),
      decode_time_(AddHistogram("nestor_request_decode_time_seconds",
                                "From the first token to the end, finished requests.",
                                TimeBounds())),
      step_time_(AddHistogram("nestor_step_time_seconds", "One forward pass.", TimeBounds())),
      step_time_error_(AddHistogram("nestor_step_time_error_ratio",
                                    "Actual over predicted time of a step.", RatioBounds())),
      step_rows_(AddHistogram("nestor_step_rows", "Rows of a step.", RowBounds())) {
  for (size_t level = 0; level < model.levels.size(); ++level) {
    const std::string name = absl::StrCat(level);
    const char* help = "Tokens by the level they ran at.";
    prompt_tokens_by_level_.push_back(
        AddCounter("nestor_tokens_by_level_total", help, {{"level", name}, {"kind", "prompt"}}));
    completion_tokens_by_level_.push_back(AddCounter("nestor_tokens_by_level_total", help,
                                                     {{"level", name}, {"kind", "completion"}}));
    AddGauge("nestor_level_info", "The levels of the served model.",
             {{"level", name},
              {"form", model.levels[level].form},
              {"relative_cost", absl::StrCat(model.levels[level].relative_cost)},
              {"quality", absl::StrCat(model.levels[level].quality)},
              {"interpolated", model.levels[level].is_interpolated ? "true" : "false"}})
        ->Set(1);
  }
  for (const auto& [reason, name] : kFinishReasons) {
    successes_[reason] = AddCounter("nestor_request_success_total", "Requests that finished.",
                                    {{"finished_reason", name}});
  }
  for (const Failure failure : kFailures) {
    failures_[failure] =
        AddCounter("nestor_requests_failed_total", "Accepted requests that did not finish.",
                   {{"reason", NameOf(failure)}});
  }
  for (const auto& [code, name] : kRejections) {
    rejections_[code] = AddCounter("nestor_requests_rejected_total",
                                   "Requests that were not accepted.", {{"reason", name}});
  }
  for (const Degradation degradation : kDegradations) {
    degraded_[degradation] =
        AddCounter("nestor_requests_degraded_total",
                   "Requests of which some row ran below the best level that the budget allows.",
                   {{"reason", NameOf(degradation)}});
  }
  AddGauge("nestor_model_info", "The served model.",
           {{"model", model.name},
            {"architecture", model.architecture},
            {"dtype", model.dtype},
            {"device", model.device}})
      ->Set(1);
}

void Metrics::SetReady(bool is_ready) { ready_->Set(is_ready ? 1 : 0); }

void Metrics::OnRejected(absl::StatusCode code) {
  const auto found = rejections_.find(code);
  (found != rejections_.end() ? found->second : rejections_.at(absl::StatusCode::kInternal))
      ->Increment();
}

void Metrics::OnLoad(const LoadEvent& load) {
  running_->Set(static_cast<double>(load.num_running));
  waiting_->Set(static_cast<double>(load.num_waiting));
  kv_cache_usage_->Set(load.kv_cache_usage);
}

void Metrics::OnStep(const StepEvent& step) {
  step_time_->Observe(SecondsOf(step.actual));
  step_rows_->Observe(static_cast<double>(step.rows));
  if (step.predicted > Duration::zero()) {
    step_time_error_->Observe(SecondsOf(step.actual) / SecondsOf(step.predicted));
  }
}

void Metrics::OnSpeculation(const SpeculationEvent& round) {
  draft_tokens_->Increment(static_cast<double>(round.num_drafted));
  accepted_tokens_->Increment(static_cast<double>(round.num_accepted));
}

void Metrics::OnTokens(int level, TokenKind kind, int64_t count) {
  const double amount = static_cast<double>(count);
  if (kind == TokenKind::kPrompt) {
    prompt_tokens_->Increment(amount);
    prompt_tokens_by_level_[level]->Increment(amount);
  } else {
    generation_tokens_->Increment(amount);
    completion_tokens_by_level_[level]->Increment(amount);
  }
}

void Metrics::OnFirstToken(Duration since_arrival) {
  first_token_time_->Observe(SecondsOf(since_arrival));
}

void Metrics::OnNextToken(Duration since_last) {
  inter_token_time_->Observe(SecondsOf(since_last));
}

void Metrics::CountUsage(const Usage& usage) {
  relative_cost_spent_->Increment(usage.relative_cost);
  if (usage.degradation != Degradation::kNone) degraded_.at(usage.degradation)->Increment();
  if (usage.has_target) (usage.target_met ? targets_met_ : targets_missed_)->Increment();
}

void Metrics::OnFinished(FinishReason reason, const Usage& usage, Duration since_arrival) {
  successes_.at(reason)->Increment();
  request_time_->Observe(SecondsOf(since_arrival));
  queue_time_->Observe(SecondsOf(usage.queue_time));
  prefill_time_->Observe(SecondsOf(usage.prefill_time));
  if (usage.completion_tokens > 0) decode_time_->Observe(SecondsOf(usage.decode_time));
  CountUsage(usage);
}

void Metrics::OnFailed(Failure failure, const Usage& usage) {
  failures_.at(failure)->Increment();
  CountUsage(usage);
}

std::string Metrics::Text() const {
  return prometheus::TextSerializer().Serialize(registry_->Collect());
}

absl::StatusOr<std::unique_ptr<MetricsPage>> MetricsPage::Start(const std::string& listen,
                                                                const Metrics& metrics) {
  try {
    auto exposer = std::make_unique<prometheus::Exposer>(listen, /*num_threads=*/1);
    exposer->RegisterCollectable(metrics.registry());
    const std::vector<int> ports = exposer->GetListeningPorts();
    NESTOR_CHECK(!ports.empty());
    return std::unique_ptr<MetricsPage>(new MetricsPage(std::move(exposer), ports.front()));
  } catch (const std::exception& error) {
    return absl::UnavailableError(absl::StrCat("metrics.listen: cannot listen on ", listen,
                                               " (is the port taken?): ", error.what()));
  }
}

MetricsPage::MetricsPage(std::unique_ptr<prometheus::Exposer> exposer, int port)
    : exposer_(std::move(exposer)), port_(port) {}

MetricsPage::~MetricsPage() = default;

}  // namespace nestor
