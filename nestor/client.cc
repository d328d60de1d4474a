#include "nestor/client.h"

#include <chrono>
#include <cstdint>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"

namespace nestor {
namespace {

std::shared_ptr<grpc::Channel> MakeChannel(const std::string& server) {
  grpc::ChannelArguments arguments;
  // Embeddings of a batch and logs of a long text exceed gRPC's 4 MiB; the request bounds them.
  arguments.SetMaxReceiveMessageSize(-1);
  // The daemon is addressed directly: an http_proxy in the environment is for other traffic.
  arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  // While a daemon starts, `health --wait` should see it soon after it listens.
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 100);
  arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, 100);
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 1000);
  return grpc::CreateCustomChannel(server, grpc::InsecureChannelCredentials(), arguments);
}

}  // namespace

void AddConnectionFlags(Flags* flags, ConnectionFlags* connection) {
  flags->Add("server", &connection->server, "HOST:PORT of nestord");
  flags->Add("timeout", &connection->timeout, "hard limit, sent as the gRPC deadline");
}

void AddBudgetFlags(Flags* flags, BudgetFlags* budget) {
  flags->Add("latency-target", &budget->latency_target, "aim for the whole request, e.g. 1.5s");
  flags->Add("first-token-target", &budget->first_token_target,
             "aim for the time until the first token, e.g. 200ms");
  flags->Add("per-token-target", &budget->per_token_target,
             "aim for the time between two tokens, e.g. 20ms");
  flags->Add("max-cost", &budget->max_cost,
             "ceiling on the relative cost of every level executed, in (0, 1]");
  flags->Add("min-quality", &budget->min_quality,
             "floor on the quality of every level executed, in [0, 1]");
  flags->Add("level", &budget->level, "pins one level, by its number in `nestor levels`");
  flags->Add("priority", &budget->priority, "1 is the highest: who gives way last");
}

google::protobuf::Duration ToProto(absl::Duration duration) {
  google::protobuf::Duration proto;
  const int64_t seconds = absl::IDivDuration(duration, absl::Seconds(1), &duration);
  proto.set_seconds(seconds);
  proto.set_nanos(static_cast<int32_t>(duration / absl::Nanoseconds(1)));
  return proto;
}

absl::Duration FromProto(const google::protobuf::Duration& duration) {
  return absl::Seconds(duration.seconds()) + absl::Nanoseconds(duration.nanos());
}

absl::StatusOr<v1::Budget> BudgetOf(const BudgetFlags& flags) {
  v1::Budget budget;
  if (flags.latency_target) *budget.mutable_latency_target() = ToProto(*flags.latency_target);
  if (flags.first_token_target) {
    *budget.mutable_first_token_target() = ToProto(*flags.first_token_target);
  }
  if (flags.per_token_target) {
    *budget.mutable_per_token_target() = ToProto(*flags.per_token_target);
  }
  if (flags.max_cost) budget.set_max_cost(*flags.max_cost);
  if (flags.min_quality) budget.set_min_quality(*flags.min_quality);
  if (flags.level) {
    NESTOR_ASSIGN_OR_RETURN(const int32_t level, ToInt32("level", *flags.level));
    budget.set_level(level);
  }
  if (flags.priority) {
    NESTOR_ASSIGN_OR_RETURN(const int32_t priority, ToInt32("priority", *flags.priority));
    budget.set_priority(priority);
  }
  return budget;
}

Connection::Connection(const ConnectionFlags& flags)
    : flags_(flags),
      channel_(MakeChannel(flags.server)),
      inference_(v1::Inference::NewStub(channel_)) {}

std::unique_ptr<grpc::ClientContext> Connection::MakeContext() const {
  auto context = std::make_unique<grpc::ClientContext>();
  if (flags_.timeout) {
    context->set_deadline(std::chrono::system_clock::now() +
                          absl::ToChronoNanoseconds(*flags_.timeout));
  }
  return context;
}

absl::Status Connection::ToStatus(const grpc::Status& status) const {
  if (status.ok()) return absl::OkStatus();
  const auto code = static_cast<absl::StatusCode>(status.error_code());
  const std::string& message = status.error_message();
  if (status.error_code() == grpc::StatusCode::UNAVAILABLE) {
    return absl::UnavailableError(absl::StrCat(flags_.server, ": ", message));
  }
  return absl::Status(code, message);
}

}  // namespace nestor
