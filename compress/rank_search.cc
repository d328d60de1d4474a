#include "compress/rank_search.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "base/check.h"

namespace nestor {
namespace {

// Costs of a level are then within a thousandth of its target, errors closer.
constexpr int64_t kResolution = 2048;
// Errors below this share of the largest are as good as none.
constexpr double kNegligible = 1e-9;

struct State {
  int64_t cost = 0;
  double error = 0;
  int32_t before = 0;  // index among the states of the layer before
  int32_t option = 0;
};

bool IsBetter(const State& a, const State& b) {
  return a.error != b.error ? a.error < b.error : a.cost < b.cost;
}

int64_t LeastCost(const std::vector<LayerOption>& layer) {
  int64_t least = std::numeric_limits<int64_t>::max();
  for (const LayerOption& option : layer) least = std::min(least, option.cost);
  return least;
}

int64_t LeastCost(const LayerOptions& options) {
  int64_t cost = 0;
  for (const std::vector<LayerOption>& layer : options) cost += LeastCost(layer);
  return cost;
}

// The states of one layer more. Costs are those above the cheapest choice; `width` is that of an
// interval, states above `max_cost` are dropped.
std::vector<State> Extend(const std::vector<State>& states, const std::vector<LayerOption>& layer,
                          int64_t max_cost, int64_t width) {
  constexpr int32_t kEmpty = -1;
  std::vector<State> best(static_cast<size_t>(max_cost / width + 1), {.option = kEmpty});
  const int64_t least = LeastCost(layer);
  for (size_t i = 0; i < states.size(); ++i) {
    for (size_t j = 0; j < layer.size(); ++j) {
      const State next = {.cost = states[i].cost + layer[j].cost - least,
                          .error = states[i].error + layer[j].error,
                          .before = static_cast<int32_t>(i),
                          .option = static_cast<int32_t>(j)};
      if (next.cost > max_cost) continue;
      State& kept = best[static_cast<size_t>(next.cost / width)];
      if (kept.option == kEmpty || IsBetter(next, kept)) kept = next;
    }
  }
  std::vector<State> front;
  for (const State& state : best) {
    if (state.option == kEmpty) continue;
    if (front.empty() || state.error < front.back().error) front.push_back(state);
  }
  return front;
}

// The options of each layer that a level may have between two others of its ladder; either may be
// null.
LayerOptions Between(const LayerOptions& options, const Profile* low, const Profile* high) {
  LayerOptions allowed(options.size());
  for (size_t layer = 0; layer < options.size(); ++layer) {
    for (const LayerOption& option : options[layer]) {
      if (low != nullptr && !IsNested((*low)[layer], option.choice)) continue;
      if (high != nullptr && !IsNested(option.choice, (*high)[layer])) continue;
      allowed[layer].push_back(option);
    }
  }
  return allowed;
}

struct SolvedLevel {
  Profile profile;
  double error = 0;
};

// The best level within `target`, or the cheapest one where `takes_cheapest` and none fits.
std::optional<SolvedLevel> Solve(const LayerOptions& options, int64_t target, bool takes_cheapest) {
  if (takes_cheapest) target = std::max(target, LeastCost(options));
  const std::optional<SearchResult> result = SearchWithin(options, target, kResolution);
  if (!result.has_value()) return std::nullopt;
  SolvedLevel level{.error = result->error};
  for (size_t layer = 0; layer < options.size(); ++layer) {
    level.profile.push_back(options[layer][result->choices[layer]].choice);
  }
  return level;
}

// The chain through the free solution of one target; null where no nested level is cheap enough
// for a target below it.
std::optional<std::vector<SolvedLevel>> ChainThrough(const LayerOptions& options,
                                                     std::span<const int64_t> targets,
                                                     const SolvedLevel& anchor, size_t index) {
  std::vector<SolvedLevel> chain(targets.size());
  chain[index] = anchor;
  for (size_t i = index; i-- > 0;) {
    const bool is_cheapest = targets[i] < LeastCost(options);
    const std::optional<SolvedLevel> level =
        Solve(Between(options, nullptr, &chain[i + 1].profile), targets[i], is_cheapest);
    if (!level.has_value()) return std::nullopt;
    chain[i] = *level;
  }
  for (size_t i = index + 1; i < targets.size(); ++i) {
    // The level below fits, so one does.
    chain[i] = *Solve(Between(options, &chain[i - 1].profile, nullptr), targets[i],
                      /*takes_cheapest=*/true);
  }
  return chain;
}

}  // namespace

void RepairMonotony(LayerOptions* options) {
  for (std::vector<LayerOption>& layer : *options) {
    std::vector<LayerOption*> by_rank;
    for (LayerOption& option : layer) by_rank.push_back(&option);
    std::stable_sort(
        by_rank.begin(), by_rank.end(),
        [](const LayerOption* a, const LayerOption* b) { return a->choice.rank > b->choice.rank; });
    double dense = 0;
    for (const LayerOption& option : layer) {
      if (option.choice.form == Form::kDense) dense = option.error;
    }
    for (const Form form : {Form::kMiddle, Form::kResidual, Form::kPrefix}) {
      double largest = dense;
      for (LayerOption* option : by_rank) {
        if (option->choice.form != form) continue;
        largest = std::max(largest, option->error);
        option->error = largest;
      }
    }
  }
}

std::optional<SearchResult> SearchWithin(const LayerOptions& options, int64_t max_cost,
                                         int64_t resolution) {
  NESTOR_CHECK(resolution > 0);
  for (const std::vector<LayerOption>& layer : options) {
    if (layer.empty()) return std::nullopt;
  }
  const int64_t least = LeastCost(options);
  if (max_cost < least) return std::nullopt;
  const int64_t spare = max_cost - least;
  const int64_t width = spare / resolution + 1;
  std::vector<std::vector<State>> fronts = {{State()}};
  for (const std::vector<LayerOption>& layer : options) {
    fronts.push_back(Extend(fronts.back(), layer, spare, width));
  }
  SearchResult result;
  result.choices.resize(options.size());
  size_t state = fronts.back().size() - 1;  // the dearest errs least
  result.cost = least + fronts.back()[state].cost;
  result.error = fronts.back()[state].error;
  for (size_t layer = options.size(); layer-- > 0;) {
    const State& chosen = fronts[layer + 1][state];
    result.choices[layer] = static_cast<size_t>(chosen.option);
    state = static_cast<size_t>(chosen.before);
  }
  return result;
}

std::vector<Profile> AllocateBySearch(const LayerOptions& options,
                                      std::span<const int64_t> targets) {
  NESTOR_CHECK(std::is_sorted(targets.begin(), targets.end()));
  std::vector<SolvedLevel> free;
  for (const int64_t target : targets) {
    free.push_back(*Solve(options, target, /*takes_cheapest=*/true));
  }
  double largest = 0;
  for (const SolvedLevel& level : free) largest = std::max(largest, level.error);
  const double negligible = kNegligible * largest;
  std::vector<SolvedLevel> best;
  double least_regret = std::numeric_limits<double>::infinity();
  for (size_t anchor = 0; anchor < targets.size(); ++anchor) {
    const std::optional<std::vector<SolvedLevel>> chain =
        ChainThrough(options, targets, free[anchor], anchor);
    if (!chain.has_value()) continue;
    double regret = 0;
    for (size_t i = 0; i < targets.size() && largest > 0; ++i) {
      regret += std::log(((*chain)[i].error + negligible) / (free[i].error + negligible));
    }
    if (best.empty() || regret < least_regret) {
      best = *chain;
      least_regret = regret;
    }
  }
  std::vector<Profile> profiles;
  for (SolvedLevel& level : best) profiles.push_back(std::move(level.profile));
  return profiles;
}

double ErrorOfProfile(const LayerOptions& options, const Profile& profile) {
  double error = 0;
  for (size_t layer = 0; layer < options.size(); ++layer) {
    const auto chosen =
        std::find_if(options[layer].begin(), options[layer].end(),
                     [&](const LayerOption& option) { return option.choice == profile[layer]; });
    NESTOR_CHECK(chosen != options[layer].end());
    error += chosen->error;
  }
  return error;
}

}  // namespace nestor
