#pragma once

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "grpcpp/server_context.h"
#include "grpcpp/support/byte_buffer.h"
#include "grpcpp/support/status.h"
#include "nestor/v1/inference.pb.h"
#include "server/scheduler/budget.h"
#include "server/served_model.h"
#include "server/task.h"
#include "server/usage.h"

namespace nestor {

// INVALID_ARGUMENT where a duration cannot be represented; whether values make sense is
// ResolveBudget's to say.
absl::StatusOr<Budget> BudgetFromProto(const v1::Budget& budget);

void UsageToProto(const Usage& usage, v1::Usage* proto);
void ModelToProto(const ServedModel& model, v1::GetModelResponse* proto);
v1::FinishReason FinishReasonToProto(FinishReason reason);

// The same code and message; the retry hint becomes trailing metadata, `retry-after-ms`.
grpc::Status GrpcStatusOf(const absl::Status& status, grpc::CallbackServerContext* context);

// The call's deadline on our clock; TimePoint::max() where it has none.
TimePoint DeadlineOf(const grpc::CallbackServerContext& context);

// INVALID_ARGUMENT where the bytes are no such message (text that is not UTF-8 included, which
// gRPC itself would answer with UNIMPLEMENTED).
absl::Status ParseMessage(const grpc::ByteBuffer& bytes, google::protobuf::Message* message);
grpc::ByteBuffer SerializeMessage(const google::protobuf::Message& message);

}  // namespace nestor
