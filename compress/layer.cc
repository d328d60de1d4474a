#include "compress/layer.h"

#include <algorithm>
#include <utility>

#include "base/bfloat16.h"
#include "base/status_macros.h"
#include "compress/decompose.h"
#include "compress/error_feedback.h"

namespace nestor {
namespace {

constexpr int64_t kResidualRankStep = 4;
constexpr int64_t kPrefixRankStep = 8;
// A layer of fewer useful ranks than this many steps takes smaller ones.
constexpr int64_t kLeastPrefixSteps = 4;
// Of the full rank. A pair saves a hundredth of a square layer's FLOPs there.
constexpr int64_t kLargestGarTenths = 9;

// r (m + n) < m n.
int64_t LargestPlainRank(int64_t out, int64_t in) { return (out * in - 1) / (out + in); }

// Energy that each rank leaves out: tails[r] = sum over k >= r of s_k^2.
std::vector<double> TailEnergies(const std::vector<double>& singular_values) {
  std::vector<double> tails(singular_values.size() + 1, 0.0);
  for (size_t k = singular_values.size(); k-- > 0;) {
    tails[k] = tails[k + 1] + singular_values[k] * singular_values[k];
  }
  return tails;
}

double Share(double part, double whole) { return whole > 0 ? part / whole : 0; }

LinearCost CostOf(const LinearSpec& spec, const LayerSettings& settings, FormAndRank choice) {
  return CostOfLinear(spec.out, spec.in, spec.has_bias, settings.dense, choice.form, choice.rank);
}

absl::Status AddResidual(const LinearSpec& spec, std::span<const float> weights,
                         std::span<const double> moment, const LayerSettings& settings,
                         double energy, LayerParts* parts) {
  std::vector<float> left_out = DequantiseCoarse(*parts->planes);
  for (size_t i = 0; i < left_out.size(); ++i) left_out[i] = weights[i] - left_out[i];
  NESTOR_ASSIGN_OR_RETURN(
      const Decomposition decomposition,
      Decompose(left_out, spec.out, spec.in, moment, settings.max_residual_rank));
  const std::vector<double> tails = TailEnergies(decomposition.singular_values);
  const int64_t dense_bytes = CostOf(spec, settings, {}).weight_bytes;
  parts->residual_options.push_back({.choice = {}, .cost = dense_bytes, .error = 0});
  for (int64_t rank = 0; rank <= decomposition.rank; rank += kResidualRankStep) {
    const FormAndRank choice = {Form::kResidual, rank};
    const int64_t bytes = CostOf(spec, settings, choice).weight_bytes;
    if (bytes >= dense_bytes) break;
    parts->residual_options.push_back({.choice = choice,
                                       .cost = bytes,
                                       .error = Share(tails[static_cast<size_t>(rank)], energy)});
  }
  std::vector<float> below = DequantiseMiddle(*parts->planes);
  for (size_t i = 0; i < below.size(); ++i) below[i] = weights[i] - below[i];
  const FormAndRank middle = {Form::kMiddle, 0};
  parts->residual_options.push_back(
      {.choice = middle,
       .cost = CostOf(spec, settings, middle).weight_bytes,
       .error = Share(OutputEnergy(below, spec.out, spec.in, moment), energy)});
  parts->residual = QuantisePair(decomposition, spec.out, spec.in);
  return absl::OkStatus();
}

absl::Status AddPrefix(const LinearSpec& spec, std::span<const float> weights,
                       std::span<const double> moment, const LayerSettings& settings, double energy,
                       LayerParts* parts) {
  parts->prefix_options.push_back(
      {.choice = {}, .cost = CostOf(spec, settings, {}).flops, .error = 0});
  const std::vector<int64_t> ranks = PrefixRanks(spec.out, spec.in, settings.may_be_gar);
  if (ranks.empty()) return absl::OkStatus();
  NESTOR_ASSIGN_OR_RETURN(const Decomposition decomposition,
                          Decompose(weights, spec.out, spec.in, moment, ranks.back()));
  const std::vector<double> tails = TailEnergies(decomposition.singular_values);
  for (const int64_t rank : ranks) {
    const FormAndRank choice = {Form::kPrefix, rank};
    parts->prefix_options.push_back({.choice = choice,
                                     .cost = CostOf(spec, settings, choice).flops,
                                     .error = Share(tails[static_cast<size_t>(rank)], energy)});
  }
  parts->prefix = QuantisePair(decomposition, spec.out, spec.in);
  return absl::OkStatus();
}

}  // namespace

FactorPair QuantisePair(const Decomposition& decomposition, int64_t out, int64_t in) {
  return {.a = QuantiseFactor(decomposition.a, decomposition.rank, in),
          .bt = QuantiseFactor(decomposition.bt, decomposition.rank, out)};
}

std::vector<int64_t> PrefixRanks(int64_t out, int64_t in, bool may_be_gar) {
  const int64_t plain = LargestPlainRank(out, in);
  const int64_t gar = kLargestGarTenths * std::min(out, in) / 10;
  const int64_t largest = may_be_gar ? std::max(plain, gar) : plain;
  const int64_t step = std::min(kPrefixRankStep, std::max<int64_t>(1, plain / kLeastPrefixSteps));
  std::vector<int64_t> ranks;
  for (int64_t rank = step; rank <= largest; rank += step) ranks.push_back(rank);
  return ranks;
}

absl::StatusOr<LayerParts> CompressLayer(const LinearSpec& spec, std::span<const float> weights,
                                         std::span<const double> moment,
                                         const LayerSettings& settings) {
  LayerParts parts;
  if (settings.dense == DenseStorage::kBf16) {
    std::transform(weights.begin(), weights.end(), std::back_inserter(parts.dense_bf16),
                   Bfloat16FromFloat);
  }
  if (settings.has_residual_ladder) {
    std::vector<float> energies;
    for (int64_t j = 0; j < spec.in; ++j) {
      energies.push_back(static_cast<float>(moment[static_cast<size_t>(j * spec.in + j)]));
    }
    NESTOR_ASSIGN_OR_RETURN(const ErrorFeedback feedback, ErrorFeedback::Of(moment, spec.in));
    parts.planes = QuantisePlanes(weights, spec.out, spec.in, energies, &feedback);
  } else if (settings.dense == DenseStorage::kPlanes) {
    // No level runs the coarse plane alone.
    parts.planes = QuantisePlanes(weights, spec.out, spec.in);
  }
  const double energy = OutputEnergy(weights, spec.out, spec.in, moment);
  if (settings.has_residual_ladder) {
    NESTOR_RETURN_IF_ERROR(AddResidual(spec, weights, moment, settings, energy, &parts));
  }
  if (settings.has_prefix_ladder) {
    NESTOR_RETURN_IF_ERROR(AddPrefix(spec, weights, moment, settings, energy, &parts));
  }
  return parts;
}

}  // namespace nestor
