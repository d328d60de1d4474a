#include "server/config/server_config.h"

#include <optional>
#include <set>
#include <variant>

#include "absl/algorithm/container.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "base/status_macros.h"
#include "yaml-cpp/yaml.h"

namespace nestor {
namespace {

struct Integer {
  int64_t ServerConfig::*member;
  int64_t min;
  int64_t max;
};

// ADDRESS:PORT, or "" where `may_be_empty`.
struct Address {
  std::string ServerConfig::*member;
  bool may_be_empty;
};

struct Text {
  std::string ServerConfig::*member;
};

// A list of texts; on the command line with commas between them.
struct Texts {
  std::vector<std::string> ServerConfig::*member;
};

// One of some words.
struct Choice {
  std::string ServerConfig::*member;
  std::vector<std::string> words;
};

struct Switch {
  bool ServerConfig::*member;
};

struct Field {
  const char* group;
  const char* key;
  std::variant<Integer, Address, Text, Texts, Choice, Switch> value;
  std::string path() const { return absl::StrCat(group, ".", key); }
};

// As engine/speculation.h has it, which this folder does not include.
constexpr int64_t kMaxDrafts = 8;
constexpr int64_t kDay = 24 * 3600 * 1000;
constexpr int64_t kGigabyte = 1 << 30;

const std::vector<Field>& Fields() {
  using C = ServerConfig;
  static const std::vector<Field> fields = {
      {"model", "directory", Text{&C::model_directory}},
      {"server", "listen", Address{&C::server_listen, false}},
      {"server", "max_message_bytes", Integer{&C::server_max_message_bytes, 1024, kGigabyte}},
      {"server", "max_connection_age_ms", Integer{&C::server_max_connection_age_ms, 0, kDay}},
      {"server", "max_connection_age_grace_ms",
       Integer{&C::server_max_connection_age_grace_ms, 0, kDay}},
      {"server", "drain_grace_ms", Integer{&C::server_drain_grace_ms, 0, kDay}},
      {"server", "drain_limit_ms", Integer{&C::server_drain_limit_ms, 0, kDay}},
      {"stream", "buffer_tokens", Integer{&C::stream_buffer_tokens, 1, 1 << 20}},
      {"stream", "stall_limit_ms", Integer{&C::stream_stall_limit_ms, 1, kDay}},
      {"metrics", "listen", Address{&C::metrics_listen, true}},
      {"device", "threads", Integer{&C::device_threads, 0, 1024}},
      {"device", "pin_threads", Switch{&C::device_pin_threads}},
      {"engine", "max_step_rows", Integer{&C::engine_max_step_rows, 1, 65536}},
      {"engine", "max_sequences", Integer{&C::engine_max_sequences, 1, 65536}},
      {"engine", "kv_cache_bytes", Integer{&C::engine_kv_cache_bytes, 0, kGigabyte << 14}},
      {"engine", "kv_cache_type", Choice{&C::engine_kv_cache_type, {"bf16", "fp32"}}},
      {"engine", "page_size", Integer{&C::engine_page_size, 1, 1024}},
      {"engine", "extra_costs", Texts{&C::engine_extra_costs}},
      {"scheduler", "max_queue", Integer{&C::scheduler_max_queue, 1, 1 << 20}},
      {"scheduler", "prefill_chunk", Integer{&C::scheduler_prefill_chunk, 1, 65536}},
      {"scheduler", "default_priority", Integer{&C::scheduler_default_priority, 1, 1000000}},
      {"speculation", "enabled", Switch{&C::speculation_enabled}},
      {"speculation", "max_draft", Integer{&C::speculation_max_draft, 0, kMaxDrafts}},
      {"limits", "default_max_tokens", Integer{&C::limits_default_max_tokens, 1, 1 << 24}},
      {"limits", "max_texts", Integer{&C::limits_max_texts, 1, 1 << 20}},
  };
  return fields;
}

const Field* FindField(const std::string& path) {
  for (const Field& field : Fields()) {
    if (field.path() == path) return &field;
  }
  return nullptr;
}

bool IsList(const std::string& path) {
  const Field* field = FindField(path);
  return field != nullptr && std::holds_alternative<Texts>(field->value);
}

bool IsAddress(const std::string& text) {
  const size_t colon = text.rfind(':');
  int port = 0;
  return colon != std::string::npos && colon > 0 &&
         absl::SimpleAtoi(text.substr(colon + 1), &port) && port >= 0 && port <= 65535;
}

// Sets one field from its text; the violation otherwise.
std::optional<std::string> Set(const Field& field, const std::string& text, ServerConfig* config) {
  if (const auto* integer = std::get_if<Integer>(&field.value)) {
    int64_t value = 0;
    if (!absl::SimpleAtoi(text, &value)) {
      return absl::StrCat(field.path(), ": must be an integer; was '", text, "'");
    }
    config->*(integer->member) = value;
  } else if (const auto* address = std::get_if<Address>(&field.value)) {
    config->*(address->member) = text;
  } else if (const auto* choice = std::get_if<Choice>(&field.value)) {
    config->*(choice->member) = text;
  } else if (const auto* toggle = std::get_if<Switch>(&field.value)) {
    // YAML's own spellings, and no others.
    if (text != "true" && text != "false") {
      return absl::StrCat(field.path(), ": must be true or false; was '", text, "'");
    }
    config->*(toggle->member) = text == "true";
  } else if (const auto* texts = std::get_if<Texts>(&field.value)) {
    config->*(texts->member) = absl::StrSplit(text, ',', absl::SkipEmpty());
  } else {
    config->*(std::get<Text>(field.value).member) = text;
  }
  return std::nullopt;
}

std::optional<std::string> CheckRange(const Field& field, const ServerConfig& config) {
  if (const auto* integer = std::get_if<Integer>(&field.value)) {
    const int64_t value = config.*(integer->member);
    if (value >= integer->min && value <= integer->max) return std::nullopt;
    return absl::StrCat(field.path(), ": must be in [", integer->min, ", ", integer->max, "]; was ",
                        value);
  }
  if (const auto* address = std::get_if<Address>(&field.value)) {
    const std::string& value = config.*(address->member);
    if (IsAddress(value) || (value.empty() && address->may_be_empty)) return std::nullopt;
    return absl::StrCat(field.path(), ": must be ADDRESS:PORT",
                        address->may_be_empty ? ", or empty" : "", "; was '", value, "'");
  }
  if (const auto* choice = std::get_if<Choice>(&field.value)) {
    const std::string& value = config.*(choice->member);
    if (absl::c_linear_search(choice->words, value)) return std::nullopt;
    return absl::StrCat(field.path(), ": must be ", absl::StrJoin(choice->words, " or "), "; was '",
                        value, "'");
  }
  return std::nullopt;
}

void CheckAll(const ServerConfig& config, std::vector<std::string>* violations) {
  for (const Field& field : Fields()) {
    if (const auto violation = CheckRange(field, config)) violations->push_back(*violation);
  }
  if (config.engine_max_sequences > config.engine_max_step_rows) {
    violations->push_back(absl::StrCat(
        "engine.max_sequences: must be at most engine.max_step_rows (", config.engine_max_step_rows,
        "), a row for each; was ", config.engine_max_sequences));
  }
  if (config.limits_max_texts > config.scheduler_max_queue) {
    violations->push_back(absl::StrCat("limits.max_texts: must be at most scheduler.max_queue (",
                                       config.scheduler_max_queue, "); was ",
                                       config.limits_max_texts));
  }
}

absl::Status StatusOf(const std::string& source, const std::vector<std::string>& violations) {
  if (violations.empty()) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(source, ": ", violations.size(), " error",
                                                 violations.size() == 1 ? "" : "s", ":\n  ",
                                                 absl::StrJoin(violations, "\n  ")));
}

// The groups and keys of a document, as text. yaml-cpp throws; this is where that ends.
using Entries = std::vector<std::pair<std::string, std::string>>;
absl::StatusOr<Entries> ReadYaml(const std::string& text, const std::string& source,
                                 std::vector<std::string>* violations) {
  try {
    Entries entries;
    const YAML::Node document = YAML::Load(text);
    if (document.IsNull()) return entries;
    if (!document.IsMap()) {
      return absl::InvalidArgumentError(absl::StrCat(source, ": must be a map of groups"));
    }
    for (const auto& group : document) {
      const std::string name = group.first.as<std::string>();
      if (!group.second.IsMap()) {
        violations->push_back(absl::StrCat(name, ": must be a group of keys"));
        continue;
      }
      for (const auto& entry : group.second) {
        const std::string path = absl::StrCat(name, ".", entry.first.as<std::string>());
        if (entry.second.IsSequence() && IsList(path)) {
          const auto items = entry.second.as<std::vector<std::string>>();
          entries.emplace_back(path, absl::StrJoin(items, ","));
          continue;
        }
        if (!entry.second.IsScalar()) {
          violations->push_back(absl::StrCat(path, ": must be a single value"));
          continue;
        }
        entries.emplace_back(path, entry.second.Scalar());
      }
    }
    return entries;
  } catch (const YAML::Exception& error) {
    return absl::InvalidArgumentError(absl::StrCat(source, ": ", error.what()));
  }
}

void Apply(const Entries& entries, ServerConfig* config, std::vector<std::string>* violations) {
  std::set<std::string> seen;
  for (const auto& [path, text] : entries) {
    const Field* field = FindField(path);
    if (field == nullptr) {
      violations->push_back(absl::StrCat(path, ": unknown key; its value was '", text, "'"));
    } else if (!seen.insert(path).second) {
      violations->push_back(absl::StrCat(path, ": given twice; the second value was '", text, "'"));
    } else if (const auto violation = Set(*field, text, config)) {
      violations->push_back(*violation);
    }
  }
}

}  // namespace

