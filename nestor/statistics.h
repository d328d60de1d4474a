#pragma once

#include <span>
#include <vector>

namespace nestor {

// The middle value, or the mean of the two in the middle. REQUIRES: `values` is not empty.
double Median(std::vector<double> values);

// a . b / (|a| |b|); 0 where one of them has no length. REQUIRES: the same size.
double CosineSimilarity(std::span<const float> a, std::span<const float> b);

// exp of the mean negative log-probability. REQUIRES: `log_probabilities` is not empty.
double Perplexity(std::span<const double> log_probabilities);

}  // namespace nestor
