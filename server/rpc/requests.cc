#include "server/rpc/requests.h"

#include <algorithm>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "server/rpc/convert.h"

namespace nestor {
namespace {

using Tokens = std::vector<int32_t>;

absl::Status MustBeLanguageModel(const ServedModel& model, const char* call) {
  if (!model.is_encoder) return absl::OkStatus();
  return absl::FailedPreconditionError(
      absl::StrCat(model.name, " is an encoder: it serves Embed, not ", call));
}

absl::StatusOr<Sla> SlaFrom(const v1::Budget& proto, const ServedModel& model, CostMeasure measure,
                            int default_priority) {
  NESTOR_ASSIGN_OR_RETURN(const Budget budget, BudgetFromProto(proto));
  return ResolveBudget(budget, LadderOf(model), measure, default_priority);
}

absl::StatusOr<Tokens> CheckIds(const v1::TokenIds& ids, const ServedModel& model) {
  for (int i = 0; i < ids.ids_size(); ++i) {
    if (ids.ids(i) < 0 || ids.ids(i) >= model.vocabulary) {
      return absl::InvalidArgumentError(absl::StrCat("tokens.ids[", i, "]: must be in [0, ",
                                                     model.vocabulary - 1, "]; was ", ids.ids(i)));
    }
  }
  return Tokens(ids.ids().begin(), ids.ids().end());
}

absl::StatusOr<std::string> RenderChat(const v1::Chat& chat, const ServedModel& model) {
  if (model.chat_template == nullptr) {
    return absl::FailedPreconditionError(
        absl::StrCat("chat: ", model.name, " has no chat template; send text"));
  }
  if (chat.messages_size() == 0) {
    return absl::InvalidArgumentError("chat.messages: must not be empty");
  }
  std::vector<ChatTurn> turns;
  for (int i = 0; i < chat.messages_size(); ++i) {
    if (chat.messages(i).role().empty()) {
      return absl::InvalidArgumentError(
          absl::StrCat("chat.messages[", i, "].role: must not be empty"));
    }
    turns.push_back({chat.messages(i).role(), chat.messages(i).content()});
  }
  return model.chat_template->Render(turns, /*adds_generation_prompt=*/true);
}

absl::StatusOr<Tokens> PromptOf(const v1::GenerateRequest& request, const ServedModel& model) {
  Tokens tokens;
  switch (request.prompt_case()) {
    case v1::GenerateRequest::kText: {
      // A tokenizer may add special tokens to nothing; that is still an empty prompt.
      if (request.text().empty()) break;
      NESTOR_ASSIGN_OR_RETURN(tokens, model.tokenizer->Encode(request.text(), true));
      break;
    }
    case v1::GenerateRequest::kChat: {
      NESTOR_ASSIGN_OR_RETURN(const std::string text, RenderChat(request.chat(), model));
      NESTOR_ASSIGN_OR_RETURN(tokens, model.tokenizer->Encode(text, false));
      break;
    }
    case v1::GenerateRequest::kTokens: {
      NESTOR_ASSIGN_OR_RETURN(tokens, CheckIds(request.tokens(), model));
      break;
    }
    case v1::GenerateRequest::PROMPT_NOT_SET:
      break;
  }
  if (tokens.empty()) return absl::InvalidArgumentError("prompt: must not be empty");
  return tokens;
}

absl::StatusOr<SamplingOptions> SamplingFrom(const v1::Sampling& proto) {
  SamplingOptions options;
  if (proto.has_temperature()) options.temperature = proto.temperature();
  if (proto.has_top_k()) options.top_k = proto.top_k();
  if (proto.has_top_p()) options.top_p = proto.top_p();
  if (proto.has_repetition_penalty()) options.repetition_penalty = proto.repetition_penalty();
  if (proto.has_seed()) options.seed = proto.seed();
  NESTOR_RETURN_IF_ERROR(Validate(options));
  return options;
}

// Makes prompt and completion fit the context: the prompt must, the completion gets what is left.
absl::Status FitContext(const v1::GenerateRequest& request, const ServedModel& model,
                        const RequestLimits& limits, Task* task) {
  if (request.has_max_tokens() && request.max_tokens() < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("max_tokens: must be at least 1; was ", request.max_tokens()));
  }
  const int64_t context = model.max_sequence_length;
  task->max_tokens = request.has_max_tokens() ? request.max_tokens() : limits.default_max_tokens;
  const int64_t prompt = static_cast<int64_t>(task->tokens.size());
  if (prompt >= context) {
    if (!request.truncate()) {
      return absl::InvalidArgumentError(
          absl::StrCat("prompt: ", prompt, " tokens do not fit the context of ", context,
                       " with at least one more; shorten it, or set truncate"));
    }
    const int64_t kept = std::max<int64_t>(1, context - std::min(task->max_tokens, context / 2));
    task->tokens.erase(task->tokens.begin(), task->tokens.end() - kept);
  }
  task->max_tokens =
      std::min(task->max_tokens, context - static_cast<int64_t>(task->tokens.size()));
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<Task>> TaskFrom(const v1::GenerateRequest& request,
                                               const ServedModel& model,
                                               const RequestLimits& limits) {
  NESTOR_RETURN_IF_ERROR(MustBeLanguageModel(model, "Generate"));
  auto task = std::make_unique<Task>();
  task->kind = TaskKind::kGenerate;
  NESTOR_ASSIGN_OR_RETURN(task->sampling, SamplingFrom(request.sampling()));
  for (int i = 0; i < request.stop_size(); ++i) {
    if (request.stop(i).empty()) {
      return absl::InvalidArgumentError(absl::StrCat("stop[", i, "]: must not be empty"));
    }
    task->stops.push_back(request.stop(i));
  }
  task->ignores_end_tokens = request.ignore_eos();
  task->may_speculate = request.has_speculate() ? request.speculate() : limits.speculates;
  NESTOR_ASSIGN_OR_RETURN(task->sla, SlaFrom(request.budget(), model, CostMeasure::kRelativeCost,
                                             limits.default_priority));
  NESTOR_ASSIGN_OR_RETURN(task->tokens, PromptOf(request, model));
  NESTOR_RETURN_IF_ERROR(FitContext(request, model, limits, task.get()));
  return task;
}

absl::StatusOr<std::unique_ptr<Task>> TaskFrom(const v1::ScoreRequest& request,
                                               const ServedModel& model,
                                               const RequestLimits& limits) {
  NESTOR_RETURN_IF_ERROR(MustBeLanguageModel(model, "Score"));
  auto task = std::make_unique<Task>();
  task->kind = TaskKind::kScore;
  NESTOR_ASSIGN_OR_RETURN(task->sla, SlaFrom(request.budget(), model, CostMeasure::kRelativeFlops,
                                             limits.default_priority));
  if (request.has_tokens()) {
    NESTOR_ASSIGN_OR_RETURN(task->tokens, CheckIds(request.tokens(), model));
  } else {
    NESTOR_ASSIGN_OR_RETURN(task->tokens, model.tokenizer->Encode(request.text(), true));
  }
  const int64_t count = static_cast<int64_t>(task->tokens.size());
  if (count < 2) {
    return absl::InvalidArgumentError(
        absl::StrCat("input: scoring needs at least 2 tokens; got ", count));
  }
  if (count > model.max_sequence_length) {
    return absl::InvalidArgumentError(absl::StrCat(
        "input: ", count, " tokens do not fit the context of ", model.max_sequence_length));
  }
  return task;
}

absl::StatusOr<std::vector<std::unique_ptr<Task>>> TasksFrom(const v1::EmbedRequest& request,
                                                             const ServedModel& model,
                                                             const RequestLimits& limits) {
  if (!model.is_encoder) {
    return absl::FailedPreconditionError(
        absl::StrCat(model.name, " is a language model: it serves Generate and Score, not Embed"));
  }
  if (request.texts_size() == 0) return absl::InvalidArgumentError("texts: must not be empty");
  if (request.texts_size() > limits.max_texts) {
    return absl::InvalidArgumentError(absl::StrCat("texts: at most ", limits.max_texts,
                                                   " in one call; got ", request.texts_size()));
  }
  NESTOR_ASSIGN_OR_RETURN(
      const Sla sla,
      SlaFrom(request.budget(), model, CostMeasure::kRelativeFlops, limits.default_priority));
  std::vector<std::unique_ptr<Task>> tasks;
  for (int i = 0; i < request.texts_size(); ++i) {
    if (request.texts(i).empty()) {
      return absl::InvalidArgumentError(absl::StrCat("texts[", i, "]: must not be empty"));
    }
    auto task = std::make_unique<Task>();
    task->kind = TaskKind::kEmbed;
    task->sla = sla;
    NESTOR_ASSIGN_OR_RETURN(task->tokens, model.tokenizer->Encode(request.texts(i), true));
    const int64_t count = static_cast<int64_t>(task->tokens.size());
    if (count > model.max_sequence_length && !request.truncate()) {
      return absl::InvalidArgumentError(
          absl::StrCat("texts[", i, "]: ", count, " tokens do not fit the context of ",
                       model.max_sequence_length, "; shorten it, or set truncate"));
    }
    if (count > model.max_sequence_length) {
      // Keep what the tokenizer ends a text with ([SEP]).
      const int32_t last = task->tokens.back();
      task->tokens.resize(model.max_sequence_length);
      task->tokens.back() = last;
    }
    tasks.push_back(std::move(task));
  }
  return tasks;
}

}  // namespace nestor
