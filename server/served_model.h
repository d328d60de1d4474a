#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "server/scheduler/ladder.h"

namespace nestor {

struct ServedLevel {
  std::string form;  // "residual", "prefix", "mixed", "full"
  double relative_cost = 1;
  double relative_flops = 1;
  double quality = 1;
  bool is_interpolated = false;  // between the artifact's levels; its quality is an estimate
  double perplexity = 0;         // 0: not measured
  double spearman = 0;           // 0: not measured
  int64_t weight_bytes = 0;
  double flops_per_token = 0;
  double tokens_per_second = 0;  // measured by the warm-up
};

// The facts about the served model that requests are checked against and GetModel tells.
struct ServedModel {
  std::string name;
  std::string architecture;
  std::string dtype;
  std::string device;
  bool is_encoder = false;
  int64_t max_sequence_length = 0;  // positions: prompt and completion together
  int64_t vocabulary = 0;
  int64_t hidden = 0;
  std::vector<int32_t> end_tokens;
  std::vector<ServedLevel> levels;              // the full level is the last
  const Tokenizer* tokenizer = nullptr;         // borrowed from the engine
  const ChatTemplate* chat_template = nullptr;  // borrowed; null: the checkpoint has none
};

// `device` describes the backend, for people.
ServedModel DescribeModel(const Engine& engine, std::string device);

Ladder LadderOf(const ServedModel& model);

}  // namespace nestor
