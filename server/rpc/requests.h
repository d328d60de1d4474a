#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "nestor/v1/inference.pb.h"
#include "server/served_model.h"
#include "server/task.h"

namespace nestor {

struct RequestLimits {
  int64_t default_max_tokens = 0;
  int64_t max_texts = 0;
  int default_priority = 1;
  bool speculates = false;  // where a request does not say
};

// Turn a request into tasks: tokenise, check every field, resolve the budget. What is left for the
// caller: arrival, deadline, output, and a seed where the request has none.
//
// INVALID_ARGUMENT names the field and the value. FAILED_PRECONDITION: the served model cannot
// (Generate and Score on an encoder, Embed on a language model, a chat without a template), or no
// level meets the budget.

absl::StatusOr<std::unique_ptr<Task>> TaskFrom(const v1::GenerateRequest& request,
                                               const ServedModel& model,
                                               const RequestLimits& limits);
absl::StatusOr<std::unique_ptr<Task>> TaskFrom(const v1::ScoreRequest& request,
                                               const ServedModel& model,
                                               const RequestLimits& limits);
// One task for each text.
absl::StatusOr<std::vector<std::unique_ptr<Task>>> TasksFrom(const v1::EmbedRequest& request,
                                                             const ServedModel& model,
                                                             const RequestLimits& limits);

}  // namespace nestor
