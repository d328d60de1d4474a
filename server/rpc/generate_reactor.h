#pragma once

#include <optional>
#include <string>

#include "absl/base/thread_annotations.h"
#include "base/mutex.h"
#include "grpcpp/support/byte_buffer.h"
#include "grpcpp/support/server_callback.h"
#include "nestor/v1/inference.pb.h"
#include "server/task.h"
#include "server/worker.h"

namespace nestor {

// One Generate call: takes tokens from the worker's thread and writes them to the stream, one
// message in flight. Tokens that come meanwhile gather in the next message; at `buffer_tokens` the
// sequence pauses, and resumes when the message goes out. Deletes itself when the call is over.
class GenerateReactor : public grpc::ServerWriteReactor<grpc::ByteBuffer>, public TaskOutput {
 public:
  // `worker` is borrowed; null for a call that is only rejected.
  GenerateReactor(grpc::CallbackServerContext* context, std::string request_id,
                  int64_t buffer_tokens, Worker* worker);

  // Before the handler returns: the task that feeds this stream, or why there is none.
  void SetTask(TaskId id) { task_ = id; }
  void Reject(const absl::Status& status);

  bool Push(GeneratedToken token) override;
  void Finish(const absl::Status& status, TaskResult result) override;

 private:
  using Base = grpc::ServerWriteReactor<grpc::ByteBuffer>;
  void OnWriteDone(bool ok) override;
  void OnCancel() override;
  void OnDone() override { delete this; }

  // What to do once the lock is released; gRPC may run callbacks inside the calls.
  enum class Action : uint8_t { kNone, kWrite, kFinish };
  Action NextAction() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Do(Action action);

  grpc::CallbackServerContext* const context_;
  const std::string request_id_;
  const int64_t buffer_tokens_;
  Worker* const worker_;
  std::optional<TaskId> task_;

  Mutex mutex_;
  v1::GenerateResponse next_ ABSL_GUARDED_BY(mutex_);
  bool has_next_ ABSL_GUARDED_BY(mutex_) = false;
  bool is_writing_ ABSL_GUARDED_BY(mutex_) = false;
  bool is_paused_ ABSL_GUARDED_BY(mutex_) = false;
  bool is_broken_ ABSL_GUARDED_BY(mutex_) = false;  // a write failed: nothing more can be sent
  bool is_finishing_ ABSL_GUARDED_BY(mutex_) = false;
  std::optional<absl::Status> end_ ABSL_GUARDED_BY(mutex_);
  grpc::ByteBuffer in_flight_;  // belongs to gRPC while is_writing_
};

}  // namespace nestor
