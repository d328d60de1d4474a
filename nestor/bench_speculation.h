#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/engine.h"
#include "nlohmann/json.hpp"

namespace nestor {

struct SpeculationBenchOptions {
  std::vector<int> levels;           // the dearest verifies, the cheaper ones may draft
  std::vector<std::string> prompts;  // a user's messages where the model has a chat template
  int64_t tokens = 64;
  int rounds = 1;
};

// What speculation gives on one model, with the draft level and the number of drafts that the
// formula prefers. Times are in plain steps of the verifying level.
struct SpeculationReport {
  int draft_level = 0;
  int verify_level = 0;
  int num_drafts = 0;
  double acceptance = 0;
  double draft_time = 0;   // c
  double verify_time = 0;  // v
  double expected_gain = 0;
  double plain_tokens_per_second = 0;
  double tokens_per_second = 0;

  double gain() const { return tokens_per_second / plain_tokens_per_second; }
};

// Tries the draft levels and the numbers of drafts, chooses by SpeculativeGain, and measures the
// choice against plain decoding, turn by turn. A UsageError where no level can draft or a prompt
// does not fit the context; other errors are the engine's.
absl::StatusOr<SpeculationReport> MeasureSpeculation(Engine* engine,
                                                     const SpeculationBenchOptions& options);

nlohmann::json ToJson(const SpeculationReport& report);
std::string Render(const SpeculationReport& report);

}  // namespace nestor
