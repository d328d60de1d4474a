#include <chrono>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/status_macros.h"
#include "grpc/health/v1/health.grpc.pb.h"
#include "nestor/client.h"
#include "nestor/command.h"
#include "nestor/flags.h"

namespace nestor {
namespace {

using grpc::health::v1::Health;
using grpc::health::v1::HealthCheckRequest;
using grpc::health::v1::HealthCheckResponse;

absl::Status NotServing(const std::string& service, HealthCheckResponse::ServingStatus status) {
  return absl::UnavailableError(absl::StrCat(
      "service \"", service, "\" is " + HealthCheckResponse::ServingStatus_Name(status)));
}

absl::Status CheckOnce(const Connection& connection, const std::string& service) {
  const std::unique_ptr<grpc::ClientContext> context = connection.MakeContext();
  HealthCheckRequest request;
  request.set_service(service);
  HealthCheckResponse response;
  NESTOR_RETURN_IF_ERROR(connection.ToStatus(
      Health::NewStub(connection.channel())->Check(context.get(), request, &response)));
  if (response.status() == HealthCheckResponse::SERVING) return absl::OkStatus();
  return NotServing(service, response.status());
}

// Waits for a daemon that does not listen yet as well as for one that still loads.
absl::Status WaitUntilServing(const Connection& connection, const std::string& service,
                              absl::Duration wait) {
  grpc::ClientContext context;
  context.set_wait_for_ready(true);
  context.set_deadline(std::chrono::system_clock::now() + absl::ToChronoNanoseconds(wait));
  HealthCheckRequest request;
  request.set_service(service);
  const auto reader = Health::NewStub(connection.channel())->Watch(&context, request);
  HealthCheckResponse response;
  std::optional<HealthCheckResponse::ServingStatus> last;
  while (reader->Read(&response)) {
    last = response.status();
    if (*last == HealthCheckResponse::SERVING) {
      context.TryCancel();
      reader->Finish();
      return absl::OkStatus();
    }
  }
  const grpc::Status status = reader->Finish();
  if (status.error_code() != grpc::StatusCode::DEADLINE_EXCEEDED)
    return connection.ToStatus(status);
  if (last) return NotServing(service, *last);
  return connection.ToStatus(grpc::Status(grpc::StatusCode::UNAVAILABLE,
                                          "no daemon within " + absl::FormatDuration(wait)));
}

}  // namespace

absl::Status RunHealth(const std::vector<std::string>& arguments) {
  ConnectionFlags connection_flags;
  std::string service = "nestor.v1.Inference";
  std::optional<absl::Duration> wait;
  Flags flags(
      "nestor health [flags]\n\n"
      "Succeeds once the daemon is ready: its model loaded, warmed up, and not draining.",
      "nestor health --wait 60s");
  flags.Add("service", &service, "health service to ask for; \"\" tells whether the process lives");
  flags.Add("wait", &wait, "waits up to this long until it is ready");
  AddConnectionFlags(&flags, &connection_flags);
  NESTOR_ASSIGN_OR_RETURN(const std::vector<std::string> positional, flags.Parse(arguments));
  if (!positional.empty()) return UsageError(absl::StrCat("unexpected \"", positional[0], "\""));
  const Connection connection(connection_flags);
  NESTOR_RETURN_IF_ERROR(wait ? WaitUntilServing(connection, service, *wait)
                              : CheckOnce(connection, service));
  absl::PrintF("SERVING\n");
  return absl::OkStatus();
}

}  // namespace nestor
