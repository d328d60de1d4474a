#include "server/rpc/unary_reactor.h"

#include <utility>

#include "server/rpc/convert.h"

namespace nestor {

UnaryReactor::UnaryReactor(grpc::CallbackServerContext* context, size_t num_tasks, Worker* worker,
                           grpc::ByteBuffer* response, MakeResponse make_response)
    : context_(context),
      worker_(worker),
      response_(response),
      make_response_(std::move(make_response)),
      results_(num_tasks),
      num_left_(num_tasks) {
  for (size_t i = 0; i < num_tasks; ++i) parts_.emplace_back(this, i);
}

void UnaryReactor::SetTasks(std::vector<TaskId> ids) {
  bool has_failed;
  {
    MutexLock lock(&mutex_);
    ids_ = std::move(ids);
    has_failed = !first_error_.ok();
  }
  // A task may have failed before its siblings were known here.
  if (has_failed) CancelTasks();
}

void UnaryReactor::Reject(const absl::Status& status) { Finish(GrpcStatusOf(status, context_)); }

void UnaryReactor::CancelTasks() {
  std::vector<TaskId> ids;
  {
    MutexLock lock(&mutex_);
    ids = ids_;
  }
  for (const TaskId id : ids) worker_->Cancel(id);
}

void UnaryReactor::FinishPart(size_t index, const absl::Status& status, TaskResult result) {
  bool is_first_error = false;
  {
    MutexLock lock(&mutex_);
    is_first_error = !status.ok() && first_error_.ok();
    if (is_first_error) first_error_ = status;
    results_[index] = std::move(result);
  }
  // Ends waiting siblings at once, inside this call; this part is still counted meanwhile.
  if (is_first_error) CancelTasks();
  absl::Status error;
  std::vector<TaskResult> results;
  {
    MutexLock lock(&mutex_);
    if (--num_left_ > 0) return;
    error = first_error_;
    results = std::move(results_);
  }
  if (error.ok()) *response_ = make_response_(results);
  Finish(GrpcStatusOf(error, context_));
}

}  // namespace nestor
