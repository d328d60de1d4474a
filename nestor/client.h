#pragma once

#include <memory>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "google/protobuf/duration.pb.h"
#include "grpcpp/grpcpp.h"
#include "nestor/flags.h"
#include "nestor/v1/inference.grpc.pb.h"

namespace nestor {

// Where the daemon is, and for how long to wait for it.
struct ConnectionFlags {
  std::string server = "127.0.0.1:50051";
  std::optional<absl::Duration> timeout;
};

// The fields of nestor.v1.Budget as flags; what is not given stays unset in the request.
struct BudgetFlags {
  std::optional<absl::Duration> latency_target;
  std::optional<absl::Duration> first_token_target;
  std::optional<absl::Duration> per_token_target;
  std::optional<double> max_cost;
  std::optional<double> min_quality;
  std::optional<int64_t> level;
  std::optional<int64_t> priority;
};

// Both borrow their target, which must outlive `flags`.
void AddConnectionFlags(Flags* flags, ConnectionFlags* connection);
void AddBudgetFlags(Flags* flags, BudgetFlags* budget);

// Only what a message cannot hold is a UsageError; whether a budget makes sense, the daemon judges.
absl::StatusOr<v1::Budget> BudgetOf(const BudgetFlags& flags);

// A duration as it travels; exact to the nanosecond, cut towards zero below it.
google::protobuf::Duration ToProto(absl::Duration duration);
absl::Duration FromProto(const google::protobuf::Duration& duration);

// One daemon. Connects at the first call. Thread-safe.
class Connection {
 public:
  explicit Connection(const ConnectionFlags& flags);

  v1::Inference::Stub& inference() { return *inference_; }
  const std::shared_ptr<grpc::Channel>& channel() const { return channel_; }
  // A context with the timeout as its deadline.
  std::unique_ptr<grpc::ClientContext> MakeContext() const;
  // The code unchanged; what never came from the daemon (UNAVAILABLE) says where it was sought.
  absl::Status ToStatus(const grpc::Status& status) const;

 private:
  const ConnectionFlags flags_;
  const std::shared_ptr<grpc::Channel> channel_;
  const std::unique_ptr<v1::Inference::Stub> inference_;
};

}  // namespace nestor
