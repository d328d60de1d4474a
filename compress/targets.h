#pragma once

#include <vector>

namespace nestor {

// Where a ladder's levels aim unless a person says: its cost as share of the full level's,
// ascending, `count` of them. A residual ladder (`cheapest`: the share at rank 0 everywhere) is
// fine-grained in the first seventh of what is between there and full, where rank buys most, and
// coarse above.
std::vector<double> ResidualTargets(int count, double cheapest);
std::vector<double> PrefixTargets(int count, bool is_encoder);
// In equal steps from the cheapest level, for any other ladder and objective.
std::vector<double> EvenTargets(int count, double cheapest);

}  // namespace nestor
