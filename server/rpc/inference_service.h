#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "nestor/v1/inference.grpc.pb.h"
#include "server/events.h"
#include "server/rpc/requests.h"
#include "server/served_model.h"
#include "server/worker.h"

namespace nestor {

// nestor.v1.Inference: proto to tasks and back. No handler blocks; a call is answered by its
// reactor when the worker has ended its tasks. Calls before SetWorker are UNAVAILABLE.
//
// Requests come as bytes, so that a malformed one gets a status of ours.
class InferenceService
    : public v1::Inference::WithRawCallbackMethod_Generate<
          v1::Inference::WithRawCallbackMethod_Score<v1::Inference::WithRawCallbackMethod_Embed<
              v1::Inference::WithCallbackMethod_GetModel<v1::Inference::Service>>>> {
 public:
  struct Options {
    RequestLimits limits;
    int64_t stream_buffer_tokens = 0;
  };

  // `model` and `events` are borrowed and must outlive the service. `model` must not change any
  // more once SetWorker has been called.
  InferenceService(const ServedModel* model, Options options, Events* events);

  // From now on requests are served. `worker` is borrowed and must outlive every call.
  void SetWorker(Worker* worker) { worker_.store(worker); }

  grpc::ServerWriteReactor<grpc::ByteBuffer>* Generate(grpc::CallbackServerContext* context,
                                                       const grpc::ByteBuffer* request) override;
  grpc::ServerUnaryReactor* Score(grpc::CallbackServerContext* context,
                                  const grpc::ByteBuffer* request,
                                  grpc::ByteBuffer* response) override;
  grpc::ServerUnaryReactor* Embed(grpc::CallbackServerContext* context,
                                  const grpc::ByteBuffer* request,
                                  grpc::ByteBuffer* response) override;
  grpc::ServerUnaryReactor* GetModel(grpc::CallbackServerContext* context,
                                     const v1::GetModelRequest* request,
                                     v1::GetModelResponse* response) override;

 private:
  using Tasks = std::vector<std::unique_ptr<Task>>;
  absl::Status CheckReady() const;
  absl::StatusOr<std::unique_ptr<Task>> ParseGenerate(const grpc::ByteBuffer& bytes);
  absl::StatusOr<Tasks> ParseScore(const grpc::ByteBuffer& bytes) const;
  absl::StatusOr<Tasks> ParseEmbed(const grpc::ByteBuffer& bytes) const;
  // Submits the tasks of a unary call to `reactor`; null `worker` or an error rejects it.
  grpc::ServerUnaryReactor* StartUnary(
      grpc::CallbackServerContext* context, absl::StatusOr<Tasks> tasks, TimePoint arrival,
      grpc::ByteBuffer* response,
      std::function<grpc::ByteBuffer(const std::vector<TaskResult>&)> make_response);
  std::string NextRequestId();

  const ServedModel* const model_;
  const Options options_;
  Events* const events_;
  const std::string process_id_;  // tells requests of restarted servers apart
  std::atomic<Worker*> worker_ = nullptr;
  std::atomic<uint64_t> num_requests_ = 0;
  std::atomic<uint64_t> next_seed_;
};

}  // namespace nestor
