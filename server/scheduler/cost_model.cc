#include "server/scheduler/cost_model.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "base/check.h"

namespace nestor {
namespace {

// Weight of one observation, in log space: a change of speed is followed within about ten steps,
// and a single hiccup of the machine moves a prediction by little.
constexpr double kLearningRate = 0.1;
// One step says no more than this about the next ones.
constexpr double kLargestSurprise = 4;

}  // namespace

CostModel::CostModel(const Ladder& ladder) : curves_(ladder.size()) {
  for (size_t i = 0; i < ladder.size(); ++i) {
    curves_[i].factors.fill(1);
    curves_[i].shares_pass = ladder[i].shares_pass;
  }
}

void CostModel::AddMeasurement(int level, int64_t rows, Duration time) {
  NESTOR_CHECK(level >= 0 && level < static_cast<int>(curves_.size()) && rows > 0);
  std::vector<Point>& points = curves_[level].points;
  const auto at = std::lower_bound(points.begin(), points.end(), rows,
                                   [](const Point& point, int64_t r) { return point.rows < r; });
  const Point point = {rows, SecondsOf(time)};
  if (at != points.end() && at->rows == rows) {
    *at = point;
  } else {
    points.insert(at, point);
  }
}

size_t CostModel::RowClassOf(int64_t rows) {
  return std::min<size_t>(kNumRowClasses - 1, std::bit_width(static_cast<uint64_t>(rows)));
}

double CostModel::SecondsAt(const Curve& curve, int64_t rows) {
  const std::vector<Point>& points = curve.points;
  if (points.empty()) return 0;
  if (points.size() == 1 || rows <= points.front().rows) return points.front().seconds;
  // The segment that holds `rows`, or the last one prolonged.
  size_t end = 1;
  while (end + 1 < points.size() && points[end].rows < rows) ++end;
  const Point& a = points[end - 1];
  const Point& b = points[end];
  const double slope =
      std::max(0.0, (b.seconds - a.seconds) / static_cast<double>(b.rows - a.rows));
  return a.seconds + slope * static_cast<double>(rows - a.rows);
}

Duration CostModel::Predict(std::span<const int64_t> rows_by_level) const {
  NESTOR_CHECK(rows_by_level.size() == curves_.size());
  int64_t shared_rows = 0;
  for (size_t i = 0; i < curves_.size(); ++i) {
    if (curves_[i].shares_pass) shared_rows += rows_by_level[i];
  }
  double pass = 0;         // the largest fixed part of the shared pass
  double shared_rest = 0;  // what the rows of the shared pass add
  double separate = 0;     // passes of their own
  for (size_t i = 0; i < curves_.size(); ++i) {
    const int64_t rows = rows_by_level[i];
    if (rows == 0) continue;
    const Curve& curve = curves_[i];
    if (!curve.shares_pass) {
      separate += SecondsAt(curve, rows) * curve.factors[RowClassOf(rows)];
      continue;
    }
    const double factor = curve.factors[RowClassOf(shared_rows)];
    const double fixed = SecondsAt(curve, 1) * factor;
    const double share = static_cast<double>(rows) / static_cast<double>(shared_rows);
    pass = std::max(pass, fixed);
    shared_rest += (SecondsAt(curve, shared_rows) * factor - fixed) * share;
  }
  return DurationOfSeconds((pass + shared_rest + separate) * machine_factor_);
}

Duration CostModel::Predict(int level, int64_t rows) const {
  NESTOR_CHECK(level >= 0 && level < static_cast<int>(curves_.size()));
  if (rows == 0) return Duration::zero();
  const Curve& curve = curves_[static_cast<size_t>(level)];
  return DurationOfSeconds(SecondsAt(curve, rows) * curve.factors[RowClassOf(rows)] *
                           machine_factor_);
}

void CostModel::Observe(std::span<const int64_t> rows_by_level, Duration actual) {
  const double predicted = SecondsOf(Predict(rows_by_level));
  const double seconds = SecondsOf(actual);
  if (predicted <= 0 || seconds <= 0) return;
  const double surprise = std::clamp(seconds / predicted, 1 / kLargestSurprise, kLargestSurprise);
  const double step = std::pow(surprise, kLearningRate);
  machine_factor_ *= step;
  int64_t shared_rows = 0;
  for (size_t i = 0; i < curves_.size(); ++i) {
    if (curves_[i].shares_pass) shared_rows += rows_by_level[i];
  }
  for (size_t i = 0; i < curves_.size(); ++i) {
    if (rows_by_level[i] == 0) continue;
    const int64_t rows = curves_[i].shares_pass ? shared_rows : rows_by_level[i];
    curves_[i].factors[RowClassOf(rows)] *= step;
  }
}

}  // namespace nestor
