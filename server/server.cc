#include "server/server.h"

#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/json_log.h"
#include "base/status_macros.h"
#include "grpcpp/ext/proto_server_reflection_plugin.h"
#include "grpcpp/grpcpp.h"
#include "grpcpp/health_check_service_interface.h"
#include "server/warm_up.h"

namespace nestor {
namespace {

// For calls whose tasks have ended but whose last message is not read yet.
constexpr std::chrono::seconds kLastMessages(1);

InferenceService::Options ServiceOptions(const ServerConfig& config) {
  return {.limits = {.default_max_tokens = config.limits_default_max_tokens,
                     .max_texts = config.limits_max_texts,
                     .default_priority = static_cast<int>(config.scheduler_default_priority),
                     .speculates = config.speculation_enabled},
          .stream_buffer_tokens = config.stream_buffer_tokens};
}

WorkerOptions WorkerOptionsFrom(const ServerConfig& config, const Engine& engine,
                                const ServedModel& model) {
  return {.limits = {.max_step_rows = engine.options().max_step_rows,
                     .prefill_chunk = config.scheduler_prefill_chunk,
                     .splits_prompts = !model.is_encoder},
          .max_queue = config.scheduler_max_queue,
          .max_running = engine.options().max_sequences,
          .max_drafts = static_cast<int>(config.speculation_max_draft),
          .stall_limit = std::chrono::milliseconds(config.stream_stall_limit_ms),
          .end_tokens = model.end_tokens};
}

}  // namespace

Server::Server(const ServerConfig& config, std::unique_ptr<Engine> engine, ServedModel model)
    : config_(config),
      model_(std::move(model)),
      metrics_(model_),
      service_(&model_, ServiceOptions(config), &metrics_),
      engine_(std::move(engine)) {}

absl::StatusOr<std::unique_ptr<Server>> Server::Listen(const ServerConfig& config,
                                                       std::unique_ptr<Engine> engine,
                                                       ServedModel model) {
  std::unique_ptr<Server> server(new Server(config, std::move(engine), std::move(model)));
  NESTOR_RETURN_IF_ERROR(server->StartListening());
  return server;
}

absl::Status Server::StartListening() {
  grpc::EnableDefaultHealthCheckService(true);
  grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  grpc::ServerBuilder builder;
  // Two daemons on one port would share its connections at random; the second one must fail.
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  builder.SetMaxReceiveMessageSize(static_cast<int>(config_.server_max_message_bytes));
  if (config_.server_max_connection_age_ms > 0) {
    builder.AddChannelArgument(GRPC_ARG_MAX_CONNECTION_AGE_MS,
                               static_cast<int>(config_.server_max_connection_age_ms));
    builder.AddChannelArgument(GRPC_ARG_MAX_CONNECTION_AGE_GRACE_MS,
                               static_cast<int>(config_.server_max_connection_age_grace_ms));
  }
  builder.AddListeningPort(config_.server_listen, grpc::InsecureServerCredentials(), &port_);
  builder.RegisterService(&service_);
  grpc_server_ = builder.BuildAndStart();
  if (grpc_server_ == nullptr || port_ == 0) {
    return absl::UnavailableError(absl::StrCat("server.listen: cannot listen on ",
                                               config_.server_listen, " (is the port taken?)"));
  }
  SetReady(false);
  if (!config_.metrics_listen.empty()) {
    NESTOR_ASSIGN_OR_RETURN(metrics_page_, MetricsPage::Start(config_.metrics_listen, metrics_));
  }
  return absl::OkStatus();
}

Server::~Server() {
  if (grpc_server_ == nullptr) return;
  if (worker_ != nullptr) {
    worker_->CloseAdmission();
    worker_->EndAll();
  }
  grpc_server_->Shutdown(std::chrono::system_clock::now());
}

void Server::SetReady(bool is_ready) {
  grpc_server_->GetHealthCheckService()->SetServingStatus(v1::Inference::service_full_name(),
                                                          is_ready);
  metrics_.SetReady(is_ready);
}

absl::Status Server::WarmUpAndServe() {
  const Ladder ladder = LadderOf(model_);
  CostModel cost_model(ladder);
  NESTOR_RETURN_IF_ERROR(
      WarmUp(config_.scheduler_prefill_chunk, engine_.get(), &model_, &cost_model));
  WorkerOptions options = WorkerOptionsFrom(config_, *engine_, model_);
  worker_ = std::make_unique<Worker>(std::move(engine_), ladder, std::move(cost_model),
                                     std::move(options), &metrics_);
  service_.SetWorker(worker_.get());
  SetReady(true);
  return absl::OkStatus();
}

void Server::Drain() {
  SetReady(false);
  LogEvent(LogSeverity::kInfo, "draining", {{"grace_ms", config_.server_drain_grace_ms}});
  // Balancers see NOT_SERVING and stop sending; what they had sent already is still served.
  std::this_thread::sleep_for(std::chrono::milliseconds(config_.server_drain_grace_ms));
  worker_->CloseAdmission();
  const TimePoint limit = Clock::now() + std::chrono::milliseconds(config_.server_drain_limit_ms);
  if (!worker_->WaitUntilIdle(limit)) {
    LogEvent(LogSeverity::kWarning, "drain_limit_reached",
             {{"limit_ms", config_.server_drain_limit_ms}});
    worker_->EndAll();
    worker_->WaitUntilIdle(TimePoint::max());
  }
  grpc_server_->Shutdown(std::chrono::system_clock::now() + kLastMessages);
  LogEvent(LogSeverity::kInfo, "drained");
}

}  // namespace nestor
