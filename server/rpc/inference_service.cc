#include "server/rpc/inference_service.h"

#include <random>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/status_macros.h"
#include "server/rpc/convert.h"
#include "server/rpc/generate_reactor.h"
#include "server/rpc/unary_reactor.h"

namespace nestor {
namespace {

// Spreads consecutive seeds (the increment of SplitMix64).
constexpr uint64_t kSeedStep = 0x9e3779b97f4a7c15;

grpc::ByteBuffer ScoreResponseFrom(const std::string& request_id,
                                   const std::vector<int32_t>& tokens, const TaskResult& result) {
  v1::ScoreResponse response;
  response.set_request_id(request_id);
  response.mutable_tokens()->Add(tokens.begin(), tokens.end());
  response.mutable_log_probabilities()->Add(result.log_probabilities.begin(),
                                            result.log_probabilities.end());
  UsageToProto(result.usage, response.mutable_usage());
  return SerializeMessage(response);
}

grpc::ByteBuffer EmbedResponseFrom(const std::string& request_id,
                                   const std::vector<TaskResult>& results) {
  v1::EmbedResponse response;
  response.set_request_id(request_id);
  Usage usage;
  for (const TaskResult& result : results) {
    response.add_embeddings()->mutable_values()->Add(result.embedding.begin(),
                                                     result.embedding.end());
    usage.Merge(result.usage);
  }
  UsageToProto(usage, response.mutable_usage());
  return SerializeMessage(response);
}

}  // namespace

InferenceService::InferenceService(const ServedModel* model, Options options, Events* events)
    : model_(model),
      options_(std::move(options)),
      events_(events),
      process_id_(absl::StrFormat("%08x", std::random_device()())),
      next_seed_(std::random_device()()) {}

absl::Status InferenceService::CheckReady() const {
  if (worker_.load() != nullptr) return absl::OkStatus();
  return absl::UnavailableError("the model is warming up");
}

std::string InferenceService::NextRequestId() {
  return absl::StrCat(process_id_, "-", num_requests_.fetch_add(1) + 1);
}

absl::StatusOr<std::unique_ptr<Task>> InferenceService::ParseGenerate(
    const grpc::ByteBuffer& bytes) {
  NESTOR_RETURN_IF_ERROR(CheckReady());
  v1::GenerateRequest request;
  NESTOR_RETURN_IF_ERROR(ParseMessage(bytes, &request));
  NESTOR_ASSIGN_OR_RETURN(std::unique_ptr<Task> task, TaskFrom(request, *model_, options_.limits));
  if (!request.sampling().has_seed()) task->sampling.seed = next_seed_.fetch_add(kSeedStep);
  return task;
}

absl::StatusOr<InferenceService::Tasks> InferenceService::ParseScore(
    const grpc::ByteBuffer& bytes) const {
  NESTOR_RETURN_IF_ERROR(CheckReady());
  v1::ScoreRequest request;
  NESTOR_RETURN_IF_ERROR(ParseMessage(bytes, &request));
  Tasks tasks(1);
  NESTOR_ASSIGN_OR_RETURN(tasks.front(), TaskFrom(request, *model_, options_.limits));
  return tasks;
}

absl::StatusOr<InferenceService::Tasks> InferenceService::ParseEmbed(
    const grpc::ByteBuffer& bytes) const {
  NESTOR_RETURN_IF_ERROR(CheckReady());
  v1::EmbedRequest request;
  NESTOR_RETURN_IF_ERROR(ParseMessage(bytes, &request));
  return TasksFrom(request, *model_, options_.limits);
}

grpc::ServerWriteReactor<grpc::ByteBuffer>* InferenceService::Generate(
    grpc::CallbackServerContext* context, const grpc::ByteBuffer* request) {
  const TimePoint arrival = Clock::now();
  Worker* const worker = worker_.load();
  auto* reactor =
      new GenerateReactor(context, NextRequestId(), options_.stream_buffer_tokens, worker);
  absl::StatusOr<std::unique_ptr<Task>> task = ParseGenerate(*request);
  absl::Status status = task.status();
  if (status.ok()) {
    (*task)->arrival = arrival;
    (*task)->deadline = DeadlineOf(*context);
    (*task)->output = reactor;
    Tasks tasks;
    tasks.push_back(*std::move(task));
    const absl::StatusOr<std::vector<TaskId>> ids = worker->Submit(std::move(tasks));
    if (ids.ok()) reactor->SetTask(ids->front());
    status = ids.status();
  }
  if (!status.ok()) {
    events_->OnRejected(status.code());
    reactor->Reject(status);
  }
  return reactor;
}

grpc::ServerUnaryReactor* InferenceService::StartUnary(
    grpc::CallbackServerContext* context, absl::StatusOr<Tasks> tasks, TimePoint arrival,
    grpc::ByteBuffer* response,
    std::function<grpc::ByteBuffer(const std::vector<TaskResult>&)> make_response) {
  Worker* const worker = worker_.load();
  auto* reactor = new UnaryReactor(context, tasks.ok() ? tasks->size() : 0, worker, response,
                                   std::move(make_response));
  absl::Status status = tasks.status();
  if (status.ok()) {
    const TimePoint deadline = DeadlineOf(*context);
    for (size_t i = 0; i < tasks->size(); ++i) {
      Task& task = *(*tasks)[i];
      task.arrival = arrival;
      task.deadline = deadline;
      task.output = reactor->output(i);
    }
    absl::StatusOr<std::vector<TaskId>> ids = worker->Submit(*std::move(tasks));
    if (ids.ok()) reactor->SetTasks(*std::move(ids));
    status = ids.status();
  }
  if (!status.ok()) {
    events_->OnRejected(status.code());
    reactor->Reject(status);
  }
  return reactor;
}

grpc::ServerUnaryReactor* InferenceService::Score(grpc::CallbackServerContext* context,
                                                  const grpc::ByteBuffer* request,
                                                  grpc::ByteBuffer* response) {
  const TimePoint arrival = Clock::now();
  absl::StatusOr<Tasks> tasks = ParseScore(*request);
  std::vector<int32_t> tokens;
  if (tasks.ok()) tokens = tasks->front()->tokens;
  return StartUnary(
      context, std::move(tasks), arrival, response,
      [id = NextRequestId(), tokens = std::move(tokens)](const std::vector<TaskResult>& results) {
        return ScoreResponseFrom(id, tokens, results.front());
      });
}

grpc::ServerUnaryReactor* InferenceService::Embed(grpc::CallbackServerContext* context,
                                                  const grpc::ByteBuffer* request,
                                                  grpc::ByteBuffer* response) {
  const TimePoint arrival = Clock::now();
  return StartUnary(context, ParseEmbed(*request), arrival, response,
                    [id = NextRequestId()](const std::vector<TaskResult>& results) {
                      return EmbedResponseFrom(id, results);
                    });
}

grpc::ServerUnaryReactor* InferenceService::GetModel(grpc::CallbackServerContext* context,
                                                     const v1::GetModelRequest* /*request*/,
                                                     v1::GetModelResponse* response) {
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  const absl::Status ready = CheckReady();
  if (ready.ok()) ModelToProto(*model_, response);
  reactor->Finish(GrpcStatusOf(ready, context));
  return reactor;
}

}  // namespace nestor
