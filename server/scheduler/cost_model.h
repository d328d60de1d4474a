#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "server/scheduler/ladder.h"
#include "server/scheduler/time.h"

namespace nestor {

// Predicts the time of a step from the rows it has at each level.
//
// Each level has a curve of time over rows, linear between the points measured at warm-up: the
// fixed part is what a pass over the level's weights costs, the slope what a row adds. Levels that
// share a pass cost the largest fixed part among them plus each row's own slope; any other level
// is a pass of its own. What steps really take moves two factors: one for the whole machine, one
// for a level at a class of row counts (powers of two).
//
// Not thread-safe; a value, so that a snapshot can hold a copy.
class CostModel {
 public:
  explicit CostModel(const Ladder& ladder);

  // One point of a level's curve. The points of a level may come in any order; a second one at the
  // same row count replaces the first.
  void AddMeasurement(int level, int64_t rows, Duration time);
  // `rows_by_level[l]` rows run at level l. Zero where nothing has been measured yet.
  Duration Predict(std::span<const int64_t> rows_by_level) const;
  // `rows` rows run, all at `level`.
  Duration Predict(int level, int64_t rows) const;
  // A step of these rows took `actual`.
  void Observe(std::span<const int64_t> rows_by_level, Duration actual);

 private:
  static constexpr size_t kNumRowClasses = 16;
  struct Point {
    int64_t rows;
    double seconds;
  };
  struct Curve {
    std::vector<Point> points;  // ascending rows
    std::array<double, kNumRowClasses> factors;
    bool shares_pass = true;
  };

  static size_t RowClassOf(int64_t rows);
  // Seconds of a step with `rows` rows, all at this level; 0 for an unmeasured level.
  static double SecondsAt(const Curve& curve, int64_t rows);

  std::vector<Curve> curves_;
  double machine_factor_ = 1;
};

}  // namespace nestor
