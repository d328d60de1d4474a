#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/status_macros.h"
#include "nestor/client.h"
#include "nestor/command.h"
#include "nestor/flags.h"
#include "nestor/text_table.h"
#include "nlohmann/json.hpp"

namespace nestor {
namespace {

// The daemon sends 0 for what was not measured.
nlohmann::json NullIfZero(double value) {
  return value == 0 ? nlohmann::json(nullptr) : nlohmann::json(value);
}

std::string DashIfZero(double value, int digits) {
  return value == 0 ? "-" : absl::StrFormat("%.*f", digits, value);
}

void PrintJson(const v1::GetModelResponse& model) {
  nlohmann::json levels = nlohmann::json::array();
  for (const v1::Level& level : model.levels()) {
    nlohmann::json entry = {{"level", level.level()},
                            {"form", level.form()},
                            {"relative_cost", level.relative_cost()},
                            {"relative_flops", level.relative_flops()},
                            {"quality", level.quality()},
                            {"interpolated", level.interpolated()},
                            {"tokens_per_second", NullIfZero(level.tokens_per_second())},
                            {"weight_bytes", level.weight_bytes()},
                            {"flops_per_token", level.flops_per_token()}};
    if (model.is_encoder()) {
      entry["spearman"] = NullIfZero(level.spearman());
    } else {
      entry["perplexity"] = NullIfZero(level.perplexity());
    }
    levels.push_back(std::move(entry));
  }
  const nlohmann::json json = {{"name", model.name()},
                               {"architecture", model.architecture()},
                               {"is_encoder", model.is_encoder()},
                               {"context_length", model.context_length()},
                               {"vocabulary_size", model.vocabulary_size()},
                               {"embedding_size", model.embedding_size()},
                               {"dtype", model.dtype()},
                               {"device", model.device()},
                               {"levels", std::move(levels)}};
  absl::PrintF("%s\n", json.dump(2));
}

void PrintTable(const v1::GetModelResponse& model) {
  absl::PrintF("%s: %s, %s, context %d, on %s\n", model.name(), model.architecture(), model.dtype(),
               model.context_length(), model.device());
  TextTable table({"level", "form", "relative cost", "relative FLOPs", "quality",
                   model.is_encoder() ? "spearman" : "perplexity", "tokens/s"});
  for (const v1::Level& level : model.levels()) {
    table.AddRow(
        {absl::StrCat(level.level()),
         absl::StrCat(level.form(), level.interpolated() ? ", interpolated" : ""),
         absl::StrFormat("%.3f", level.relative_cost()),
         absl::StrFormat("%.3f", level.relative_flops()),
         absl::StrFormat("%s%.3f", level.interpolated() ? "~" : "", level.quality()),
         model.is_encoder() ? DashIfZero(level.spearman(), 4) : DashIfZero(level.perplexity(), 2),
         DashIfZero(level.tokens_per_second(), 1)});
  }
  absl::PrintF("%s", table.Render());
}

}  // namespace

absl::Status RunLevels(const std::vector<std::string>& arguments) {
  ConnectionFlags connection_flags;
  bool json = false;
  Flags flags(
      "nestor levels [flags]\n\n"
      "Prints the levels of the daemon's model, with the quality measured at compression and the\n"
      "speed measured on its device: one sequence decoding, or a batch for an encoder. An\n"
      "interpolated level's quality (~) is an estimate.",
      "nestor levels --server 127.0.0.1:50051");
  AddConnectionFlags(&flags, &connection_flags);
  flags.Add("json", &json, "one object on stdout");
  NESTOR_ASSIGN_OR_RETURN(const std::vector<std::string> positional, flags.Parse(arguments));
  if (!positional.empty()) return UsageError(absl::StrCat("unexpected \"", positional[0], "\""));

  Connection connection(connection_flags);
  const std::unique_ptr<grpc::ClientContext> context = connection.MakeContext();
  v1::GetModelResponse model;
  NESTOR_RETURN_IF_ERROR(connection.ToStatus(
      connection.inference().GetModel(context.get(), v1::GetModelRequest(), &model)));
  if (json) {
    PrintJson(model);
  } else {
    PrintTable(model);
  }
  return absl::OkStatus();
}

}  // namespace nestor
