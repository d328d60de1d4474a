#include "engine/raise_levels.h"

#include <algorithm>

namespace nestor {
namespace {

// Factors run at about half of the rate of planes (docs/kernels.md).
constexpr double kFactorWeight = 2;

double RowWork(const std::vector<LinearSpec>& layers, const Profile& profile) {
  double work = 0;
  for (size_t i = 0; i < layers.size(); ++i) {
    const auto out = static_cast<double>(layers[i].out);
    const auto in = static_cast<double>(layers[i].in);
    if (profile[i].form != Form::kPrefix) work += 2 * out * in;
    work += kFactorWeight * 2 * static_cast<double>(profile[i].rank) * (out + in);
  }
  return work;
}

// Bytes of one layer for rows in the forms and up to the ranks given; -1 is none.
int64_t BytesOfLayer(const LinearSpec& layer, DenseStorage dense, bool has_dense,
                     int64_t residual_rank, int64_t prefix_rank) {
  const auto bytes = [&](Form form, int64_t rank) {
    return CostOfLinear(layer.out, layer.in, /*has_bias=*/false, dense, form, rank).weight_bytes;
  };
  int64_t total = has_dense ? bytes(Form::kDense, 0) : 0;
  if (residual_rank >= 0) {
    total += bytes(Form::kResidual, residual_rank);
    // The coarse plane and its scales are part of the dense form.
    if (has_dense && dense == DenseStorage::kPlanes) total -= bytes(Form::kResidual, 0);
  }
  if (prefix_rank >= 0) total += bytes(Form::kPrefix, prefix_rank);
  return total;
}

}  // namespace

LevelRaiser::LevelRaiser(const NestedModel* model, double bytes_per_flop)
    : model_(model), bytes_per_flop_(bytes_per_flop) {
  for (const Level& level : model->levels())
    row_work_.push_back(RowWork(model->layers(), level.profile));
}

int64_t LevelRaiser::BytesOf(LevelSet levels) {
  const auto found = bytes_.find(levels);
  if (found != bytes_.end()) return found->second;
  int64_t total = 0;
  for (size_t layer = 0; layer < model_->layers().size(); ++layer) {
    bool has_dense = false;
    int64_t residual_rank = -1;
    int64_t prefix_rank = -1;
    for (size_t level = 0; level < model_->levels().size(); ++level) {
      if ((levels & SetOf(static_cast<int>(level))) == 0) continue;
      const auto& [form, rank] = model_->levels()[level].profile[layer];
      has_dense = has_dense || form == Form::kDense;
      if (form == Form::kResidual) residual_rank = std::max(residual_rank, rank);
      if (form == Form::kPrefix) prefix_rank = std::max(prefix_rank, rank);
    }
    total += BytesOfLayer(model_->layers()[layer], model_->dense_storage(), has_dense,
                          residual_rank, prefix_rank);
  }
  bytes_.emplace(levels, total);
  return total;
}

bool LevelRaiser::Moves(const NestedModel& model, const Entry& entry, int target) {
  const int full = static_cast<int>(model.levels().size()) - 1;
  if (target < 0 || entry.level == target || entry.level == full) return false;
  if ((entry.may_run & SetOf(target)) == 0) return false;
  const Level& from = model.levels()[static_cast<size_t>(entry.level)];
  const Level& to = model.levels()[static_cast<size_t>(target)];
  if (from.ladder == to.ladder) return target > entry.level;
  return target == full || to.metrics.quality > from.metrics.quality;
}

double LevelRaiser::CostOf(std::span<const Entry> entries, int target) {
  LevelSet levels = 0;
  double work = 0;
  for (const Entry& entry : entries) {
    const int level = Moves(*model_, entry, target) ? target : entry.level;
    levels |= SetOf(level);
    work += static_cast<double>(entry.rows) * row_work_[static_cast<size_t>(level)];
  }
  return static_cast<double>(BytesOf(levels)) + bytes_per_flop_ * work;
}

void LevelRaiser::Raise(std::span<Entry> entries) {
  if (entries.size() < 2) return;
  if (model_->levels().size() > static_cast<size_t>(kMaxLevelsInSet)) return;
  LevelSet asked = 0;
  for (const Entry& entry : entries) asked |= SetOf(entry.level);
  if ((asked & (asked - 1)) == 0) return;  // one level
  constexpr int kNone = -1;
  int best = kNone;
  double best_cost = CostOf(entries, kNone);
  for (int level = 0; level < static_cast<int>(model_->levels().size()); ++level) {
    if ((asked & SetOf(level)) == 0) continue;
    const double cost = CostOf(entries, level);
    if (cost <= best_cost) {  // at the same cost, the better level
      best = level;
      best_cost = cost;
    }
  }
  if (best == kNone) return;
  for (Entry& entry : entries) {
    if (Moves(*model_, entry, best)) entry.level = best;
  }
}

}  // namespace nestor
