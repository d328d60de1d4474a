#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"

namespace nestor {

// The daemon's configuration with its defaults. `server_listen` is the key `listen` of the group
// `server` in config/nestord.yaml, which says what each means.
struct ServerConfig {
  std::string model_directory;
  std::string server_listen = "0.0.0.0:50051";
  int64_t server_max_message_bytes = 4194304;
  int64_t server_max_connection_age_ms = 0;
  int64_t server_max_connection_age_grace_ms = 600000;
  int64_t server_drain_grace_ms = 2000;
  int64_t server_drain_limit_ms = 30000;
  int64_t stream_buffer_tokens = 256;
  int64_t stream_stall_limit_ms = 10000;
  std::string metrics_listen = "0.0.0.0:9464";
  int64_t device_threads = 0;
  bool device_pin_threads = false;
  int64_t engine_max_step_rows = 512;
  int64_t engine_max_sequences = 64;
  int64_t engine_kv_cache_bytes = 1073741824;
  std::string engine_kv_cache_type = "bf16";
  int64_t engine_page_size = 16;
  std::vector<std::string> engine_extra_costs;
  int64_t scheduler_max_queue = 256;
  int64_t scheduler_prefill_chunk = 128;
  int64_t scheduler_default_priority = 10;
  bool speculation_enabled = true;
  int64_t speculation_max_draft = 8;
  int64_t limits_default_max_tokens = 256;
  int64_t limits_max_texts = 128;
};

// Reads YAML `text` over the defaults. INVALID_ARGUMENT lists every violation: a key that is
// unknown, a value of another type, one out of range; each with its path and value. `source` is
// the file's name, for messages.
absl::StatusOr<ServerConfig> ParseConfig(const std::string& text, const std::string& source);

// Sets single keys, given as "group.key" and the value's text. Errors as above.
absl::Status OverrideConfig(const std::vector<std::pair<std::string, std::string>>& overrides,
                            ServerConfig* config);

// Every key with its value, for the log.
nlohmann::ordered_json ToJson(const ServerConfig& config);

// Every key, "group.key", in the order of the file.
std::vector<std::string> ConfigKeys();

}  // namespace nestor
