#include "nestor/statistics.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <numeric>

#include "base/check.h"

namespace nestor {

double Median(std::vector<double> values) {
  NESTOR_CHECK(!values.empty());
  std::sort(values.begin(), values.end());
  const size_t middle = values.size() / 2;
  if (values.size() % 2 == 1) return values[middle];
  return (values[middle - 1] + values[middle]) / 2;
}

double CosineSimilarity(std::span<const float> a, std::span<const float> b) {
  NESTOR_CHECK(a.size() == b.size());
  double dot = 0, square_a = 0, square_b = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    dot += static_cast<double>(a[i]) * b[i];
    square_a += static_cast<double>(a[i]) * a[i];
    square_b += static_cast<double>(b[i]) * b[i];
  }
  const double length = std::sqrt(square_a) * std::sqrt(square_b);
  return length > 0 ? dot / length : 0;
}

double Perplexity(std::span<const double> log_probabilities) {
  NESTOR_CHECK(!log_probabilities.empty());
  const double sum = std::accumulate(log_probabilities.begin(), log_probabilities.end(), 0.0);
  return std::exp(-sum / static_cast<double>(log_probabilities.size()));
}

}  // namespace nestor
