#pragma once

#include <algorithm>
#include <cmath>

namespace nestor {

// Tokens that a round of speculative decoding gives on average where `num_drafts` are drafted and
// each is accepted with probability `acceptance`, independently: what is accepted, and one more
// (Leviathan, Kalman, Matias 2023, arXiv 2211.17192, equation 1).
inline double ExpectedTokens(double acceptance, int num_drafts) {
  if (acceptance >= 1) return num_drafts + 1;
  return (1 - std::pow(std::max(acceptance, 0.0), num_drafts + 1)) / (1 - acceptance);
}

// Tokens per time against plain decoding (theorem 3.8 there, for a verifying pass that has a cost
// of its own). In times of a plain step: a draft takes `draft_time`, verifying them `verify_time`.
inline double SpeculativeGain(double acceptance, int num_drafts, double draft_time,
                              double verify_time) {
  return ExpectedTokens(acceptance, num_drafts) / (num_drafts * draft_time + verify_time);
}

}  // namespace nestor
