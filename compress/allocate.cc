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

}  // namespace

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
