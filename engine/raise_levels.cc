#include "engine/raise_levels.h"

#include <algorithm>

namespace nestor {
namespace {

// Bytes of one layer for rows in the forms and up to the ranks given; -1 is none.
int64_t BytesOfLayer(const LinearSpec& layer, DenseStorage dense, bool has_dense, bool has_middle,
                     int64_t residual_rank, int64_t prefix_rank) {
  const auto bytes = [&](Form form, int64_t rank) {
    return CostOfLinear(layer.out, layer.in, /*has_bias=*/false, dense, form, rank).weight_bytes;
  };
  int64_t total = has_dense ? bytes(Form::kDense, 0) : 0;
  // The coarse plane and its scales are part of all of these forms, but of dense ones in bf16.
  bool has_coarse = has_dense && dense == DenseStorage::kPlanes;
  const int64_t coarse = bytes(Form::kResidual, 0);
  if (has_middle) {
    total += bytes(Form::kMiddle, 0) - (has_coarse ? coarse : 0);
    has_coarse = true;
  }
  if (residual_rank >= 0) {
    total += bytes(Form::kResidual, residual_rank) - (has_coarse ? coarse : 0);
  }
  if (prefix_rank >= 0) total += bytes(Form::kPrefix, prefix_rank);
  return total;
}

int64_t BytesOfGar(const LinearSpec& layer, int64_t rank) {
  return CostOfLinear(layer.out, layer.in, /*has_bias=*/false, DenseStorage::kPlanes, Form::kGar,
                      rank)
      .weight_bytes;
}

}  // namespace

LevelRaiser::LevelRaiser(const std::vector<LinearSpec>* layers, const std::vector<Level>* levels,
                         DenseStorage dense, const Backend* backend)
    : layers_(*layers), levels_(*levels), dense_(dense), backend_(backend) {
  for (const Level& level : levels_) {
    RowWork work;
    for (size_t i = 0; i < layers_.size(); ++i) {
      const auto out = static_cast<double>(layers_[i].out);
      const auto in = static_cast<double>(layers_[i].in);
      const auto& [form, rank] = level.profile[i];
      if (!HasRanks(form)) work.dense += 2 * out * in;
      if (form == Form::kResidual) work.coarse += 2 * out * in;
      const double pivots = form == Form::kGar ? static_cast<double>(rank) : 0;
      work.factors += 2 * static_cast<double>(rank) * (out + in - pivots);
    }
    row_work_.push_back(work);
  }
}

int64_t LevelRaiser::BytesOf(LevelSet levels) {
  // The upper bits of a product by the golden ratio (Knuth, volume 3, 6.4).
  static_assert(std::tuple_size_v<decltype(bytes_)> == 256);
  BytesOfSet& known = bytes_[(levels * 0x9e3779b97f4a7c15u) >> 56];
  if (known.levels == levels) return known.bytes;
  int64_t total = 0;
  const auto has = [&](size_t level) { return (levels & SetOf(static_cast<int>(level))) != 0; };
  for (size_t layer = 0; layer < layers_.size(); ++layer) {
    bool has_dense = false;
    bool has_middle = false;
    int64_t residual_rank = -1;
    int64_t prefix_rank = -1;
    for (size_t level = 0; level < levels_.size(); ++level) {
      if (!has(level)) continue;
      const FormAndRank& choice = levels_[level].profile[layer];
      const auto& [form, rank] = choice;
      has_dense = has_dense || form == Form::kDense;
      has_middle = has_middle || form == Form::kMiddle;
      if (form == Form::kResidual) residual_rank = std::max(residual_rank, rank);
      if (form == Form::kPrefix) prefix_rank = std::max(prefix_rank, rank);
      if (form != Form::kGar) continue;
      bool was_counted = false;
      for (size_t other = 0; other < level; ++other)
        was_counted = was_counted || (has(other) && levels_[other].profile[layer] == choice);
      if (!was_counted) total += BytesOfGar(layers_[layer], rank);
    }
    total +=
        BytesOfLayer(layers_[layer], dense_, has_dense, has_middle, residual_rank, prefix_rank);
  }
  known = {levels, total};
  return total;
}

bool LevelRaiser::Moves(const Entry& entry, int target) const {
  const int full = static_cast<int>(levels_.size()) - 1;
  if (target < 0 || entry.level == target || entry.level == full) return false;
  if ((entry.may_run & SetOf(target)) == 0) return false;
  const Level& from = levels_[static_cast<size_t>(entry.level)];
  const Level& to = levels_[static_cast<size_t>(target)];
  if (from.ladder == to.ladder) return target > entry.level;
  return target == full || to.metrics.quality > from.metrics.quality;
}

double LevelRaiser::CostOf(std::span<const Entry> entries, int target, const StepCosts& costs) {
  LevelSet levels = 0;
  double work = 0;
  for (const Entry& entry : entries) {
    const int level = Moves(entry, target) ? target : entry.level;
    levels |= SetOf(level);
    const auto& [dense, coarse, factors] = row_work_[static_cast<size_t>(level)];
    work += static_cast<double>(entry.rows) *
            (dense + costs.coarse_weight * coarse + costs.factor_weight * factors);
  }
  return static_cast<double>(BytesOf(levels)) + costs.bytes_per_flop * work;
}

void LevelRaiser::Raise(std::span<Entry> entries) {
  if (entries.size() < 2) return;
  if (levels_.size() > static_cast<size_t>(kMaxLevelsInSet)) return;
  LevelSet asked = 0;
  int64_t rows = 0;
  for (const Entry& entry : entries) {
    asked |= SetOf(entry.level);
    rows += entry.rows;
  }
  if ((asked & (asked - 1)) == 0) return;  // one level
  int best = kNone;
  const StepCosts costs = backend_->step_costs(rows);
  double best_cost = CostOf(entries, kNone, costs);
  for (int level = 0; level < static_cast<int>(levels_.size()); ++level) {
    if ((asked & SetOf(level)) == 0) continue;
    const double cost = CostOf(entries, level, costs);
    if (cost <= best_cost) {  // at the same cost, the better level
      best = level;
      best_cost = cost;
    }
  }
  if (best == kNone) return;
  for (Entry& entry : entries) {
    if (Moves(entry, best)) entry.level = best;
  }
}

}  // namespace nestor
