#include "server/rpc/convert.h"

#include <algorithm>
#include <memory>
#include <utility>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "google/protobuf/io/coded_stream.h"
#include "grpcpp/impl/codegen/proto_buffer_reader.h"
#include "grpcpp/support/slice.h"
#include "server/scheduler/admission.h"

namespace nestor {
namespace {

// About 30 years: far beyond any use, and far within 64-bit nanoseconds.
constexpr int64_t kMaxSeconds = 1'000'000'000;

absl::StatusOr<Duration> DurationFromProto(const google::protobuf::Duration& proto,
                                           const char* field) {
  if (proto.seconds() < -kMaxSeconds || proto.seconds() > kMaxSeconds ||
      proto.nanos() <= -1'000'000'000 || proto.nanos() >= 1'000'000'000) {
    return absl::InvalidArgumentError(absl::StrCat("budget.", field, ": out of range; was ",
                                                   proto.seconds(), " s and ", proto.nanos(),
                                                   " ns"));
  }
  return std::chrono::seconds(proto.seconds()) + std::chrono::nanoseconds(proto.nanos());
}

void DurationToProto(Duration duration, google::protobuf::Duration* proto) {
  const int64_t nanoseconds = std::chrono::nanoseconds(duration).count();
  proto->set_seconds(nanoseconds / 1'000'000'000);
  proto->set_nanos(static_cast<int32_t>(nanoseconds % 1'000'000'000));
}

void LevelRunToProto(const LevelRun& run, v1::LevelRun* proto) {
  proto->set_level(run.level);
  proto->set_tokens(static_cast<int32_t>(run.tokens));
}

}  // namespace

absl::StatusOr<Budget> BudgetFromProto(const v1::Budget& proto) {
  Budget budget;
  if (proto.has_latency_target()) {
    NESTOR_ASSIGN_OR_RETURN(budget.latency_target,
                            DurationFromProto(proto.latency_target(), "latency_target"));
  }
  if (proto.has_first_token_target()) {
    NESTOR_ASSIGN_OR_RETURN(budget.first_token_target,
                            DurationFromProto(proto.first_token_target(), "first_token_target"));
  }
  if (proto.has_per_token_target()) {
    NESTOR_ASSIGN_OR_RETURN(budget.per_token_target,
                            DurationFromProto(proto.per_token_target(), "per_token_target"));
  }
  if (proto.has_max_cost()) budget.max_cost = proto.max_cost();
  if (proto.has_min_quality()) budget.min_quality = proto.min_quality();
  if (proto.has_level()) budget.level = proto.level();
  if (proto.has_priority()) budget.priority = proto.priority();
  return budget;
}

void UsageToProto(const Usage& usage, v1::Usage* proto) {
  for (const LevelRun& run : usage.prompt_levels) LevelRunToProto(run, proto->add_prompt_levels());
  for (const LevelRun& run : usage.completion_levels) {
    LevelRunToProto(run, proto->add_completion_levels());
  }
  const double rows = static_cast<double>(std::max<int64_t>(1, usage.rows));
  proto->set_mean_relative_cost(usage.relative_cost / rows);
  proto->set_mean_relative_flops(usage.relative_flops / rows);
  proto->set_expected_quality(usage.quality /
                              static_cast<double>(std::max<int64_t>(1, usage.kept_rows)));
  proto->set_flops(usage.flops);
  DurationToProto(usage.queue_time, proto->mutable_queue_time());
  DurationToProto(usage.prefill_time, proto->mutable_prefill_time());
  DurationToProto(usage.decode_time, proto->mutable_decode_time());
  proto->set_degraded(usage.degradation != Degradation::kNone);
  proto->set_degraded_reason(NameOf(usage.degradation));
  if (usage.has_target) proto->set_target_met(usage.target_met);
  proto->set_prompt_tokens(static_cast<int32_t>(usage.prompt_tokens));
  proto->set_completion_tokens(static_cast<int32_t>(usage.completion_tokens));
  proto->set_drafted_tokens(static_cast<int32_t>(usage.drafted_tokens));
  proto->set_accepted_tokens(static_cast<int32_t>(usage.accepted_tokens));
}

void ModelToProto(const ServedModel& model, v1::GetModelResponse* proto) {
  proto->set_name(model.name);
  proto->set_architecture(model.architecture);
  proto->set_is_encoder(model.is_encoder);
  proto->set_context_length(static_cast<int32_t>(model.max_sequence_length));
  proto->set_vocabulary_size(static_cast<int32_t>(model.vocabulary));
  proto->set_device(model.device);
  proto->set_dtype(model.dtype);
  proto->set_embedding_size(static_cast<int32_t>(model.hidden));
  for (size_t i = 0; i < model.levels.size(); ++i) {
    const ServedLevel& level = model.levels[i];
    v1::Level* out = proto->add_levels();
    out->set_level(static_cast<int32_t>(i));
    out->set_form(level.form);
    out->set_relative_cost(level.relative_cost);
    out->set_relative_flops(level.relative_flops);
    out->set_quality(level.quality);
    out->set_interpolated(level.is_interpolated);
    out->set_perplexity(level.perplexity);
    out->set_spearman(level.spearman);
    out->set_tokens_per_second(level.tokens_per_second);
    out->set_weight_bytes(level.weight_bytes);
    out->set_flops_per_token(level.flops_per_token);
  }
}

v1::FinishReason FinishReasonToProto(FinishReason reason) {
  switch (reason) {
    case FinishReason::kStop:
      return v1::FINISH_REASON_STOP;
    case FinishReason::kLength:
      return v1::FINISH_REASON_LENGTH;
    case FinishReason::kDrain:
      return v1::FINISH_REASON_DRAIN;
    case FinishReason::kComplete:
      return v1::FINISH_REASON_UNSPECIFIED;
  }
  return v1::FINISH_REASON_UNSPECIFIED;
}

grpc::Status GrpcStatusOf(const absl::Status& status, grpc::CallbackServerContext* context) {
  if (status.ok()) return grpc::Status::OK;
  if (const auto retry_after = status.GetPayload(kRetryAfterPayload)) {
    context->AddTrailingMetadata("retry-after-ms", std::string(*retry_after));
  }
  // Both enumerations number the codes as gRPC's protocol does.
  return grpc::Status(static_cast<grpc::StatusCode>(status.raw_code()),
                      std::string(status.message()));
}

TimePoint DeadlineOf(const grpc::CallbackServerContext& context) {
  const std::chrono::system_clock::time_point deadline = context.deadline();
  const auto left = deadline - std::chrono::system_clock::now();
  // gRPC's "none" is the end of its own time.
  if (left > std::chrono::seconds(kMaxSeconds)) return TimePoint::max();
  return Clock::now() + left;
}

absl::Status ParseMessage(const grpc::ByteBuffer& bytes, google::protobuf::Message* message) {
  grpc::ByteBuffer copy = bytes;  // of a reference; the reader consumes it
  grpc::ProtoBufferReader reader(&copy);
  if (reader.status().ok() && message->ParseFromZeroCopyStream(&reader)) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("the request is not a valid ",
                                                 message->GetTypeName(),
                                                 ": malformed, or text in it is not UTF-8"));
}

grpc::ByteBuffer SerializeMessage(const google::protobuf::Message& message) {
  grpc::Slice slice(message.ByteSizeLong());
  message.SerializeWithCachedSizesToArray(const_cast<uint8_t*>(slice.begin()));
  return grpc::ByteBuffer(&slice, 1);
}

}  // namespace nestor
