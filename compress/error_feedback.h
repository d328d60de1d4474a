#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "absl/status/statusor.h"

namespace nestor {

// Rounding with error feedback (GPTQ, arXiv 2210.17323): the columns of a weight [out, in] are
// rounded one after the other, and what rounding a column changes in the output is taken over, as
// far as inputs correlate, by the columns after it. Columns of much input energy come first, while
// there are many left to take over. Immutable, so rows may be rounded by several threads.
class ErrorFeedback {
 public:
  // What stands in row `row`, column `column` for the `value` that is wanted there.
  using RoundFunction = std::function<float(int64_t row, int64_t column, float value)>;

  // For inputs with second moment `moment` [in, in]; a hundredth of their mean energy is added to
  // its diagonal. INTERNAL where that cannot be inverted.
  static absl::StatusOr<ErrorFeedback> Of(std::span<const double> moment, int64_t in);

  // Rounds `weights` [out, in] in place.
  void Round(float* weights, int64_t out, const RoundFunction& round) const;

 private:
  int64_t in_ = 0;
  std::vector<int64_t> order_;  // columns as they are rounded
  // [in, in] in that order: row j, behind its diagonal, is what column j leaves to those after it.
  std::vector<float> shares_;
};

}  // namespace nestor
