#pragma once

#include <vector>

namespace nestor {

// What the scheduler knows of a level: its measured vector. Nothing is inferred from the number.
struct LevelView {
  double relative_cost = 1;
  double relative_flops = 1;
  double quality = 1;
  double flops_per_token = 0;
  // Rows at such levels share one pass over the weights (residual and full levels); rows at any
  // other level (prefix) are a pass of their own.
  bool shares_pass = true;
};

// The levels of the served model, by index. The full level is the last.
using Ladder = std::vector<LevelView>;

}  // namespace nestor
