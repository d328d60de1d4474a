#pragma once

#include <functional>
#include <optional>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "base/mutex.h"
#include "grpcpp/support/byte_buffer.h"
#include "grpcpp/support/server_callback.h"
#include "server/task.h"
#include "server/worker.h"

namespace nestor {

// One Score or Embed call: joins the results of its tasks. The first task that fails cancels the
// others and gives the call its status. Deletes itself when the call is over.
class UnaryReactor : public grpc::ServerUnaryReactor {
 public:
  // Makes the response from the results, in the order of the tasks.
  using MakeResponse = std::function<grpc::ByteBuffer(const std::vector<TaskResult>&)>;

  // `worker` is borrowed; null for a call that is only rejected.
  UnaryReactor(grpc::CallbackServerContext* context, size_t num_tasks, Worker* worker,
               grpc::ByteBuffer* response, MakeResponse make_response);

  // Where the result of task `index` goes.
  TaskOutput* output(size_t index) { return &parts_[index]; }
  // Before the handler returns: the tasks, or why there are none.
  void SetTasks(std::vector<TaskId> ids);
  void Reject(const absl::Status& status);

 private:
  class Part : public TaskOutput {
   public:
    Part(UnaryReactor* reactor, size_t index) : reactor_(reactor), index_(index) {}
    bool Push(GeneratedToken) override { return true; }
    void Finish(const absl::Status& status, TaskResult result) override {
      reactor_->FinishPart(index_, status, std::move(result));
    }

   private:
    UnaryReactor* const reactor_;
    const size_t index_;
  };

  void FinishPart(size_t index, const absl::Status& status, TaskResult result);
  void CancelTasks();
  void OnCancel() override { CancelTasks(); }
  void OnDone() override { delete this; }

  grpc::CallbackServerContext* const context_;
  Worker* const worker_;
  grpc::ByteBuffer* const response_;
  const MakeResponse make_response_;
  std::vector<Part> parts_;

  Mutex mutex_;
  std::vector<TaskId> ids_ ABSL_GUARDED_BY(mutex_);
  std::vector<TaskResult> results_ ABSL_GUARDED_BY(mutex_);
  size_t num_left_ ABSL_GUARDED_BY(mutex_);
  absl::Status first_error_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace nestor
