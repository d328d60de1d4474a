#include "nestor/usage.h"

#include <google/protobuf/repeated_field.h>

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "nestor/client.h"

namespace nestor {
namespace {

using LevelRuns = google::protobuf::RepeatedPtrField<v1::LevelRun>;

nlohmann::json RunsToJson(const LevelRuns& runs) {
  nlohmann::json json = nlohmann::json::array();
  for (const v1::LevelRun& run : runs) {
    json.push_back({{"level", run.level()}, {"tokens", run.tokens()}});
  }
  return json;
}

double SecondsOf(const google::protobuf::Duration& duration) {
  return absl::ToDoubleSeconds(FromProto(duration));
}

void AppendRuns(const LevelRuns& runs, LevelRuns* out) {
  for (const v1::LevelRun& run : runs) {
    if (!out->empty() && out->rbegin()->level() == run.level()) {
      out->rbegin()->set_tokens(out->rbegin()->tokens() + run.tokens());
    } else {
      *out->Add() = run;
    }
  }
}

bool RunsOneLevel(const LevelRuns& runs) {
  LevelRuns merged;
  AppendRuns(runs, &merged);
  return merged.size() <= 1;
}

// "level 2", or "levels 3 x12, 2 x20" where they changed along the text.
std::string DescribeRuns(const LevelRuns& runs) {
  if (runs.empty()) return "no tokens";
  if (RunsOneLevel(runs)) return absl::StrCat("level ", runs[0].level());
  return absl::StrCat("levels ",
                      absl::StrJoin(runs, ", ", [](std::string* out, const v1::LevelRun& run) {
                        absl::StrAppend(out, run.level(), " x", run.tokens());
                      }));
}

// The completion's levels, with the prompt's where they differ.
std::string DescribeLevels(const v1::Usage& usage) {
  if (usage.completion_levels().empty()) return DescribeRuns(usage.prompt_levels());
  LevelRuns all = usage.prompt_levels();
  all.MergeFrom(usage.completion_levels());
  const std::string completion = DescribeRuns(usage.completion_levels());
  if (usage.prompt_levels().empty() || RunsOneLevel(all)) return completion;
  return absl::StrCat(completion, " (prompt: ", DescribeRuns(usage.prompt_levels()), ")");
}

std::string DescribeBudget(const v1::Usage& usage) {
  std::string text;
  if (usage.degraded()) absl::StrAppend(&text, " | degraded: ", usage.degraded_reason());
  if (usage.has_target_met()) {
    absl::StrAppend(&text, usage.target_met() ? " | target met" : " | target missed");
  }
  return text;
}

std::string DescribeCost(const v1::Usage& usage) {
  return absl::StrFormat("%s | relative cost %.3f | expected quality %.3f", DescribeLevels(usage),
                         usage.mean_relative_cost(), usage.expected_quality());
}

}  // namespace

void StreamTiming::Record(absl::Duration elapsed, int64_t num_tokens) {
  if (num_tokens == 0) return;
  if (!first_) {
    first_ = elapsed;
  } else {
    tokens_after_first_ += num_tokens;
  }
  last_ = elapsed;
}

std::optional<double> StreamTiming::tokens_per_second() const {
  if (tokens_after_first_ == 0 || last_ <= *first_) return std::nullopt;
  return static_cast<double>(tokens_after_first_) / absl::ToDoubleSeconds(last_ - *first_);
}

std::optional<double> JointTokensPerSecond(const std::vector<std::vector<TokenArrival>>& streams) {
  absl::Duration begin = -absl::InfiniteDuration();
  absl::Duration end = absl::InfiniteDuration();
  for (const std::vector<TokenArrival>& stream : streams) {
    if (stream.empty()) return std::nullopt;
    begin = std::max(begin, stream.front().elapsed);
    end = std::min(end, stream.back().elapsed);
  }
  if (end <= begin) return std::nullopt;
  int64_t tokens = 0;
  for (const std::vector<TokenArrival>& stream : streams) {
    for (const TokenArrival& arrival : stream) {
      if (arrival.elapsed > begin && arrival.elapsed <= end) tokens += arrival.tokens;
    }
  }
  return static_cast<double>(tokens) / absl::ToDoubleSeconds(end - begin);
}

nlohmann::json ToJson(const v1::Usage& usage) {
  nlohmann::json json = {
      {"prompt_levels", RunsToJson(usage.prompt_levels())},
      {"completion_levels", RunsToJson(usage.completion_levels())},
      {"mean_relative_cost", usage.mean_relative_cost()},
      {"mean_relative_flops", usage.mean_relative_flops()},
      {"flops", usage.flops()},
      {"expected_quality", usage.expected_quality()},
      {"queue_seconds", SecondsOf(usage.queue_time())},
      {"prefill_seconds", SecondsOf(usage.prefill_time())},
      {"decode_seconds", SecondsOf(usage.decode_time())},
      {"degraded", usage.degraded()},
      {"degraded_reason", usage.degraded_reason()},
      {"target_met", nullptr},
      {"prompt_tokens", usage.prompt_tokens()},
      {"completion_tokens", usage.completion_tokens()},
      {"drafted_tokens", usage.drafted_tokens()},
      {"accepted_tokens", usage.accepted_tokens()},
  };
  if (usage.has_target_met()) json["target_met"] = usage.target_met();
  return json;
}

nlohmann::json ToJson(const v1::Usage& usage, const StreamTiming& timing) {
  nlohmann::json json = ToJson(usage);
  json["tokens_per_second"] = nullptr;
  json["time_to_first_token_seconds"] = nullptr;
  if (timing.tokens_per_second()) json["tokens_per_second"] = *timing.tokens_per_second();
  if (timing.time_to_first_token()) {
    json["time_to_first_token_seconds"] = absl::ToDoubleSeconds(*timing.time_to_first_token());
  }
  return json;
}

std::string UsageLine(const v1::Usage& usage, bool shows_flops) {
  std::string line = DescribeCost(usage);
  if (shows_flops)
    absl::StrAppendFormat(&line, " | relative FLOPs %.3f", usage.mean_relative_flops());
  return absl::StrCat(line, DescribeBudget(usage));
}

std::string UsageLine(const v1::Usage& usage, const StreamTiming& timing) {
  std::string line = DescribeCost(usage);
  if (timing.tokens_per_second()) {
    absl::StrAppendFormat(&line, " | %.1f tokens/s", *timing.tokens_per_second());
  }
  if (timing.time_to_first_token()) {
    absl::StrAppendFormat(&line, " | first token %.0f ms",
                          absl::ToDoubleMilliseconds(*timing.time_to_first_token()));
  }
  if (usage.drafted_tokens() > 0) {
    absl::StrAppendFormat(&line, " | %d of %d drafted tokens accepted", usage.accepted_tokens(),
                          usage.drafted_tokens());
  }
  return absl::StrCat(line, DescribeBudget(usage));
}

v1::Usage Merge(const std::vector<v1::Usage>& parts) {
  v1::Usage sum;
  absl::Duration queue, prefill, decode;
  double cost = 0, flops = 0, quality = 0;  // weighted by tokens
  for (const v1::Usage& part : parts) {
    const double tokens = part.prompt_tokens() + part.completion_tokens();
    AppendRuns(part.prompt_levels(), sum.mutable_prompt_levels());
    AppendRuns(part.completion_levels(), sum.mutable_completion_levels());
    cost += tokens * part.mean_relative_cost();
    flops += tokens * part.mean_relative_flops();
    quality += tokens * part.expected_quality();
    sum.set_flops(sum.flops() + part.flops());
    queue += FromProto(part.queue_time());
    prefill += FromProto(part.prefill_time());
    decode += FromProto(part.decode_time());
    sum.set_prompt_tokens(sum.prompt_tokens() + part.prompt_tokens());
    sum.set_completion_tokens(sum.completion_tokens() + part.completion_tokens());
    sum.set_drafted_tokens(sum.drafted_tokens() + part.drafted_tokens());
    sum.set_accepted_tokens(sum.accepted_tokens() + part.accepted_tokens());
    if (part.degraded() && !sum.degraded()) {
      sum.set_degraded(true);
      sum.set_degraded_reason(part.degraded_reason());
    }
    if (part.has_target_met()) {
      sum.set_target_met(part.target_met() && (!sum.has_target_met() || sum.target_met()));
    }
  }
  *sum.mutable_queue_time() = ToProto(queue);
  *sum.mutable_prefill_time() = ToProto(prefill);
  *sum.mutable_decode_time() = ToProto(decode);
  const double tokens = sum.prompt_tokens() + sum.completion_tokens();
  if (tokens > 0) {
    sum.set_mean_relative_cost(cost / tokens);
    sum.set_mean_relative_flops(flops / tokens);
    sum.set_expected_quality(quality / tokens);
  }
  return sum;
}

std::string NameOf(v1::FinishReason reason) {
  switch (reason) {
    case v1::FINISH_REASON_STOP:
      return "stop";
    case v1::FINISH_REASON_LENGTH:
      return "length";
    case v1::FINISH_REASON_DRAIN:
      return "drain";
    default:
      return "unspecified";
  }
}

}  // namespace nestor
