#include <cmath>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/str_format.h"
#include "base/status_macros.h"
#include "nestor/client.h"
#include "nestor/command.h"
#include "nestor/flags.h"
#include "nestor/statistics.h"
#include "nestor/text_input.h"
#include "nestor/usage.h"

namespace nestor {
namespace {

// Null where the text has one token, and so none that follows another.
nlohmann::json PerplexityOf(const v1::ScoreResponse& response) {
  if (response.log_probabilities().empty()) return nullptr;
  return Perplexity({response.log_probabilities().data(),
                     static_cast<size_t>(response.log_probabilities_size())});
}

void PrintJson(const v1::ScoreResponse& response) {
  const nlohmann::json json = {
      {"tokens", std::vector<int32_t>(response.tokens().begin(), response.tokens().end())},
      {"log_probabilities", std::vector<double>(response.log_probabilities().begin(),
                                                response.log_probabilities().end())},
      {"perplexity", PerplexityOf(response)},
      {"request_id", response.request_id()},
      {"usage", ToJson(response.usage())}};
  absl::PrintF("%s\n", json.dump(2));
}

void PrintTable(const v1::ScoreResponse& response) {
  absl::PrintF("%8s  %s\n", "token", "log-probability");
  for (int i = 0; i < response.tokens_size(); ++i) {
    if (i == 0) {
      absl::PrintF("%8d  -\n", response.tokens(i));
    } else {
      absl::PrintF("%8d  %.4f\n", response.tokens(i), response.log_probabilities(i - 1));
    }
  }
  const nlohmann::json perplexity = PerplexityOf(response);
  if (perplexity.is_number()) absl::PrintF("perplexity %.4f\n", perplexity.get<double>());
}

}  // namespace

absl::Status RunScore(const std::vector<std::string>& arguments) {
  ConnectionFlags connection_flags;
  BudgetFlags budget;
  std::optional<std::string> file;
  bool json = false;
  Flags flags(
      "nestor score TEXT | --file FILE [flags]\n\n"
      "Prints the natural log-probability of every token given those before it, and the text's\n"
      "perplexity. --max-cost bounds relative FLOPs here, since a text is scored in one pass.",
      "nestor score --level 0 \"The capital of France is Paris.\"");
  flags.Add("file", &file, "reads the text from a file, - for stdin");
  AddBudgetFlags(&flags, &budget);
  AddConnectionFlags(&flags, &connection_flags);
  flags.Add("json", &json, "one object on stdout");
  NESTOR_ASSIGN_OR_RETURN(const std::vector<std::string> positional, flags.Parse(arguments));

  v1::ScoreRequest request;
  NESTOR_ASSIGN_OR_RETURN(*request.mutable_text(), ReadText(positional, file, "file"));
  NESTOR_ASSIGN_OR_RETURN(*request.mutable_budget(), BudgetOf(budget));
  Connection connection(connection_flags);
  const std::unique_ptr<grpc::ClientContext> context = connection.MakeContext();
  v1::ScoreResponse response;
  NESTOR_RETURN_IF_ERROR(
      connection.ToStatus(connection.inference().Score(context.get(), request, &response)));
  if (response.log_probabilities_size() != std::max(0, response.tokens_size() - 1)) {
    return absl::InternalError(absl::StrFormat("the daemon sent %d tokens and %d log-probabilities",
                                               response.tokens_size(),
                                               response.log_probabilities_size()));
  }
  if (json) {
    PrintJson(response);
  } else {
    PrintTable(response);
    std::fflush(stdout);
    absl::FPrintF(stderr, "[%s]\n", UsageLine(response.usage(), /*shows_flops=*/true));
  }
  return absl::OkStatus();
}

}  // namespace nestor
