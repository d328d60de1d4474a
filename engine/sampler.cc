#include "engine/sampler.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <numbers>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "engine/gumbel_noise.h"

namespace nestor {
namespace {

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

// The highest of the GumbelNoise::kBlock logits from `begin` on, or of as many as there are.
float HighestOfBlock(std::span<const float> logits, size_t begin) {
  if (begin + GumbelNoise::kBlock > logits.size()) {
    return *std::max_element(logits.begin() + static_cast<std::ptrdiff_t>(begin), logits.end());
  }
  // Four lanes, which the compiler turns into one register.
  float lanes[4];
  std::copy_n(logits.data() + begin, 4, lanes);
  for (size_t i = 4; i < GumbelNoise::kBlock; i += 4) {
    for (size_t lane = 0; lane < 4; ++lane) {
      const float value = logits[begin + i + lane];
      lanes[lane] = value > lanes[lane] ? value : lanes[lane];
    }
  }
  return std::max(std::max(lanes[0], lanes[1]), std::max(lanes[2], lanes[3]));
}

// exp(x) for x in [-87, 0], within 3e-7 of it; without branches, so that the compiler vectorises
// loops.
float Exp(float x) {
  const float scaled = x * std::numbers::log2e_v<float>;
  const int32_t whole = static_cast<int32_t>(scaled - 0.5f);
  // Taylor's series on [-log(2) / 2, log(2) / 2].
  const float y = (scaled - static_cast<float>(whole)) * std::numbers::ln2_v<float>;
  constexpr float k2 = 1.0f / 2, k3 = 1.0f / 6, k4 = 1.0f / 24, k5 = 1.0f / 120, k6 = 1.0f / 720;
  const float series = 1 + y * (1 + y * (k2 + y * (k3 + y * (k4 + y * (k5 + y * k6)))));
  return std::bit_cast<float>((whole + 127) << 23) * series;
}

// The sum of exp((logit - highest) / temperature).
double SumOfWeights(std::span<const float> logits, float highest, double temperature) {
  constexpr size_t kBlock = 256;
  const float scale = static_cast<float>(1 / temperature);
  double sum = 0;
  float weights[kBlock];
  for (size_t begin = 0; begin < logits.size(); begin += kBlock) {
    const size_t count = std::min(kBlock, logits.size() - begin);
    const float* block = logits.data() + begin;
    for (size_t i = 0; i < count; ++i) weights[i] = (block[i] - highest) * scale;
    for (size_t i = 0; i < count; ++i) weights[i] = weights[i] > -87 ? weights[i] : -87.0f;
    for (size_t i = 0; i < count; ++i) weights[i] = Exp(weights[i]);
    for (size_t i = 0; i < count; ++i) sum += weights[i];
  }
  return sum;
}

constexpr size_t kWordBits = 64;

// Below it the weights of all but the highest logits are 0 in any case, and 1 / temperature would
// overflow.
constexpr double kLowestTemperature = 1e-30;

// How far below the highest logit the likeliest tokens are looked for first.
double FirstReach(double temperature) { return std::max(8 * temperature, 1.0); }

// A logit with its noise; the token that ends highest is drawn.
double Noisy(float logit, float highest, double temperature, double noise) {
  return (static_cast<double>(logit) - highest) / temperature + noise;
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

Sampler::Sampler(const SamplingOptions& options) : options_(options) {}

void Sampler::AddContext(std::span<const int32_t> tokens) {
  if (options_.repetition_penalty == 1) return;
  for (const int32_t token : tokens) {
    if (token < 0) continue;
    const size_t word = static_cast<size_t>(token) / kWordBits;
    if (word >= context_.size()) context_.resize(word + 1);
    context_[word] |= uint64_t{1} << (static_cast<size_t>(token) % kWordBits);
  }
}

bool Sampler::IsInContext(int32_t token) const {
  const size_t word = static_cast<size_t>(token) / kWordBits;
  return token >= 0 && word < context_.size() &&
         (context_[word] >> (static_cast<size_t>(token) % kWordBits) & 1) != 0;
}

int32_t Sampler::Sample(std::span<const float> logits) {
  const int32_t token = Peek(logits, {});
  AddContext({&token, 1});
  ++num_sampled_;
  return token;
}

int32_t Sampler::Peek(std::span<const float> logits, std::span<const int32_t> ahead) {
  NESTOR_CHECK(!logits.empty());
  const std::span<const float> penalised = Penalise(logits, ahead);
  return options_.temperature == 0 ? ArgMax(penalised)
                                   : Draw(penalised, num_sampled_ + ahead.size());
}

std::span<const float> Sampler::Penalise(std::span<const float> logits,
                                         std::span<const int32_t> ahead) {
  if (options_.repetition_penalty == 1) return logits;
  // Room for every token at once, so that the tokens to come do not allocate.
  const size_t num_words = (logits.size() + kWordBits - 1) / kWordBits;
  if (context_.size() < num_words) context_.resize(num_words);
  penalised_.assign(logits.begin(), logits.end());
  const float penalty = static_cast<float>(options_.repetition_penalty);
  const auto penalise = [&](int32_t token) {
    if (token < 0 || static_cast<size_t>(token) >= penalised_.size()) return;
    float& logit = penalised_[static_cast<size_t>(token)];
    logit = logit > 0 ? logit / penalty : logit * penalty;
  };
  for (size_t word = 0; word < context_.size(); ++word) {
    for (uint64_t bits = context_[word]; bits != 0; bits &= bits - 1) {
      penalise(static_cast<int32_t>(word * kWordBits) + std::countr_zero(bits));
    }
  }
  for (size_t i = 0; i < ahead.size(); ++i) {
    const auto before = ahead.first(i);
    const bool is_new =
        !IsInContext(ahead[i]) && std::find(before.begin(), before.end(), ahead[i]) == before.end();
    if (is_new) penalise(ahead[i]);
  }
  return penalised_;
}

int32_t Sampler::Draw(std::span<const float> logits, uint64_t index) {
  const GumbelNoise noise(options_.seed, index);
  const double temperature = std::max(options_.temperature, kLowestTemperature);
  const int32_t likeliest = ArgMax(logits);
  const float highest = logits[static_cast<size_t>(likeliest)];
  int32_t best = likeliest;
  double best_value = noise.Of(likeliest);
  const auto consider = [&](float logit, int32_t token) {
    const double value = Noisy(logit, highest, temperature, noise.Of(token));
    if (value <= best_value) return;
    best_value = value;
    best = token;
  };
  const bool limits_count =
      options_.top_k > 0 && static_cast<size_t>(options_.top_k) < logits.size();
  if (limits_count || options_.top_p < 1) {
    if (limits_count) KeepTopK(logits, highest);
    if (options_.top_p < 1) KeepTopP(logits, highest, limits_count);
    for (const auto& [logit, token] : candidates_) consider(logit, token);
    return best;
  }
  for (size_t begin = 0; begin < logits.size(); begin += GumbelNoise::kBlock) {
    // Where the distribution is peaked, nearly every block ends here.
    const double bound = noise.BoundOf(static_cast<int32_t>(begin / GumbelNoise::kBlock));
    if (Noisy(HighestOfBlock(logits, begin), highest, temperature, bound) < best_value) continue;
    const size_t end = std::min(begin + GumbelNoise::kBlock, logits.size());
    for (size_t i = begin; i < end; ++i) {
      if (Noisy(logits[i], highest, temperature, bound) < best_value) continue;
      consider(logits[i], static_cast<int32_t>(i));
    }
  }
  return best;
}

bool Sampler::Gather(std::span<const float> logits, float highest, double reach) {
  candidates_.clear();
  candidates_.reserve(logits.size());
  const float lowest = static_cast<float>(highest - reach);
  for (size_t begin = 0; begin < logits.size(); begin += GumbelNoise::kBlock) {
    if (HighestOfBlock(logits, begin) < lowest) continue;
    const size_t end = std::min(begin + GumbelNoise::kBlock, logits.size());
    for (size_t i = begin; i < end; ++i) {
      if (logits[i] >= lowest) candidates_.emplace_back(logits[i], static_cast<int32_t>(i));
    }
  }
  return candidates_.size() == logits.size();
}

// KeepTopK and KeepTopP widen their reach until what they look for lies within it: to sort a whole
// vocabulary takes longer than a step of a small model.

void Sampler::KeepTopK(std::span<const float> logits, float highest) {
  const size_t count = static_cast<size_t>(options_.top_k);
  double reach = FirstReach(options_.temperature);
  while (!Gather(logits, highest, reach) && candidates_.size() < count) reach *= 2;
  std::nth_element(candidates_.begin(), candidates_.begin() + options_.top_k - 1, candidates_.end(),
                   RanksBefore);
  candidates_.resize(count);
}

void Sampler::KeepTopP(std::span<const float> logits, float highest, bool is_limited) {
  const double temperature = std::max(options_.temperature, kLowestTemperature);
  // The smallest number of sorted candidates whose weights reach `wanted`; none: all do not.
  const auto count_up_to = [&](double wanted) -> std::optional<size_t> {
    std::sort(candidates_.begin(), candidates_.end(), RanksBefore);
    double sum = 0;
    for (size_t i = 0; i < candidates_.size(); ++i) {
      sum += std::exp(Noisy(candidates_[i].first, highest, temperature, 0));
      if (sum >= wanted) return i + 1;
    }
    return std::nullopt;
  };
  std::optional<size_t> kept;
  if (is_limited) {
    double total = 0;
    for (const auto& [logit, token] : candidates_) {
      total += std::exp(Noisy(logit, highest, temperature, 0));
    }
    kept = count_up_to(options_.top_p * total);
  } else {
    const double wanted = options_.top_p * SumOfWeights(logits, highest, temperature);
    bool has_all = false;
    for (double reach = FirstReach(temperature); !kept.has_value() && !has_all; reach *= 2) {
      has_all = Gather(logits, highest, reach);
      kept = count_up_to(wanted);
    }
  }
  candidates_.resize(kept.value_or(candidates_.size()));
}

std::string StopMatcher::Push(std::string text) {
  if (stops_.empty()) return text;
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
