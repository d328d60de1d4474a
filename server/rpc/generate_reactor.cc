#include "server/rpc/generate_reactor.h"

#include <utility>

#include "server/rpc/convert.h"

namespace nestor {

GenerateReactor::GenerateReactor(grpc::CallbackServerContext* context, std::string request_id,
                                 int64_t buffer_tokens, Worker* worker)
    : context_(context),
      request_id_(std::move(request_id)),
      buffer_tokens_(buffer_tokens),
      worker_(worker) {}

void GenerateReactor::Reject(const absl::Status& status) {
  Base::Finish(GrpcStatusOf(status, context_));
}

bool GenerateReactor::Push(GeneratedToken token) {
  Action action;
  bool has_room;
  {
    MutexLock lock(&mutex_);
    next_.mutable_text()->append(token.text);
    next_.add_tokens(token.id);
    has_next_ = true;
    action = NextAction();
    has_room = next_.tokens_size() < buffer_tokens_;
    is_paused_ = !has_room;
  }
  Do(action);
  return has_room;
}

void GenerateReactor::Finish(const absl::Status& status, TaskResult result) {
  Action action;
  {
    MutexLock lock(&mutex_);
    next_.mutable_text()->append(result.text);
    has_next_ = has_next_ || !result.text.empty();
    if (status.ok() || result.finish_reason == FinishReason::kDrain) {
      next_.set_finish_reason(FinishReasonToProto(result.finish_reason));
      UsageToProto(result.usage, next_.mutable_usage());
      has_next_ = true;
    }
    end_ = status;
    action = NextAction();
  }
  // With nothing to do here, a write in flight ends the call, and may have deleted this by now.
  if (action != Action::kNone) Do(action);
}

GenerateReactor::Action GenerateReactor::NextAction() {
  if (is_writing_ || is_finishing_) return Action::kNone;
  if (has_next_ && !is_broken_) {
    next_.set_request_id(request_id_);
    in_flight_ = SerializeMessage(next_);
    next_.Clear();
    has_next_ = false;
    is_writing_ = true;
    return Action::kWrite;
  }
  if (!end_.has_value()) return Action::kNone;
  is_finishing_ = true;
  return Action::kFinish;
}

void GenerateReactor::Do(Action action) {
  switch (action) {
    case Action::kNone:
      return;
    case Action::kWrite:
      StartWrite(&in_flight_);
      return;
    case Action::kFinish: {
      absl::Status end;
      {
        MutexLock lock(&mutex_);
        end = *end_;
      }
      Base::Finish(GrpcStatusOf(end, context_));
      return;
    }
  }
}

void GenerateReactor::OnWriteDone(bool ok) {
  Action action;
  bool resumes = false;
  {
    MutexLock lock(&mutex_);
    is_writing_ = false;
    is_broken_ = is_broken_ || !ok;
    action = NextAction();
    resumes = std::exchange(is_paused_, false) && !end_.has_value();
  }
  if (resumes) worker_->Resume(*task_);
  Do(action);
}

void GenerateReactor::OnCancel() {
  if (task_.has_value()) worker_->Cancel(*task_);
}

}  // namespace nestor
