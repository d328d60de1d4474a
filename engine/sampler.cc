#include "engine/sampler.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"

namespace nestor {
namespace {

// SplitMix64 (Steele, Lea, Flood 2014): a full-period generator whose state is one integer.
uint64_t NextRandom(uint64_t* state) {
  uint64_t z = (*state += 0x9e3779b97f4a7c15u);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// Uniform in [0, 1).
double NextUniform(uint64_t* state) {
  return static_cast<double>(NextRandom(state) >> 11) * 0x1p-53;
}

// The first index of the largest value.
int32_t ArgMax(std::span<const float> values) {
  // Independent lanes let the compiler vectorise the search for the value.
  constexpr size_t kLanes = 16;
  float lanes[kLanes];
  std::fill_n(lanes, kLanes, values[0]);
  size_t i = 0;
  for (; i + kLanes <= values.size(); i += kLanes) {
    for (size_t lane = 0; lane < kLanes; ++lane) {
      lanes[lane] = values[i + lane] > lanes[lane] ? values[i + lane] : lanes[lane];
    }
  }
  float largest = *std::max_element(lanes, lanes + kLanes);
  for (; i < values.size(); ++i) largest = std::max(largest, values[i]);
  return static_cast<int32_t>(std::find(values.begin(), values.end(), largest) - values.begin());
}

// Highest logit first; equal logits in order of the token, so that ties do not depend on the sort.
bool RanksBefore(const std::pair<float, int32_t>& a, const std::pair<float, int32_t>& b) {
  return a.first != b.first ? a.first > b.first : a.second < b.second;
}

}  // namespace

absl::Status Validate(const SamplingOptions& options) {
  if (!(options.temperature >= 0) || !std::isfinite(options.temperature)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "sampling.temperature: must be finite and at least 0; was ", options.temperature));
  }
  if (options.top_k < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("sampling.top_k: must be at least 0; was ", options.top_k));
  }
  if (!(options.top_p > 0 && options.top_p <= 1)) {
    return absl::InvalidArgumentError(
        absl::StrCat("sampling.top_p: must be in (0, 1]; was ", options.top_p));
  }
  if (!(options.repetition_penalty > 0) || !std::isfinite(options.repetition_penalty)) {
    return absl::InvalidArgumentError(
        absl::StrCat("sampling.repetition_penalty: must be finite and above 0; was ",
                     options.repetition_penalty));
  }
  return absl::OkStatus();
}

Sampler::Sampler(const SamplingOptions& options) : options_(options), state_(options.seed) {}

void Sampler::AddContext(std::span<const int32_t> tokens) {
  if (options_.repetition_penalty == 1) return;
  for (const int32_t token : tokens) {
    if (is_in_context_.insert(token).second) context_.push_back(token);
  }
}

int32_t Sampler::Sample(std::span<const float> logits) {
  NESTOR_CHECK(!logits.empty());
  std::span<const float> penalised = logits;
  if (options_.repetition_penalty != 1) {
    penalised_.assign(logits.begin(), logits.end());
    const float penalty = static_cast<float>(options_.repetition_penalty);
    for (const int32_t token : context_) {
      if (token < 0 || static_cast<size_t>(token) >= penalised_.size()) continue;
      float& logit = penalised_[static_cast<size_t>(token)];
      logit = logit > 0 ? logit / penalty : logit * penalty;
    }
    penalised = penalised_;
  }
  const int32_t token = options_.temperature == 0 ? ArgMax(penalised) : Draw(penalised);
  AddContext({&token, 1});
  return token;
}

int32_t Sampler::Draw(std::span<const float> logits) {
  candidates_.clear();
  for (size_t i = 0; i < logits.size(); ++i) {
    candidates_.emplace_back(logits[i], static_cast<int32_t>(i));
  }
  if (options_.top_k > 0 && static_cast<size_t>(options_.top_k) < candidates_.size()) {
    std::nth_element(candidates_.begin(), candidates_.begin() + options_.top_k - 1,
                     candidates_.end(), RanksBefore);
    candidates_.resize(static_cast<size_t>(options_.top_k));
  }
  const bool needs_order = options_.top_p < 1;
  if (needs_order) std::sort(candidates_.begin(), candidates_.end(), RanksBefore);
  const float highest =
      std::max_element(candidates_.begin(), candidates_.end(), [](const auto& a, const auto& b) {
        return a.first < b.first;
      })->first;
  weights_.clear();
  double total = 0;
  for (const auto& [logit, token] : candidates_) {
    weights_.push_back(std::exp((static_cast<double>(logit) - highest) / options_.temperature));
    total += weights_.back();
  }
  size_t kept = weights_.size();
  if (needs_order) {
    // The smallest set of most likely tokens whose probability reaches top_p.
    double sum = 0;
    for (kept = 0; kept < weights_.size() && sum < options_.top_p * total; ++kept) {
      sum += weights_[kept];
    }
    total = sum;
  }
  double left = NextUniform(&state_) * total;
  for (size_t i = 0; i < kept; ++i) {
    left -= weights_[i];
    if (left < 0) return candidates_[i].second;
  }
  return candidates_[kept - 1].second;
}

std::string StopMatcher::Push(const std::string& text) {
  if (matched_) return "";
  held_ += text;
  size_t first_match = std::string::npos;
  for (const std::string& stop : stops_) first_match = std::min(first_match, held_.find(stop));
  if (first_match != std::string::npos) {
    matched_ = true;
    std::string shown = held_.substr(0, first_match);
    held_.clear();
    return shown;
  }
  // Keep the longest tail that begins a stop string.
  size_t keep = 0;
  for (const std::string& stop : stops_) {
    const size_t longest = std::min(stop.size() - 1, held_.size());
    for (size_t length = longest; length > keep; --length) {
      if (held_.compare(held_.size() - length, length, stop, 0, length) == 0) keep = length;
    }
  }
  std::string shown = held_.substr(0, held_.size() - keep);
  held_.erase(0, held_.size() - keep);
  return shown;
}

std::string StopMatcher::Flush() { return std::exchange(held_, {}); }

}  // namespace nestor
