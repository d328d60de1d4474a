#include "server/served_model.h"

#include <algorithm>
#include <filesystem>
#include <utility>

namespace nestor {
namespace {

std::string NameOf(const NestedModel& model) {
  const nlohmann::json& description = model.description();
  if (description.is_object() && description.contains("source")) {
    const std::string name = description["source"].value("name", "");
    if (!name.empty()) return name;
  }
  std::filesystem::path directory = std::filesystem::path(model.directory()).lexically_normal();
  if (!directory.has_filename()) directory = directory.parent_path();
  return directory.filename().string();
}

ServedLevel DescribeLevel(const Level& level) {
  ServedLevel served;
  served.form = level.ladder;
  served.relative_cost = level.relative_cost;
  served.relative_flops = level.relative_flops;
  served.quality = level.metrics.quality;
  served.is_interpolated = level.is_interpolated;
  served.perplexity = level.metrics.perplexity.value_or(0);
  served.spearman = level.metrics.spearman.value_or(0);
  served.weight_bytes = level.cost.weight_bytes;
  served.flops_per_token = static_cast<double>(level.cost.flops);
  return served;
}

}  // namespace

ServedModel DescribeModel(const Engine& engine, std::string device) {
  const NestedModel& model = engine.model();
  const ModelSpec& spec = model.spec();
  ServedModel served;
  served.name = NameOf(model);
  served.architecture = spec.architecture;
  served.dtype = model.dtype();
  served.device = std::move(device);
  served.is_encoder = spec.is_encoder();
  served.max_sequence_length = engine.max_sequence_length();
  // An encoder reads a text in one step.
  if (served.is_encoder) {
    served.max_sequence_length =
        std::min(served.max_sequence_length, engine.options().max_step_rows);
  }
  served.vocabulary = spec.vocabulary;
  served.hidden = spec.hidden;
  served.end_tokens = spec.end_tokens;
  for (const Level& level : model.levels()) served.levels.push_back(DescribeLevel(level));
  served.tokenizer = &engine.tokenizer();
  served.chat_template = engine.chat_template();
  return served;
}

Ladder LadderOf(const ServedModel& model) {
  Ladder ladder;
  for (const ServedLevel& level : model.levels) {
    ladder.push_back({.relative_cost = level.relative_cost,
                      .relative_flops = level.relative_flops,
                      .quality = level.quality,
                      .flops_per_token = level.flops_per_token,
                      .shares_pass = level.form == "residual" || level.form == "full"});
  }
  return ladder;
}

}  // namespace nestor
