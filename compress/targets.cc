#include "compress/targets.h"

#include <algorithm>
#include <cmath>
#include <cstddef>

namespace nestor {

std::vector<double> ResidualTargets(int count, double cheapest) {
  // Shares of the way from the cheapest level to the full one. With int8 planes and rank 0 at
  // 0.53 they reach from 0.553 to 0.6, and from 0.68 to 0.8.
  constexpr double kFineBegin = 0.05, kFineEnd = 0.147, kCoarseBegin = 0.32, kCoarseEnd = 0.58;
  if (count == 1) return {cheapest + kFineEnd * (1 - cheapest)};
  const int fine = std::max(1, static_cast<int>(std::ceil(0.6 * (count - 1))));
  const int coarse = count - 1 - fine;
  std::vector<double> targets = {cheapest};
  const auto add = [&](int steps, double begin, double end) {
    for (int i = 1; i <= steps; ++i) {
      const double share = steps == 1 ? end : begin + (end - begin) * (i - 1) / (steps - 1);
      targets.push_back(cheapest + share * (1 - cheapest));
    }
  };
  add(fine, kFineBegin, kFineEnd);
  add(coarse, kCoarseBegin, kCoarseEnd);
  return targets;
}

std::vector<double> PrefixTargets(int count, bool is_encoder) {
  // Encoders stand low ranks without training, language models do not (methods: Prefix ladders).
  const double begin = is_encoder ? 0.3 : 0.6;
  const double end = is_encoder ? 0.85 : 0.9;
  constexpr double kEncoderAnchor = 0.4;
  if (count == 1) return {is_encoder ? kEncoderAnchor : 0.8};
  std::vector<double> targets;
  for (int i = 0; i < count; ++i) targets.push_back(begin + (end - begin) * i / (count - 1));
  if (is_encoder && count > 2) {
    for (int i = 1; i < count; ++i) {
      targets[static_cast<size_t>(i)] =
          kEncoderAnchor + (end - kEncoderAnchor) * (i - 1) / (count - 2);
    }
  }
  return targets;
}

std::vector<double> EvenTargets(int count, double cheapest) {
  std::vector<double> targets;
  for (int i = 0; i < count; ++i) targets.push_back(cheapest + (1 - cheapest) * i / count);
  return targets;
}

}  // namespace nestor
