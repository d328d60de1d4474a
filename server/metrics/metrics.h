#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "prometheus/counter.h"
#include "prometheus/gauge.h"
#include "prometheus/histogram.h"
#include "prometheus/registry.h"
#include "server/events.h"
#include "server/served_model.h"

namespace prometheus {
class Exposer;
}

namespace nestor {

// Counts what happens, under the names of docs/metrics.md. Every labelled child exists from the
// start, so that a rate over it is right from the first event on. Thread-safe.
class Metrics : public Events {
 public:
  explicit Metrics(const ServedModel& model);

  void SetReady(bool is_ready);

  void OnRejected(absl::StatusCode code) override;
  void OnLoad(const LoadEvent& load) override;
  void OnStep(const StepEvent& step) override;
  void OnSpeculation(const SpeculationEvent& round) override;
  void OnTokens(int level, TokenKind kind, int64_t count) override;
  void OnFirstToken(Duration since_arrival) override;
  void OnNextToken(Duration since_last) override;
  void OnFinished(FinishReason reason, const Usage& usage, Duration since_arrival) override;
  void OnFailed(Failure failure, const Usage& usage) override;

  const std::shared_ptr<prometheus::Registry>& registry() const { return registry_; }
  // The text that the page shows.
  std::string Text() const;

 private:
  prometheus::Counter* AddCounter(const std::string& name, const std::string& help,
                                  const std::map<std::string, std::string>& labels = {});
  prometheus::Gauge* AddGauge(const std::string& name, const std::string& help,
                              const std::map<std::string, std::string>& labels = {});
  prometheus::Histogram* AddHistogram(const std::string& name, const std::string& help,
                                      const std::vector<double>& bounds);
  void CountUsage(const Usage& usage);

  // prometheus-cpp shares a registry with its pages.
  const std::shared_ptr<prometheus::Registry> registry_;
  prometheus::Gauge* running_;
  prometheus::Gauge* waiting_;
  prometheus::Gauge* kv_cache_usage_;
  prometheus::Gauge* ready_;
  prometheus::Counter* prompt_tokens_;
  prometheus::Counter* generation_tokens_;
  prometheus::Counter* draft_tokens_;
  prometheus::Counter* accepted_tokens_;
  std::vector<prometheus::Counter*> prompt_tokens_by_level_;
  std::vector<prometheus::Counter*> completion_tokens_by_level_;
  std::map<FinishReason, prometheus::Counter*> successes_;
  std::map<Failure, prometheus::Counter*> failures_;
  std::map<absl::StatusCode, prometheus::Counter*> rejections_;
  std::map<Degradation, prometheus::Counter*> degraded_;
  prometheus::Counter* targets_met_;
  prometheus::Counter* targets_missed_;
  prometheus::Counter* relative_cost_spent_;
  prometheus::Histogram* first_token_time_;
  prometheus::Histogram* inter_token_time_;
  prometheus::Histogram* request_time_;
  prometheus::Histogram* queue_time_;
  prometheus::Histogram* prefill_time_;
  prometheus::Histogram* decode_time_;
  prometheus::Histogram* step_time_;
  prometheus::Histogram* step_time_error_;
  prometheus::Histogram* step_rows_;
};

// Serves /metrics over HTTP while it lives. Stopping takes about two seconds.
class MetricsPage {
 public:
  // `listen` is ADDRESS:PORT. UNAVAILABLE where the port is taken.
  static absl::StatusOr<std::unique_ptr<MetricsPage>> Start(const std::string& listen,
                                                            const Metrics& metrics);
  ~MetricsPage();
  int port() const { return port_; }

 private:
  MetricsPage(std::unique_ptr<prometheus::Exposer> exposer, int port);
  const std::unique_ptr<prometheus::Exposer> exposer_;
  const int port_;
};

}  // namespace nestor
