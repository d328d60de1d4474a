#include <algorithm>
#include <chrono>
#include <cstdio>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
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

struct EmbedFlags {
  ConnectionFlags connection;
  BudgetFlags budget;
  std::optional<std::string> file;
  bool pairs = false;
  int64_t batch = 32;
  bool truncate = false;
  bool json = false;
};

struct Embeddings {
  std::vector<std::vector<float>> values;  // one for each text
  v1::Usage usage;
  double texts_per_second = 0;
};

void Declare(Flags* flags, EmbedFlags* values) {
  flags->Add("file", &values->file, "reads the texts from a file, one a line; - for stdin");
  flags->Add("pairs", &values->pairs,
             "prints the cosine similarity of texts 1 and 2, 3 and 4, ...");
  flags->Add("batch", &values->batch, "texts in one request");
  flags->Add("truncate", &values->truncate, "cuts texts that are longer than the model takes");
  AddBudgetFlags(flags, &values->budget);
  AddConnectionFlags(flags, &values->connection);
  flags->Add("json", &values->json, "one object on stdout");
}

absl::StatusOr<std::vector<std::string>> TextsOf(const EmbedFlags& flags,
                                                 const std::vector<std::string>& positional) {
  if (flags.file.has_value() == !positional.empty()) {
    return UsageError("expected texts, or --file FILE, and not both");
  }
  std::vector<std::string> texts = positional;
  if (flags.file) {
    NESTOR_ASSIGN_OR_RETURN(const std::string content, ReadFileOrStdin(*flags.file));
    texts = NonEmptyLines(content);
    if (texts.empty()) {
      return absl::InvalidArgumentError(absl::StrCat(*flags.file, ": has no line of text"));
    }
  }
  for (size_t i = 0; i < texts.size(); ++i) {
    NESTOR_RETURN_IF_ERROR(CheckUtf8(absl::StrCat("text ", i + 1), texts[i]));
  }
  if (flags.pairs && texts.size() % 2 != 0) {
    return UsageError(
        absl::StrCat("--pairs: expected an even number of texts; got ", texts.size()));
  }
  return texts;
}

absl::Status EmbedBatch(Connection* connection, const v1::EmbedRequest& request,
                        v1::EmbedResponse* response) {
  const std::unique_ptr<grpc::ClientContext> context = connection->MakeContext();
  NESTOR_RETURN_IF_ERROR(
      connection->ToStatus(connection->inference().Embed(context.get(), request, response)));
  if (response->embeddings_size() != request.texts_size()) {
    return absl::InternalError(absl::StrCat("the daemon sent ", response->embeddings_size(),
                                            " embeddings for ", request.texts_size(), " texts"));
  }
  return absl::OkStatus();
}

absl::StatusOr<Embeddings> EmbedAll(const EmbedFlags& flags,
                                    const std::vector<std::string>& texts) {
  NESTOR_ASSIGN_OR_RETURN(const v1::Budget budget, BudgetOf(flags.budget));
  Connection connection(flags.connection);
  Embeddings embeddings;
  std::vector<v1::Usage> usages;
  const auto start = std::chrono::steady_clock::now();
  for (size_t begin = 0; begin < texts.size(); begin += flags.batch) {
    const size_t end = std::min(texts.size(), begin + static_cast<size_t>(flags.batch));
    v1::EmbedRequest request;
    request.mutable_texts()->Assign(texts.begin() + begin, texts.begin() + end);
    request.set_truncate(flags.truncate);
    *request.mutable_budget() = budget;
    v1::EmbedResponse response;
    NESTOR_RETURN_IF_ERROR(EmbedBatch(&connection, request, &response));
    for (const v1::Embedding& embedding : response.embeddings()) {
      embeddings.values.emplace_back(embedding.values().begin(), embedding.values().end());
    }
    usages.push_back(response.usage());
  }
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  embeddings.texts_per_second = static_cast<double>(texts.size()) / seconds.count();
  embeddings.usage = Merge(usages);
  return embeddings;
}

absl::StatusOr<std::vector<double>> SimilaritiesOf(const Embeddings& embeddings) {
  std::vector<double> similarities;
  for (size_t i = 0; i + 1 < embeddings.values.size(); i += 2) {
    const std::vector<float>& a = embeddings.values[i];
    const std::vector<float>& b = embeddings.values[i + 1];
    if (a.size() != b.size()) {
      return absl::InternalError(
          absl::StrCat("the daemon sent embeddings of ", a.size(), " and ", b.size(), " values"));
    }
    similarities.push_back(CosineSimilarity(a, b));
  }
  return similarities;
}

void PrintValues(const Embeddings& embeddings) {
  for (const std::vector<float>& values : embeddings.values) {
    for (size_t i = 0; i < values.size(); ++i) absl::PrintF(i == 0 ? "%.6g" : " %.6g", values[i]);
    absl::PrintF("\n");
  }
}

}  // namespace

absl::Status RunEmbed(const std::vector<std::string>& arguments) {
  EmbedFlags values;
  Flags flags(
      "nestor embed TEXT ... | --file FILE [flags]\n\n"
      "Prints one embedding a line, or with --pairs the cosine similarity of each pair; then a\n"
      "usage line to stderr. --max-cost bounds relative FLOPs here.",
      "nestor embed --pairs --max-cost 0.4 \"A man is eating.\" \"Someone has a meal.\"");
  Declare(&flags, &values);
  NESTOR_ASSIGN_OR_RETURN(const std::vector<std::string> positional, flags.Parse(arguments));
  if (values.batch < 1) {
    return UsageError(absl::StrCat("--batch: expected 1 or more; was ", values.batch));
  }
  NESTOR_ASSIGN_OR_RETURN(const std::vector<std::string> texts, TextsOf(values, positional));
  NESTOR_ASSIGN_OR_RETURN(const Embeddings embeddings, EmbedAll(values, texts));
  std::vector<double> similarities;
  if (values.pairs) {
    NESTOR_ASSIGN_OR_RETURN(similarities, SimilaritiesOf(embeddings));
  }

  if (values.json) {
    nlohmann::json json = {{"embeddings", embeddings.values},
                           {"sentences_per_second", embeddings.texts_per_second},
                           {"usage", ToJson(embeddings.usage)}};
    if (values.pairs) json["similarities"] = similarities;
    absl::PrintF("%s\n", json.dump());
    return absl::OkStatus();
  }
  if (values.pairs) {
    for (size_t i = 0; i < similarities.size(); ++i) {
      absl::PrintF("%.4f  %s | %s\n", similarities[i], texts[2 * i], texts[2 * i + 1]);
    }
  } else {
    PrintValues(embeddings);
  }
  std::fflush(stdout);
  absl::FPrintF(stderr, "[%s | %.1f sentences/s]\n",
                UsageLine(embeddings.usage, /*shows_flops=*/true), embeddings.texts_per_second);
  return absl::OkStatus();
}

}  // namespace nestor
