#include "compress/allocate.h"

#include <algorithm>
#include <utility>

#include "base/check.h"

namespace nestor {
namespace {

// A move of one layer from one option of its hull to the next.
struct HullStep {
  size_t layer = 0;
  LayerOption to;
  int64_t cost = 0;  // added
  double slope = 0;  // error removed by a unit of cost
};

double Slope(const LayerOption& from, const LayerOption& to) {
  return (from.error - to.error) / static_cast<double>(to.cost - from.cost);
}

// The options on the lower convex hull, cheapest first; errors fall along it.
std::vector<LayerOption> LowerHull(std::vector<LayerOption> options) {
  std::sort(options.begin(), options.end(), [](const LayerOption& a, const LayerOption& b) {
    return a.cost != b.cost ? a.cost < b.cost : a.error < b.error;
  });
  std::vector<LayerOption> hull;
  for (const LayerOption& option : options) {
    if (!hull.empty() && (option.cost == hull.back().cost || option.error >= hull.back().error)) {
      continue;
    }
    while (hull.size() >= 2 &&
           Slope(hull[hull.size() - 2], hull.back()) <= Slope(hull.back(), option)) {
      hull.pop_back();
    }
    hull.push_back(option);
  }
  return hull;
}

// The options of each layer that one rank for all may choose from, cheapest first.
LayerOptions Sorted(LayerOptions options) {
  for (std::vector<LayerOption>& layer : options) {
    std::erase_if(layer, [](const LayerOption& o) { return o.choice.form == Form::kMiddle; });
    NESTOR_CHECK(!layer.empty());
    std::sort(layer.begin(), layer.end(),
              [](const LayerOption& a, const LayerOption& b) { return a.cost < b.cost; });
  }
  return options;
}

bool IsDense(const LayerOption& option) { return option.choice.form == Form::kDense; }

// By layer, the index of its largest option up to `rank`, and not below `least`. `options` are
// sorted.
std::vector<size_t> EvenChoice(const LayerOptions& options, int64_t rank,
                               const std::vector<size_t>& least) {
  std::vector<size_t> chosen;
  for (const std::vector<LayerOption>& layer : options) {
    size_t index = 0;
    int64_t largest = 0;
    for (size_t i = 0; i < layer.size(); ++i) {
      largest = std::max(largest, layer[i].choice.rank);
      if (!IsDense(layer[i]) && layer[i].choice.rank <= rank) index = i;
    }
    if (IsDense(layer.back()) && rank > largest) index = layer.size() - 1;
    chosen.push_back(std::max(index, least[chosen.size()]));
  }
  return chosen;
}

int64_t CostOf(const LayerOptions& options, const std::vector<size_t>& chosen) {
  int64_t cost = 0;
  for (size_t layer = 0; layer < options.size(); ++layer)
    cost += options[layer][chosen[layer]].cost;
  return cost;
}

}  // namespace

std::vector<Profile> AllocateEvenly(const LayerOptions& unsorted,
                                    std::span<const int64_t> targets) {
  NESTOR_CHECK(std::is_sorted(targets.begin(), targets.end()));
  const LayerOptions options = Sorted(unsorted);
  std::vector<int64_t> ranks;
  for (const std::vector<LayerOption>& layer : options) {
    for (const LayerOption& option : layer) ranks.push_back(option.choice.rank);
  }
  std::sort(ranks.begin(), ranks.end());
  ranks.erase(std::unique(ranks.begin(), ranks.end()), ranks.end());
  ranks.push_back(ranks.back() + 1);  // dense everywhere
  std::vector<Profile> profiles;
  std::vector<size_t> last(options.size(), 0);
  for (const int64_t target : targets) {
    std::vector<size_t> chosen = EvenChoice(options, ranks.front(), last);
    for (const int64_t rank : ranks) {
      const std::vector<size_t> candidate = EvenChoice(options, rank, last);
      if (CostOf(options, candidate) <= target) chosen = candidate;
    }
    const auto cost_of_step = [&](size_t layer) {
      const size_t next = chosen[layer] + 1;
      return options[layer][next].cost - options[layer][chosen[layer]].cost;
    };
    int64_t left = target - CostOf(options, chosen);
    std::vector<bool> had_step(options.size(), false);
    while (true) {
      size_t best = options.size();
      double best_slope = -1;
      for (size_t layer = 0; layer < options.size(); ++layer) {
        if (had_step[layer] || chosen[layer] + 1 >= options[layer].size()) continue;
        if (cost_of_step(layer) > left) continue;
        const double slope =
            Slope(options[layer][chosen[layer]], options[layer][chosen[layer] + 1]);
        if (slope > best_slope) {
          best = layer;
          best_slope = slope;
        }
      }
      if (best == options.size()) break;
      left -= cost_of_step(best);
      ++chosen[best];
      had_step[best] = true;
    }
    Profile profile;
    for (size_t layer = 0; layer < options.size(); ++layer) {
      profile.push_back(options[layer][chosen[layer]].choice);
    }
    profiles.push_back(std::move(profile));
    last = std::move(chosen);
  }
  return profiles;
}

std::vector<Profile> AllocateAlongHulls(const LayerOptions& options,
                                        std::span<const int64_t> targets) {
  NESTOR_CHECK(std::is_sorted(targets.begin(), targets.end()));
  Profile profile;
  std::vector<HullStep> steps;
  int64_t cost = 0;
  for (size_t layer = 0; layer < options.size(); ++layer) {
    NESTOR_CHECK(!options[layer].empty());
    const std::vector<LayerOption> hull = LowerHull(options[layer]);
    profile.push_back(hull.front().choice);
    cost += hull.front().cost;
    for (size_t i = 1; i < hull.size(); ++i) {
      steps.push_back({.layer = layer,
                       .to = hull[i],
                       .cost = hull[i].cost - hull[i - 1].cost,
                       .slope = Slope(hull[i - 1], hull[i])});
    }
  }
  // Slopes fall along a hull, so a stable sort keeps every layer's steps in order.
  std::stable_sort(steps.begin(), steps.end(),
                   [](const HullStep& a, const HullStep& b) { return a.slope > b.slope; });
  std::vector<Profile> profiles;
  for (const int64_t target : targets) {
    std::vector<HullStep> left;
    std::vector<bool> waits(options.size(), false);  // for a step of its layer that does not fit
    for (const HullStep& step : steps) {
      waits[step.layer] = waits[step.layer] || cost + step.cost > target;
      if (waits[step.layer]) {
        left.push_back(step);
        continue;
      }
      profile[step.layer] = step.to.choice;
      cost += step.cost;
    }
    steps = std::move(left);
    profiles.push_back(profile);
  }
  return profiles;
}

}  // namespace nestor
