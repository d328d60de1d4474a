#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "compress/allocate.h"

namespace nestor {

// The search for ranks by dynamic programming (FlexRank, "Search"; methods: 2). Pure functions.

// Makes errors fall with rank: within each form of a layer, dense its end, a running maximum from
// the largest rank to the smallest. Measured errors are noisy where they are small.
void RepairMonotony(LayerOptions* options);

// A choice for every layer.
struct SearchResult {
  std::vector<size_t> choices;  // by layer, an index into its options
  int64_t cost = 0;
  double error = 0;
};

// The least total error within `max_cost`; null where nothing is that cheap. Layer by layer, states
// that cost more and err no less than another are dropped, and of those in one of `resolution`
// equal intervals of cost only the one of least error is kept (exact where each cost has an
// interval of its own). O(layers x options x resolution).
std::optional<SearchResult> SearchWithin(const LayerOptions& options, int64_t max_cost,
                                         int64_t resolution);

// An AllocateFunction: the nested chain of best choices. Each target in turn is an anchor, solved
// freely, and its neighbours up and down are solved among what is nested with it; the chain that
// departs least from the free solutions of all targets (in the sum of log errors) is taken. Options
// may be of several forms: a layer keeps its form along the chain until it is dense, but that the
// middle plane may come between.
std::vector<Profile> AllocateBySearch(const LayerOptions& options,
                                      std::span<const int64_t> targets);

// The summed error of `profile`. REQUIRES: its choices are among the options.
double ErrorOfProfile(const LayerOptions& options, const Profile& profile);

}  // namespace nestor
