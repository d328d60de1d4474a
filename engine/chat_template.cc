#include "engine/chat_template.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "base/file.h"
#include "base/status_macros.h"
#include "engine/chat_template_ast.h"
#include "engine/chat_template_parser.h"
#include "engine/chat_template_renderer.h"
#include "engine/tokenizer_json.h"
#include "engine/unicode.h"
#include "nlohmann/json.hpp"

namespace nestor {
namespace {

using chat_template::Value;

// A token as a string or as an object with `content`; "" where there is none.
std::string TokenOf(const nlohmann::json& config, const char* name) {
  if (!config.is_object() || !config.contains(name)) return "";
  const nlohmann::json& token = config[name];
  if (token.is_string()) return token.get<std::string>();
  if (token.is_object() && token.contains("content") && token["content"].is_string()) {
    return token["content"].get<std::string>();
  }
  return "";
}

// The template in tokenizer_config.json: a string, or a list of {"name", "template"}.
absl::StatusOr<std::string> SourceOf(const nlohmann::json& config, const std::string& path) {
  const nlohmann::json absent;
  const nlohmann::json& field =
      config.is_object() && config.contains("chat_template") ? config["chat_template"] : absent;
  if (field.is_string()) return field.get<std::string>();
  if (field.is_array()) {
    for (const nlohmann::json& entry : field) {
      if (!entry.is_object() || !entry.contains("name") || !entry.contains("template")) continue;
      if (entry["name"] == "default" && entry["template"].is_string()) {
        return entry["template"].get<std::string>();
      }
    }
    return absl::NotFoundError(absl::StrCat(path, ": chat_template: has no entry \"default\""));
  }
  if (field.is_null()) return absl::NotFoundError(absl::StrCat(path, ": has no chat_template"));
  return absl::InvalidArgumentError(
      absl::StrCat(path, ": chat_template: must be a string or a list; was ", field.type_name()));
}

}  // namespace

struct ChatTemplate::State {
  chat_template::Body body;
  std::string bos_token;
  std::string eos_token;
};

absl::StatusOr<std::unique_ptr<ChatTemplate>> ChatTemplate::Load(const std::string& directory) {
  const std::string config_path = absl::StrCat(directory, "/tokenizer_config.json");
  NESTOR_ASSIGN_OR_RETURN(const nlohmann::json config, ReadJsonFile(config_path));
  std::string path = absl::StrCat(directory, "/chat_template.jinja");
  absl::StatusOr<std::string> source = ReadFile(path);
  if (absl::IsNotFound(source.status())) {
    path = config_path;
    source = SourceOf(config, path);
  }
  NESTOR_RETURN_IF_ERROR(source.status());
  absl::StatusOr<std::unique_ptr<ChatTemplate>> parsed =
      Parse(*source, TokenOf(config, "bos_token"), TokenOf(config, "eos_token"));
  if (!parsed.ok()) {
    return absl::Status(parsed.status().code(),
                        absl::StrCat(path, ": ", parsed.status().message()));
  }
  return parsed;
}

absl::StatusOr<std::unique_ptr<ChatTemplate>> ChatTemplate::Parse(const std::string& source,
                                                                  const std::string& bos_token,
                                                                  const std::string& eos_token) {
  if (!IsValidUtf8(source)) {
    return absl::InvalidArgumentError("chat template: must be valid UTF-8");
  }
  NESTOR_ASSIGN_OR_RETURN(chat_template::Body body, chat_template::ParseTemplate(source));
  auto state = std::make_unique<State>(
      State{.body = std::move(body), .bos_token = bos_token, .eos_token = eos_token});
  return std::unique_ptr<ChatTemplate>(new ChatTemplate(std::move(state)));
}

ChatTemplate::ChatTemplate(std::unique_ptr<State> state) : state_(std::move(state)) {}
ChatTemplate::~ChatTemplate() = default;

absl::StatusOr<std::string> ChatTemplate::Render(const std::vector<ChatTurn>& turns,
                                                 bool adds_generation_prompt) const {
  Value::List messages;
  for (const ChatTurn& turn : turns) {
    if (!IsValidUtf8(turn.role) || !IsValidUtf8(turn.content)) {
      return absl::InvalidArgumentError(
          absl::StrCat("chat message ", messages.size(), ": must be valid UTF-8"));
    }
    messages.push_back(Value::FromDict(
        {{"role", Value::String(turn.role)}, {"content", Value::String(turn.content)}}));
  }
  return chat_template::RenderTemplate(
      state_->body, {{"messages", Value::FromList(std::move(messages))},
                     {"add_generation_prompt", Value::Bool(adds_generation_prompt)},
                     {"bos_token", Value::String(state_->bos_token)},
                     {"eos_token", Value::String(state_->eos_token)},
                     {"tools", Value::None()},
                     {"documents", Value::None()}});
}

}  // namespace nestor
