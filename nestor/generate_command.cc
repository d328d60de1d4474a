#include <chrono>
#include <cstdio>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_format.h"
#include "base/status_macros.h"
#include "nestor/client.h"
#include "nestor/command.h"
#include "nestor/flags.h"
#include "nestor/text_input.h"
#include "nestor/usage.h"

namespace nestor {
namespace {

constexpr int64_t kMaxClients = 1024;

struct GenerateFlags {
  ConnectionFlags connection;
  BudgetFlags budget;
  std::optional<std::string> prompt_file;
  bool chat = false;
  std::optional<std::string> system;
  std::optional<int64_t> max_tokens;
  std::optional<double> temperature;
  std::optional<int64_t> top_k;
  std::optional<double> top_p;
  std::optional<double> repetition_penalty;
  std::optional<int64_t> seed;
  std::vector<std::string> stop;
  bool ignore_eos = false;
  bool truncate = false;
  std::optional<bool> speculate;
  int64_t clients = 1;
  bool json = false;
};

void Declare(Flags* flags, GenerateFlags* values) {
  flags->Add("prompt-file", &values->prompt_file, "reads the prompt from a file, - for stdin");
  flags->Add("chat", &values->chat, "the prompt is a user's message, set in the chat template");
  flags->Add("system", &values->system, "the system message before it; needs --chat");
  flags->Add("max-tokens", &values->max_tokens, "tokens to generate at most");
  flags->Add("temperature", &values->temperature, "0 is greedy, the default");
  flags->Add("top-k", &values->top_k, "samples from the K likeliest tokens");
  flags->Add("top-p", &values->top_p,
             "samples from the likeliest tokens of this joint probability");
  flags->Add("repetition-penalty", &values->repetition_penalty, "above 1: fewer repetitions");
  flags->Add("seed", &values->seed, "same seed, same level: same text");
  flags->Add("stop", &values->stop,
             "ends at this text, which is left out; may be given several times");
  flags->Add("ignore-eos", &values->ignore_eos, "goes on past the end-of-text token");
  flags->Add("truncate", &values->truncate, "cuts the oldest part of a prompt that is too long");
  flags->Add(
      "speculate", &values->speculate,
      "drafts at a cheaper level, the same text sooner; =false: never (default: the daemon's)");
  flags->Add("clients", &values->clients,
             "sends the request this many times at once; above 1 prints no text but their joint "
             "speed while all of them run");
  AddBudgetFlags(flags, &values->budget);
  AddConnectionFlags(flags, &values->connection);
  flags->Add("json", &values->json, "one object on stdout, once the text is complete");
}

void SetPrompt(const GenerateFlags& flags, const std::string& text, v1::GenerateRequest* request) {
  if (!flags.chat) {
    request->set_text(text);
    return;
  }
  const auto add_message = [&](const std::string& role, const std::string& content) {
    v1::ChatMessage* message = request->mutable_chat()->add_messages();
    message->set_role(role);
    message->set_content(content);
  };
  if (flags.system) add_message("system", *flags.system);
  add_message("user", text);
}

absl::Status SetSampling(const GenerateFlags& flags, v1::Sampling* sampling) {
  if (flags.temperature) sampling->set_temperature(*flags.temperature);
  if (flags.top_k) {
    NESTOR_ASSIGN_OR_RETURN(const int32_t top_k, ToInt32("top-k", *flags.top_k));
    sampling->set_top_k(top_k);
  }
  if (flags.top_p) sampling->set_top_p(*flags.top_p);
  if (flags.repetition_penalty) sampling->set_repetition_penalty(*flags.repetition_penalty);
  if (flags.seed) {
    if (*flags.seed < 0) {
      return UsageError(absl::StrFormat("--seed: expected 0 or more; was %d", *flags.seed));
    }
    sampling->set_seed(static_cast<uint64_t>(*flags.seed));
  }
  return absl::OkStatus();
}

absl::StatusOr<v1::GenerateRequest> MakeRequest(const GenerateFlags& flags,
                                                const std::vector<std::string>& positional) {
  if (flags.system && !flags.chat) return UsageError("--system needs --chat");
  NESTOR_ASSIGN_OR_RETURN(const std::string text,
                          ReadText(positional, flags.prompt_file, "prompt-file"));
  if (flags.system) NESTOR_RETURN_IF_ERROR(CheckUtf8("--system", *flags.system));
  v1::GenerateRequest request;
  SetPrompt(flags, text, &request);
  NESTOR_RETURN_IF_ERROR(SetSampling(flags, request.mutable_sampling()));
  if (flags.max_tokens) {
    NESTOR_ASSIGN_OR_RETURN(const int32_t max_tokens, ToInt32("max-tokens", *flags.max_tokens));
    request.set_max_tokens(max_tokens);
  }
  request.set_ignore_eos(flags.ignore_eos);
  request.set_truncate(flags.truncate);
  if (flags.speculate) request.set_speculate(*flags.speculate);
  for (const std::string& stop : flags.stop) {
    NESTOR_RETURN_IF_ERROR(CheckUtf8("--stop", stop));
    request.add_stop(stop);
  }
  NESTOR_ASSIGN_OR_RETURN(*request.mutable_budget(), BudgetOf(flags.budget));
  return request;
}

// A whole stream, put together.
struct Generation {
  std::string request_id;
  std::string text;
  std::vector<int32_t> tokens;
  v1::FinishReason finish_reason = v1::FINISH_REASON_UNSPECIFIED;
  v1::Usage usage;
  StreamTiming timing;
  std::vector<TokenArrival> arrivals;
};

void Append(const v1::GenerateResponse& message, absl::Duration elapsed, Generation* generation) {
  if (!message.request_id().empty()) generation->request_id = message.request_id();
  generation->text += message.text();
  generation->tokens.insert(generation->tokens.end(), message.tokens().begin(),
                            message.tokens().end());
  generation->timing.Record(elapsed, message.tokens_size());
  if (message.tokens_size() > 0) {
    generation->arrivals.push_back({.elapsed = elapsed, .tokens = message.tokens_size()});
  }
  if (message.finish_reason() != v1::FINISH_REASON_UNSPECIFIED) {
    generation->finish_reason = message.finish_reason();
  }
  if (message.has_usage()) generation->usage = message.usage();
}

// Text that has arrived is printed even where the stream ends in an error. Times are since `start`.
absl::StatusOr<Generation> Stream(Connection* connection, const v1::GenerateRequest& request,
                                  bool prints_text, std::chrono::steady_clock::time_point start) {
  const std::unique_ptr<grpc::ClientContext> context = connection->MakeContext();
  const auto reader = connection->inference().Generate(context.get(), request);
  Generation generation;
  v1::GenerateResponse message;
  while (reader->Read(&message)) {
    Append(message, absl::FromChrono(std::chrono::steady_clock::now() - start), &generation);
    if (prints_text && !message.text().empty()) {
      std::fwrite(message.text().data(), 1, message.text().size(), stdout);
      std::fflush(stdout);
    }
  }
  if (prints_text && !generation.text.empty()) std::fputc('\n', stdout);
  NESTOR_RETURN_IF_ERROR(connection->ToStatus(reader->Finish()));
  return generation;
}

void PrintJson(const Generation& generation) {
  const nlohmann::json json = {{"text", generation.text},
                               {"tokens", generation.tokens},
                               {"finish_reason", NameOf(generation.finish_reason)},
                               {"request_id", generation.request_id},
                               {"usage", ToJson(generation.usage, generation.timing)}};
  absl::PrintF("%s\n", json.dump(2));
}

// The request `count` times at once, each on a thread of its own.
absl::StatusOr<std::vector<Generation>> StreamAll(Connection* connection,
                                                  const v1::GenerateRequest& request,
                                                  int64_t count) {
  const auto start = std::chrono::steady_clock::now();
  std::vector<absl::StatusOr<Generation>> streams(count);
  {
    std::vector<std::jthread> threads;
    for (absl::StatusOr<Generation>& stream : streams) {
      threads.emplace_back([&stream, connection, &request, start] {
        stream = Stream(connection, request, /*prints_text=*/false, start);
      });
    }
  }
  std::vector<Generation> generations;
  for (absl::StatusOr<Generation>& stream : streams) {
    NESTOR_ASSIGN_OR_RETURN(Generation generation, std::move(stream));
    generations.push_back(std::move(generation));
  }
  return generations;
}

void PrintJointSpeed(const std::vector<Generation>& generations, bool prints_json) {
  std::vector<std::vector<TokenArrival>> arrivals;
  std::vector<v1::Usage> usages;
  for (const Generation& generation : generations) {
    arrivals.push_back(generation.arrivals);
    usages.push_back(generation.usage);
  }
  const v1::Usage usage = Merge(usages);
  const std::optional<double> speed = JointTokensPerSecond(arrivals);
  if (prints_json) {
    nlohmann::json json = {
        {"clients", generations.size()}, {"tokens_per_second", nullptr}, {"usage", ToJson(usage)}};
    if (speed) json["tokens_per_second"] = *speed;
    absl::PrintF("%s\n", json.dump(2));
    return;
  }
  absl::PrintF("%d clients, %d tokens", generations.size(), usage.completion_tokens());
  if (speed) absl::PrintF(", %.1f tokens/s while all of them ran", *speed);
  absl::PrintF("\n[%s]\n", UsageLine(usage, /*shows_flops=*/false));
}

}  // namespace

absl::Status RunGenerate(const std::vector<std::string>& arguments) {
  GenerateFlags values;
  Flags flags(
      "nestor generate PROMPT | --prompt-file FILE [flags]\n\n"
      "Prints the text to stdout as it arrives, then a usage line to stderr: the levels that ran,\n"
      "relative cost, expected quality, tokens per second, time to first token.",
      "nestor generate --chat --max-cost 0.6 --max-tokens 64 \"What is a low-rank matrix?\"");
  Declare(&flags, &values);
  NESTOR_ASSIGN_OR_RETURN(const std::vector<std::string> positional, flags.Parse(arguments));
  NESTOR_ASSIGN_OR_RETURN(const v1::GenerateRequest request, MakeRequest(values, positional));
  if (values.clients < 1 || values.clients > kMaxClients) {
    return UsageError(
        absl::StrFormat("--clients: expected 1 to %d; was %d", kMaxClients, values.clients));
  }
  Connection connection(values.connection);
  if (values.clients > 1) {
    NESTOR_ASSIGN_OR_RETURN(const std::vector<Generation> generations,
                            StreamAll(&connection, request, values.clients));
    PrintJointSpeed(generations, values.json);
    return absl::OkStatus();
  }
  NESTOR_ASSIGN_OR_RETURN(const Generation generation, Stream(&connection, request, !values.json,
                                                              std::chrono::steady_clock::now()));
  if (values.json) {
    PrintJson(generation);
  } else {
    std::fflush(stdout);
    absl::FPrintF(stderr, "[%s]\n", UsageLine(generation.usage, generation.timing));
  }
  return absl::OkStatus();
}

}  // namespace nestor
