#pragma once

#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/engine.h"
#include "server/config/server_config.h"
#include "server/metrics/metrics.h"
#include "server/rpc/inference_service.h"
#include "server/served_model.h"
#include "server/worker.h"

namespace grpc {
class Server;
}

namespace nestor {

// Puts the parts together: engine, worker, RPCs, health, reflection, metrics.
//
// Health: "" (liveness) is SERVING from the start; "nestor.v1.Inference" (readiness) is SERVING
// between WarmUpAndServe and Drain.
class Server {
 public:
  // Listens, not ready yet. UNAVAILABLE names a port that is taken.
  static absl::StatusOr<std::unique_ptr<Server>> Listen(const ServerConfig& config,
                                                        std::unique_ptr<Engine> engine,
                                                        ServedModel model);
  // Closes at once what Drain has not ended.
  ~Server();

  // Measures every level, then takes requests. REQUIRES: called once.
  absl::Status WarmUpAndServe();
  // NOT_SERVING at once; the grace window; no new requests; what was accepted finishes, or ends
  // with UNAVAILABLE at the drain limit. Blocks until the last call is over.
  void Drain();

  int port() const { return port_; }
  int metrics_port() const { return metrics_page_ == nullptr ? 0 : metrics_page_->port(); }
  const ServedModel& model() const { return model_; }
  const Metrics& metrics() const { return metrics_; }

 private:
  Server(const ServerConfig& config, std::unique_ptr<Engine> engine, ServedModel model);
  absl::Status StartListening();
  void SetReady(bool is_ready);

  const ServerConfig config_;
  ServedModel model_;
  Metrics metrics_;
  InferenceService service_;
  std::unique_ptr<Engine> engine_;  // until the worker takes it
  std::unique_ptr<MetricsPage> metrics_page_;
  int port_ = 0;
  std::unique_ptr<Worker> worker_;
  std::unique_ptr<grpc::Server> grpc_server_;  // ends before what its calls use
};

}  // namespace nestor
