#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "engine/nested_model.h"

namespace nestor {

// One way to run one layer at a level of a ladder.
struct LayerOption {
  FormAndRank choice;
  int64_t cost = 0;  // weight bytes (residual ladder) or FLOPs (prefix ladder)
  double error = 0;  // what it loses; additive over layers
};

// By layer, in any order; at least one each. Options of one form differ in rank, and a larger rank
// costs more; dense costs the most.
using LayerOptions = std::vector<std::vector<LayerOption>>;

// Chooses one profile for each target: the sum of its costs is within the target, or it is the
// cheapest of all. Targets ascend, and the profiles are nested: form and rank of every layer only
// grow. A pure function.
using AllocateFunction = std::function<std::vector<Profile>(const LayerOptions& options,
                                                            std::span<const int64_t> targets)>;

// Walks the lower convex hulls of the layers' (cost, error) points, steepest step first. A profile
// met on the way has the least total error at its cost (Lagrangian relaxation: Everett, Operations
// Research 11, 1963). Where the next step exceeds a target (a head is a large one), later steps of
// other layers fill what is left, and the step is taken for the first target that it fits.
std::vector<Profile> AllocateAlongHulls(const LayerOptions& options,
                                        std::span<const int64_t> targets);

// The same rank for every layer, as near to the target as whole ranks come: each layer takes its
// largest option up to the common rank, dense where the rank exceeds all others. What is left of
// the target goes to single layers, the next option of the largest error saved a cost first.
std::vector<Profile> AllocateEvenly(const LayerOptions& options, std::span<const int64_t> targets);

}  // namespace nestor
