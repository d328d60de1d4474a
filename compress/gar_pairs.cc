#include "compress/gar_pairs.h"

#include <iterator>

#include "base/check.h"
#include "base/status_macros.h"

namespace nestor {

GarPairs::GarPairs(const std::vector<LinearSpec>& layers, DenseStorage dense)
    : layers_(layers),
      dense_(dense),
      fitted_ranks_(layers.size()),
      substitutes_(layers.size()),
      is_settled_(layers.size()) {}

FormAndRank GarPairs::WantedChoice(size_t level, size_t layer, FormAndRank choice) const {
  if (choice.form != Form::kPrefix || !may_be_gar_[level]) return choice;
  const LinearSpec& spec = layers_[layer];
  return CheapestPrefix(spec.out, spec.in, choice.rank, /*may_be_gar=*/true);
}

std::set<int64_t> GarPairs::WantedRanks(const std::vector<Level>& levels, size_t layer) const {
  NESTOR_CHECK(levels.size() == may_be_gar_.size());
  std::set<int64_t> ranks;
  for (size_t i = 0; i < levels.size(); ++i) {
    const auto [form, rank] = WantedChoice(i, layer, levels[i].profile[layer]);
    if (form == Form::kGar) ranks.insert(rank);
  }
  return ranks;
}

absl::Status GarPairs::Fit(size_t layer, const std::set<int64_t>& ranks, const Fitter& fitter,
                           TensorSpill* spill) {
  const LinearSpec& spec = layers_[layer];
  is_settled_[layer] = 1;
  for (const int64_t rank : ranks) {
    NESTOR_ASSIGN_OR_RETURN(const GarFit fit, fitter(rank));
    if (fit.error <= kLargestError * fit.plain_error) {
      fitted_ranks_[layer].insert(rank);
      NESTOR_RETURN_IF_ERROR(AddGar(spec, fit.pair, spill));
      continue;
    }
    const auto flops = [&](FormAndRank choice) {
      return CostOfLinear(spec.out, spec.in, spec.has_bias, dense_, choice.form, choice.rank).flops;
    };
    const bool pays = flops({Form::kPrefix, rank}) < flops({});
    substitutes_[layer][rank] = pays ? Form::kPrefix : Form::kDense;
    // So are larger ones, which must be nested.
    if (!pays) break;
  }
  return absl::OkStatus();
}

void GarPairs::Apply(std::vector<Level>* levels) const {
  NESTOR_CHECK(levels->size() == may_be_gar_.size());
  for (size_t layer = 0; layer < layers_.size(); ++layer) {
    bool is_dense = false;  // from the level on that could run neither form of its rank
    for (size_t i = 0; i < levels->size(); ++i) {
      FormAndRank& runs = (*levels)[i].profile[layer];
      const FormAndRank choice = WantedChoice(i, layer, runs);
      if (runs.form != Form::kPrefix) continue;
      const auto substitute = substitutes_[layer].find(choice.rank);
      if (choice.form != Form::kGar || fitted_ranks_[layer].contains(choice.rank)) {
        runs = choice;
      } else if (substitute != substitutes_[layer].end()) {
        is_dense = is_dense || substitute->second == Form::kDense;
      }
      if (is_dense) runs = {};
    }
  }
}

int64_t GarPairs::num_substitutes() const {
  int64_t count = 0;
  for (const auto& of_layer : substitutes_) count += std::ssize(of_layer);
  return count;
}

}  // namespace nestor