absl::StatusOr<ServerConfig> ParseConfig(const std::string& text, const std::string& source) {
  ServerConfig config;
  std::vector<std::string> violations;
  NESTOR_ASSIGN_OR_RETURN(const Entries entries, ReadYaml(text, source, &violations));
  Apply(entries, &config, &violations);
  CheckAll(config, &violations);
  NESTOR_RETURN_IF_ERROR(StatusOf(source, violations));
  return config;
}

absl::Status OverrideConfig(const std::vector<std::pair<std::string, std::string>>& overrides,
                            ServerConfig* config) {
  std::vector<std::string> violations;
  Apply(overrides, config, &violations);
  CheckAll(*config, &violations);
  return StatusOf("command line", violations);
}

nlohmann::ordered_json ToJson(const ServerConfig& config) {
  nlohmann::ordered_json json;
  for (const Field& field : Fields()) {
    if (const auto* integer = std::get_if<Integer>(&field.value)) {
      json[field.path()] = config.*(integer->member);
    } else if (const auto* address = std::get_if<Address>(&field.value)) {
      json[field.path()] = config.*(address->member);
    } else if (const auto* choice = std::get_if<Choice>(&field.value)) {
      json[field.path()] = config.*(choice->member);
    } else if (const auto* toggle = std::get_if<Switch>(&field.value)) {
      json[field.path()] = config.*(toggle->member);
    } else if (const auto* texts = std::get_if<Texts>(&field.value)) {
      json[field.path()] = config.*(texts->member);
    } else {
      json[field.path()] = config.*(std::get<Text>(field.value).member);
    }
  }
  return json;
}

std::vector<std::string> ConfigKeys() {
  std::vector<std::string> keys;
  for (const Field& field : Fields()) keys.push_back(field.path());
  return keys;
}

}  // namespace nestor
